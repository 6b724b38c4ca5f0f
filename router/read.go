package router

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"

	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// Pipeline returns a pipeline, nil when there is none.
func (v *View) Pipeline(id string) (*commandpb.Pipeline, error) {
	return getRecord[commandpb.Pipeline](v, key(nil).single(prefixPipeline, id))
}

// Pipelines lists up to limit pipelines (0 = all) after an id.
func (v *View) Pipelines(after string, limit int, fn func(*commandpb.Pipeline) bool) error {
	return listTable(v, prefixPipeline, after, limit, fn)
}

// Sidecar returns a sidecar, nil when there is none.
func (v *View) Sidecar(id string) (*commandpb.Sidecar, error) {
	return getRecord[commandpb.Sidecar](v, key(nil).single(prefixSidecar, id))
}

// Sidecars lists up to limit sidecars (0 = all) after an id.
func (v *View) Sidecars(after string, limit int, fn func(*commandpb.Sidecar) bool) error {
	return listTable(v, prefixSidecar, after, limit, fn)
}

// SidecarsServing lists the sidecars that report a local service of a name,
// compared as NormalizeName does.
func (v *View) SidecarsServing(name string, fn func(*commandpb.Sidecar) bool) error {
	return follow(v, prefixLocalName, NormalizeName(name), func(id string) []byte {
		return key(nil).single(prefixSidecar, id)
	}, fn)
}

// Service returns a service, nil when there is none.
func (v *View) Service(id string) (*commandpb.Service, error) {
	return getRecord[commandpb.Service](v, key(nil).single(prefixService, id))
}

// Services lists up to limit services (0 = all) after an id.
func (v *View) Services(after string, limit int, fn func(*commandpb.Service) bool) error {
	return listTable(v, prefixService, after, limit, fn)
}

// ServicesNamed lists the services of a name, compared as NormalizeName does.
func (v *View) ServicesNamed(name string, fn func(*commandpb.Service) bool) error {
	return follow(v, prefixByName, NormalizeName(name), func(id string) []byte {
		return key(nil).single(prefixService, id)
	}, fn)
}

// ServicesOfSidecar lists the services that registered with a sidecar's id.
func (v *View) ServicesOfSidecar(id string, fn func(*commandpb.Service) bool) error {
	return follow(v, prefixBySidecar, id, func(id string) []byte {
		return key(nil).single(prefixService, id)
	}, fn)
}

// Group returns a group, nil when it has no members.
func (v *View) Group(id string) (*commandpb.Group, error) {
	return getRecord[commandpb.Group](v, key(nil).single(prefixGroup, id))
}

// Groups lists up to limit groups (0 = all) after an id.
func (v *View) Groups(after string, limit int, fn func(*commandpb.Group) bool) error {
	return listTable(v, prefixGroup, after, limit, fn)
}

// GroupsOf lists the groups a service is a member of.
func (v *View) GroupsOf(service string, fn func(*commandpb.Group) bool) error {
	return follow(v, prefixMembership, service, func(id string) []byte {
		return key(nil).single(prefixGroup, id)
	}, fn)
}

// SourceOffset returns the offset of a partition, nil when none is committed.
func (v *View) SourceOffset(source string, partition uint32) (*commandpb.Offset, error) {
	return getRecord[commandpb.Offset](v, key(nil).partition(prefixSourceOffset, source, partition))
}

// SourceOffsets lists the offsets of a source by partition.
func (v *View) SourceOffsets(source string, fn func(partition uint32, o *commandpb.Offset) bool) error {
	var bad error
	err := listRecords(v, key(nil).group(prefixSourceOffset, source), nil, 0, func(k []byte, o *commandpb.Offset) bool {
		_, p, err := decodePartition(k)
		if bad = err; err != nil {
			return false
		}
		return fn(p, o)
	})
	if bad != nil {
		return bad
	}
	return err
}

// Sources lists the ids of the sources with offsets or watermarks, up to limit
// (0 = all), after an id.
func (v *View) Sources(after string, limit int, fn func(source string) bool) error {
	return v.read(func(r pebble.Reader) error {
		n := 0
		for {
			next, err := nextSource(r, after)
			if err != nil || next == "" || !fn(next) {
				return err
			}
			if n++; n == limit {
				return nil
			}
			after = next
		}
	})
}

// nextSource returns the smallest source id greater than after, "" when there
// is none. It seeks from source to source instead of reading all partitions.
func nextSource(r pebble.Reader, after string) (string, error) {
	best := ""
	for _, table := range []byte{prefixSourceOffset, prefixWatermark} {
		from := key(nil).table(table)
		end := prefixEnd(from)
		if after != "" {
			from = prefixEnd(key(nil).group(table, after))
		}
		it, err := r.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: end})
		if err != nil {
			return "", err
		}
		if it.First() {
			id, _, derr := decodePartition(it.Key())
			if err = derr; err == nil && (best == "" || id < best) {
				best = id
			}
		}
		if err == nil {
			err = it.Error()
		}
		if cerr := it.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return "", err
		}
	}
	return best, nil
}

// GroupOffset returns a group's offset of a partition, nil when none is
// committed.
func (v *View) GroupOffset(group, source string, partition uint32) (*commandpb.Offset, error) {
	return getRecord[commandpb.Offset](v, key(nil).groupOffset(group, source, partition))
}

// GroupOffsets lists a group's offsets, of one source or ("") of all.
func (v *View) GroupOffsets(group, source string, fn func(source string, partition uint32, o *commandpb.Offset) bool) error {
	prefix := key(nil).group(prefixGroupOffset, group)
	if source != "" {
		prefix = prefix.part(source)
	}
	var bad error
	err := listRecords(v, prefix, nil, 0, func(k []byte, o *commandpb.Offset) bool {
		_, s, p, err := decodeGroupOffset(k)
		if bad = err; err != nil {
			return false
		}
		return fn(s, p, o)
	})
	if bad != nil {
		return bad
	}
	return err
}

// Watermarks lists the watermarks of a source by partition.
func (v *View) Watermarks(source string, fn func(*commandpb.Watermark) bool) error {
	var bad error
	err := listRecords(v, key(nil).group(prefixWatermark, source), nil, 0, func(k []byte, w *commandpb.Watermark) bool {
		_, p, err := decodePartition(k)
		if bad = err; err != nil {
			return false
		}
		w.SourceId, w.Partition = source, p
		return fn(w)
	})
	if bad != nil {
		return bad
	}
	return err
}

// GlobalWatermark returns the watermark of the source's partition that is
// furthest behind, nil when none is known. It reads all of them.
func (v *View) GlobalWatermark(source string) (*commandpb.Watermark, error) {
	var low *commandpb.Watermark
	err := v.Watermarks(source, func(w *commandpb.Watermark) bool {
		if low == nil || w.Position < low.Position {
			low = w
		}
		return true
	})
	return low, err
}

// Watermark returns the watermark of one partition, nil when none is known.
func (v *View) Watermark(source string, partition uint32) (*commandpb.Watermark, error) {
	w, err := getRecord[commandpb.Watermark](v, key(nil).partition(prefixWatermark, source, partition))
	if w != nil {
		w.SourceId, w.Partition = source, partition
	}
	return w, err
}

// Checkpoint returns a service's checkpoint, nil when there is none.
func (v *View) Checkpoint(service string) (*commandpb.Checkpoint, error) {
	return getRecord[commandpb.Checkpoint](v, key(nil).single(prefixCheckpoint, service))
}

// Checkpoints lists up to limit checkpoints (0 = all) after a service id.
func (v *View) Checkpoints(after string, limit int, fn func(*commandpb.Checkpoint) bool) error {
	return listTable(v, prefixCheckpoint, after, limit, fn)
}

// Assignment returns what a sidecar has to run of a pipeline, nil when nothing
// is or was assigned. It may be a revoked one.
func (v *View) Assignment(sidecar, pipeline string) (*commandpb.Assignment, error) {
	return getRecord[commandpb.Assignment](v, key(nil).pair(prefixAssignment, sidecar, pipeline))
}

// Assignments lists the assignments of a sidecar by pipeline, revoked ones
// included.
func (v *View) Assignments(sidecar string, fn func(*commandpb.Assignment) bool) error {
	return listRecords(v, key(nil).group(prefixAssignment, sidecar), nil, 0, func(_ []byte, a *commandpb.Assignment) bool { return fn(a) })
}

// AllAssignments lists every assignment by sidecar and pipeline, revoked ones
// included.
func (v *View) AllAssignments(fn func(*commandpb.Assignment) bool) error {
	return listRecords(v, key(nil).table(prefixAssignment), nil, 0, func(_ []byte, a *commandpb.Assignment) bool { return fn(a) })
}

// PipelineAssignments lists the assignments of a pipeline by sidecar, revoked
// ones included.
func (v *View) PipelineAssignments(pipeline string, fn func(*commandpb.Assignment) bool) error {
	return follow(v, prefixByPipeline, pipeline, func(sidecar string) []byte {
		return key(nil).pair(prefixAssignment, sidecar, pipeline)
	}, fn)
}

// Handovers lists what sidecars have yet to let go of, by pipeline and sidecar.
func (v *View) Handovers(fn func(*commandpb.Handover) bool) error {
	return listRecords(v, key(nil).table(prefixHandover), nil, 0, func(_ []byte, h *commandpb.Handover) bool { return fn(h) })
}

// PipelineHandovers lists those of a pipeline by sidecar.
func (v *View) PipelineHandovers(pipeline string, fn func(*commandpb.Handover) bool) error {
	return listRecords(v, key(nil).group(prefixHandover, pipeline), nil, 0, func(_ []byte, h *commandpb.Handover) bool { return fn(h) })
}

// SidecarHandovers lists those of the sidecars with ids from first to last, by pipeline
// and sidecar. What others of a pipeline have yet to let go of it passes over.
func (v *View) SidecarHandovers(first, last string, fn func(*commandpb.Handover) bool) error {
	return v.read(func(r pebble.Reader) error {
		table := key(nil).table(prefixHandover)
		it, err := r.NewIter(&pebble.IterOptions{LowerBound: table, UpperBound: prefixEnd(table)})
		if err != nil {
			return err
		}
		for ok := it.First(); ok && err == nil; {
			var pipeline, sidecar string
			if pipeline, sidecar, err = decodePair(it.Key()); err != nil {
				break
			}
			switch {
			case sidecar < first:
				ok = it.SeekGE(key(nil).pair(prefixHandover, pipeline, first))
			case sidecar > last:
				ok = it.SeekGE(prefixEnd(key(nil).group(prefixHandover, pipeline)))
			default:
				var val []byte
				var h *commandpb.Handover
				if val, err = it.ValueAndErr(); err == nil {
					h, err = decodeRecord[commandpb.Handover](it.Key(), val)
				}
				ok = err == nil && fn(h) && it.Next()
			}
		}
		return errors.Join(err, it.Error(), it.Close())
	})
}

// Handover returns what a sidecar has yet to let go of of a pipeline, nil when
// there is nothing.
func (v *View) Handover(pipeline, sidecar string) (*commandpb.Handover, error) {
	return getRecord[commandpb.Handover](v, key(nil).pair(prefixHandover, pipeline, sidecar))
}

// Time returns the state machine's time at the view, Unix milliseconds.
func (v *View) Time() (uint64, error) {
	var ms uint64
	err := v.read(func(r pebble.Reader) error {
		c, err := readClock(r)
		if err == nil {
			ms = c.TimeMs
		}
		return err
	})
	return ms, err
}

// Hash returns a SHA-256 over everything replicated: equal on all replicas at
// an equal Applied index. Only the position itself and the membership there are
// left out, whose parts are encoded by whoever hands them in, and the format, which
// each replica raises when it is upgraded. It reads the whole state.
func (v *View) Hash() ([]byte, error) {
	h := sha256.New()
	left := map[string]bool{}
	for _, name := range []string{metaPosition, metaMembership, metaFormat} {
		left[string(key(nil).meta(name))] = true
	}
	var n []byte
	err := v.read(func(r pebble.Reader) error {
		return scanKeys(r, nil, nil, func(k, val []byte) (bool, error) {
			if k[0] == prefixMeta && left[string(k)] {
				return true, nil
			}
			n = binary.AppendUvarint(n[:0], uint64(len(k)))
			h.Write(n)
			h.Write(k)
			n = binary.AppendUvarint(n[:0], uint64(len(val)))
			h.Write(n)
			h.Write(val)
			return true, nil
		})
	})
	if err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}
