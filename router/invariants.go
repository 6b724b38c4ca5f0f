package router

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// maxFaults is where a check ends: what is wrong in one place often is in many.
const maxFaults = 20

// Check reads the whole image and verifies every invariant of a state: each
// record can be read and says what its key says, ids are legal, counters equal
// rows, index entries and records belong together, partitions have one owner
// each, pipelines are valid graphs, and the sums are those of the records. An
// error that unwraps to ErrCorrupt lists what is wrong.
func (im *Image) Check(ctx context.Context) error {
	v := im.View()
	defer v.Close()
	return v.check(ctx, true)
}

// CheckedSource is Check, and describes the content for BeginRestore, in one
// reading of everything: most of what each costs is to get at the records. Whose
// cluster it was is not known here.
func (im *Image) CheckedSource(ctx context.Context) (*commandpb.RestoreSource, error) {
	return im.checkedSource(ctx, true)
}

func (im *Image) checkedSource(ctx context.Context, graphs bool) (*commandpb.RestoreSource, error) {
	v := im.View()
	defer v.Close()
	digest := newRecordDigest()
	if err := v.checkInto(ctx, graphs, digest); err != nil {
		return nil, err
	}
	return im.sourceOf(digest.sum()), nil
}

// check is Check of any view. Graphs are the proposer's concern: apply does not
// look at them.
func (v *View) check(ctx context.Context, graphs bool) error {
	return v.checkInto(ctx, graphs, nil)
}

// checkInto adds the content to digest on the way, unless it is nil.
func (v *View) checkInto(ctx context.Context, graphs bool, digest *recordDigest) error {
	return v.readDatabase(func(d *database, r pebble.Reader) error {
		c := &checker{r: r, graphs: graphs}
		n, err := c.run(ctx, digest)
		if err == nil {
			v.noteCheckpoints(d, c.clock, n[prefixCheckpoint])
		}
		return err
	})
}

// checkers is how many records are looked at side by side.
const checkers = 2

// checker looks at records. Several of them share the tables of a state, those
// but for the assignments in which the order matters, and are added up in the end.
type checker struct {
	r      pebble.Reader
	graphs bool
	clock  *commandpb.Clock
	faults []string
	sums   [sumKinds]uint64
	rows   [256]uint64
	// entries is how many index entries the records ask for, by table.
	entries [256]uint64
	// Of the sidecar whose assignments are being read.
	sidecar          string
	revoked          uint64
	assigned, queued uint64
	revokedAll       uint64
	// ckpt is the checkpoint that is being looked at.
	ckpt commandpb.Checkpoint
}

var errEnough = errors.New("enough faults")

func (c *checker) fault(format string, args ...any) {
	if len(c.faults) < maxFaults {
		c.faults = append(c.faults, fmt.Sprintf(format, args...))
	}
}

// run checks everything and returns the rows by table.
func (c *checker) run(ctx context.Context, digest *recordDigest) (rows [256]uint64, err error) {
	if c.clock, err = readClock(c.r); err != nil {
		return rows, err
	}
	pos, err := readApplied(c.r)
	if err != nil {
		return rows, err
	}
	if c.clock.Revision > pos.Index+c.clock.RevisionBase {
		c.fault("revision %d is later than entry %d allows", c.clock.Revision, pos.Index)
	}
	all := []*checker{c}
	for len(all) < checkers {
		all = append(all, &checker{r: c.r, graphs: c.graphs, clock: c.clock})
	}
	look := &tableCheck{ordered: func(table byte) bool { return table == prefixAssignment }}
	for _, x := range all {
		look.look = append(look.look, x.record())
	}
	rows, err = traverse(ctx, c.r, everything(), digest, look)
	if err == nil || errors.Is(err, errEnough) {
		c.endSidecar()
		for _, x := range all[1:] {
			c.add(x)
		}
		if err == nil {
			c.totals()
		}
		if len(c.faults) > 0 {
			return rows, fmt.Errorf("%w: %s", ErrCorrupt, strings.Join(c.faults, "; "))
		}
	}
	return rows, err
}

// add takes in what another one has found.
func (c *checker) add(o *checker) {
	for _, f := range o.faults {
		c.fault("%s", f)
	}
	for i := range c.sums {
		c.sums[i] += o.sums[i]
	}
	for i := range c.rows {
		c.rows[i] += o.rows[i]
		c.entries[i] += o.entries[i]
	}
	c.assigned += o.assigned
	c.queued += o.queued
	c.revokedAll += o.revokedAll
}

// record returns the check of one record of any table.
func (c *checker) record() func(k, v []byte) error {
	checks := [256]func(k, v []byte) error{
		prefixMeta: func(_, _ []byte) error { return nil }, prefixStage: func(_, _ []byte) error { return nil },
		prefixPipeline: c.pipeline, prefixSidecar: c.sidecarRecord, prefixService: c.service, prefixGroup: c.group,
		prefixGroupPast: c.groupPast, prefixSourceOffset: c.offset, prefixWatermark: c.watermark, prefixGroupOffset: c.groupOffset,
		prefixCheckpoint: c.checkpoint, prefixAssignment: c.assignment, prefixHandover: c.handover, prefixRevokedCount: c.revokedCount,
		prefixRevokedQueue: c.revokedRef, prefixRequest: c.request, prefixRequestQueue: c.requestRef,
		prefixOperation: c.operation, prefixOperationEnd: c.operationEnd,
		prefixByPipeline: c.index, prefixByName: c.index, prefixBySidecar: c.index, prefixLocalName: c.index, prefixMembership: c.index,
	}
	return func(k, v []byte) error {
		if len(c.faults) >= maxFaults {
			return errEnough
		}
		check := checks[k[0]]
		if check == nil {
			c.fault("the key %q is of no table", k)
			return nil
		}
		c.rows[k[0]]++
		if kind, ok := sumOf(k[0]); ok {
			c.sums[kind] += recordHash(xxhash.Sum64(k), v)
		}
		if err := check(k, v); err != nil {
			c.fault("record %q: %v", k, err)
		}
		return nil
	}
}

// totals compares what was counted while reading.
func (c *checker) totals() {
	if err := checkRows(c.clock, &c.rows); err != nil {
		c.fault("%v", err)
	}
	for _, x := range []struct {
		what     string
		is, want uint64
	}{
		{"assignments", c.assigned, c.clock.Counts[countAssignments]},
		{"revoked assignments", c.revokedAll, c.clock.Counts[countRevoked]},
		{"revoked assignments in the queue", c.queued, c.revokedAll},
		{"revocation counts", c.rows[prefixRevokedCount], c.entries[prefixRevokedCount]},
		{"operations", c.rows[prefixOperation], c.clock.Counts[countOperations]},
		{"ended operations", c.rows[prefixOperationEnd], c.clock.OperationTail - c.clock.OperationHead},
		{"assignments by pipeline", c.rows[prefixByPipeline], c.entries[prefixByPipeline]},
		{"services by name", c.rows[prefixByName], c.entries[prefixByName]},
		{"services by sidecar", c.rows[prefixBySidecar], c.entries[prefixBySidecar]},
		{"local services by name", c.rows[prefixLocalName], c.entries[prefixLocalName]},
		{"memberships", c.rows[prefixMembership], c.entries[prefixMembership]},
	} {
		if x.is != x.want {
			c.fault("there are %d %s, there should be %d", x.is, x.what, x.want)
		}
	}
	if bad := unlikeSums(c.clock, &c.sums); len(bad) > 0 {
		c.fault("the sums kept of %v are not those of the records", bad)
	}
}

// has looks for the index entry a record asks for.
func (c *checker) has(k key) {
	c.entries[k[0]]++
	v, err := getCopy(c.r, k)
	if err != nil || v == nil {
		c.fault("the index entry %q is missing", []byte(k))
	}
}

func (c *checker) index(k, v []byte) error {
	if _, _, err := decodePair(k); err != nil {
		return err
	}
	if len(v) != 0 {
		return errors.New("an index entry has a value")
	}
	return nil
}

// legal checks ids and that the first is the one of the key.
func legal(inKey string, ids ...string) error {
	for _, id := range append(ids, inKey) {
		if why := CheckID(id); why != "" {
			return fmt.Errorf("the id %q %s", id, why)
		}
	}
	if len(ids) > 0 && ids[0] != inKey {
		return fmt.Errorf("it says that its id is %q", ids[0])
	}
	return nil
}

// made checks the revisions of a record.
func (c *checker) made(create, mod uint64) error {
	if create > mod || mod > c.clock.Revision {
		return fmt.Errorf("it was made at revision %d and changed at %d, the state is at %d", create, mod, c.clock.Revision)
	}
	return nil
}

func (c *checker) pipeline(k, v []byte) error {
	var p commandpb.Pipeline
	if err := p.UnmarshalVT(v); err != nil {
		return err
	}
	if p.Spec == nil || p.Version == 0 {
		return errors.New("it has no content or no version")
	}
	if len(p.Spec.Stages) > maxStages || len(p.Spec.Edges) > maxEdges || deepConditions(p.Spec) {
		return errors.New("it is larger than a pipeline may be")
	}
	if c.graphs {
		if faults := ValidatePipeline(p.Spec); len(faults) > 0 {
			return errors.New(faults[0])
		}
	}
	return errors.Join(legal(string(k[1:]), p.Spec.Id), c.made(p.CreateRevision, p.ModRevision))
}

func (c *checker) sidecarRecord(k, v []byte) error {
	var s commandpb.Sidecar
	if err := s.UnmarshalVT(v); err != nil {
		return err
	}
	for _, n := range localNames(&s) {
		c.has(key(nil).pair(prefixLocalName, n, s.SidecarId))
	}
	if s.Generation == 0 {
		return errors.New("it has no generation")
	}
	return errors.Join(legal(string(k[1:]), s.SidecarId), c.made(s.CreateRevision, s.ModRevision))
}

func (c *checker) service(k, v []byte) error {
	var s commandpb.Service
	if err := s.UnmarshalVT(v); err != nil {
		return err
	}
	c.has(key(nil).pair(prefixByName, NormalizeName(s.Name), s.ServiceId))
	if s.SidecarId != "" {
		c.has(key(nil).pair(prefixBySidecar, s.SidecarId, s.ServiceId))
	}
	return errors.Join(legal(string(k[1:]), s.ServiceId, s.Name), c.made(s.CreateRevision, s.ModRevision))
}

func (c *checker) group(k, v []byte) error {
	var g commandpb.Group
	if err := g.UnmarshalVT(v); err != nil {
		return err
	}
	if len(g.Members) == 0 || g.PartitionCount == 0 || g.PartitionCount > maxPartitions {
		return fmt.Errorf("it has %d members and %d partitions", len(g.Members), g.PartitionCount)
	}
	owned := make([]bool, g.PartitionCount)
	total := 0
	for i, m := range g.Members {
		if err := legal(m.GetServiceId()); err != nil {
			return err
		}
		if i > 0 && g.Members[i-1].ServiceId >= m.ServiceId {
			return fmt.Errorf("its members are not in order at %q", m.ServiceId)
		}
		if !slices.IsSorted(m.Partitions) {
			return fmt.Errorf("the partitions of %q are not in order", m.ServiceId)
		}
		for _, p := range m.Partitions {
			if p >= g.PartitionCount || owned[p] {
				return fmt.Errorf("partition %d of %q does not exist or has another owner, too", p, m.ServiceId)
			}
			owned[p] = true
			total++
		}
		c.has(key(nil).pair(prefixMembership, m.ServiceId, g.GroupId))
	}
	if total != len(owned) {
		return fmt.Errorf("%d of its %d partitions have no owner", len(owned)-total, len(owned))
	}
	if past, err := getCopy(c.r, key(nil).single(prefixGroupPast, g.GroupId)); past != nil || err != nil {
		return errors.Join(errors.New("it has members and is gone at once"), err)
	}
	return errors.Join(legal(string(k[1:]), g.GroupId), c.made(g.CreateRevision, g.ModRevision))
}

func (c *checker) groupPast(k, v []byte) error {
	var p commandpb.GroupPast
	return errors.Join(p.UnmarshalVT(v), legal(string(k[1:])))
}

func (c *checker) offset(k, v []byte) error {
	source, _, err := decodePartition(k)
	if err != nil {
		return err
	}
	var o commandpb.Offset
	return errors.Join(o.UnmarshalVT(v), legal(source))
}

func (c *checker) watermark(k, v []byte) error {
	source, _, err := decodePartition(k)
	if err != nil {
		return err
	}
	var w commandpb.Watermark
	return errors.Join(w.UnmarshalVT(v), legal(source))
}

func (c *checker) groupOffset(k, v []byte) error {
	group, source, _, err := decodeGroupOffset(k)
	if err != nil {
		return err
	}
	var o commandpb.Offset
	return errors.Join(o.UnmarshalVT(v), legal(group), legal(source))
}

func (c *checker) checkpoint(k, v []byte) error {
	p := &c.ckpt
	data := p.Data[:0]
	p.Reset()
	p.Data = data // the decoder uses it again
	if err := p.UnmarshalVT(v); err != nil {
		return err
	}
	if len(p.Data) > maxCheckpointBytes || len(p.SourceOffsets) > maxSourceOffsets {
		return errors.New("it is larger than a checkpoint may be")
	}
	return errors.Join(legal(string(k[1:]), p.ServiceId, p.CheckpointId), c.made(p.ModRevision, p.ModRevision))
}

func (c *checker) assignment(k, v []byte) error {
	sidecar, pipeline, err := decodePair(k)
	if err != nil {
		return err
	}
	var a commandpb.Assignment
	if err := a.UnmarshalVT(v); err != nil {
		return err
	}
	if sidecar != c.sidecar {
		c.endSidecar()
		c.sidecar = sidecar
	}
	if a.Revoked {
		c.revoked++
	} else {
		c.assigned++
	}
	c.has(key(nil).pair(prefixByPipeline, pipeline, sidecar))
	return errors.Join(legal(sidecar, a.SidecarId), legal(pipeline, a.PipelineId), c.made(a.ModRevision, a.ModRevision))
}

func (c *checker) handover(k, v []byte) error {
	pipeline, sidecar, err := decodePair(k)
	if err != nil {
		return err
	}
	var h commandpb.Handover
	if err := h.UnmarshalVT(v); err != nil {
		return err
	}
	if len(h.Releases) == 0 {
		return errors.New("it releases nothing")
	}
	for i, r := range h.Releases {
		if err := legal(r.GetStageId()); err != nil {
			return err
		}
		if i > 0 && h.Releases[i-1].StageId >= r.StageId {
			return fmt.Errorf("its releases are not in order at %q", r.StageId)
		}
	}
	return errors.Join(legal(sidecar, h.SidecarId), legal(pipeline, h.PipelineId), c.made(h.CreateRevision, h.ModRevision))
}

// endSidecar compares the revocations of a sidecar with their count.
func (c *checker) endSidecar() {
	if c.revoked > 0 {
		c.entries[prefixRevokedCount]++
		v, err := getCopy(c.r, key(nil).single(prefixRevokedCount, c.sidecar))
		if n, _ := binary.Uvarint(v); err != nil || n != c.revoked {
			c.fault("sidecar %q has %d revoked assignments, the counter says %d", c.sidecar, c.revoked, n)
		}
	}
	c.revokedAll += c.revoked
	c.revoked = 0
}

func (c *checker) revokedCount(k, v []byte) error {
	n, w := binary.Uvarint(v)
	if w != len(v) || n == 0 {
		return errors.New("it is no count")
	}
	return legal(string(k[1:]))
}

// sequence checks the place of a queue's entry.
func sequence(k []byte, head, tail uint64) (uint64, error) {
	if len(k) != 9 {
		return 0, errBadKey
	}
	n := binary.BigEndian.Uint64(k[1:])
	if n < head || n >= tail {
		return n, fmt.Errorf("it is number %d of a queue from %d to %d", n, head, tail)
	}
	return n, nil
}

func (c *checker) revokedRef(k, v []byte) error {
	var ref commandpb.RevokedRef
	_, err := sequence(k, c.clock.RevokedHead, c.clock.RevokedTail)
	if err = errors.Join(err, ref.UnmarshalVT(v)); err != nil {
		return err
	}
	b, err := getCopy(c.r, key(nil).pair(prefixAssignment, ref.SidecarId, ref.PipelineId))
	if b == nil || err != nil {
		return err
	}
	var a commandpb.Assignment
	if err := a.UnmarshalVT(b); err != nil {
		return err
	}
	if a.Revoked && a.Generation == ref.Generation {
		c.queued++
	}
	return nil
}

func (c *checker) request(k, v []byte) error {
	var r commandpb.RequestRecord
	if err := r.UnmarshalVT(v); err != nil {
		return err
	}
	b, err := getCopy(c.r, key(nil).sequence(prefixRequestQueue, r.Sequence))
	if err != nil {
		return err
	}
	var ref commandpb.RequestRef
	if err := ref.UnmarshalVT(b); err != nil || ref.RequestId != string(k[1:]) {
		return errors.New("its place in the queue is another one's")
	}
	return legal(string(k[1:]))
}

func (c *checker) requestRef(k, v []byte) error {
	var r commandpb.RequestRef
	_, err := sequence(k, c.clock.RequestHead, c.clock.RequestTail)
	return errors.Join(err, r.UnmarshalVT(v))
}

func (c *checker) operation(k, v []byte) error {
	var o commandpb.Operation
	if err := o.UnmarshalVT(v); err != nil {
		return err
	}
	return errors.Join(legal(string(k[1:]), o.OperationId), c.made(o.CreateRevision, o.ModRevision))
}

func (c *checker) operationEnd(k, v []byte) error {
	_, err := sequence(k, c.clock.OperationHead, c.clock.OperationTail)
	if err != nil {
		return err
	}
	b, err := getCopy(c.r, key(nil).single(prefixOperation, string(bytes.Clone(v))))
	if err == nil && b == nil {
		err = fmt.Errorf("there is no operation %q", v)
	}
	return err
}
