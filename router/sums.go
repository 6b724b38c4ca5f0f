package router

import (
	"context"
	"fmt"
	"slices"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"

	"conveyor.etl/router/router/commandpb"
)

// A sum per table is kept with every commit, so that replicas can be compared
// while they run. It is the sum of the hashes of the table's records, modulo
// 2^64: a change takes the old hash out and puts the new one in, whatever the
// table's size, and the order of changes does not matter.
//
// Checkpoints are written without reading the one before, whose hash is
// therefore not known. Theirs is a chain over the writes in log order instead.
// Index tables are not summed: they follow from the records.

// sumKind numbers the sums in Clock.sums. Stored: only ever add.
type sumKind int

const (
	sumPipelines sumKind = iota
	sumSidecars
	sumServices
	sumGroups
	sumGroupPasts
	sumSourceOffsets
	sumWatermarks
	sumGroupOffsets
	sumCheckpoints
	sumAssignments
	sumRevokedCounts
	sumRevokedQueue
	sumRequests
	sumRequestQueue
	sumOperations
	sumOperationEnds
	sumHandovers
	sumKinds
)

// sumTables are the tables by the number of their sum.
func sumTables() [sumKinds]struct {
	prefix byte
	name   string
} {
	return [sumKinds]struct {
		prefix byte
		name   string
	}{
		{prefixPipeline, "pipelines"}, {prefixSidecar, "sidecars"}, {prefixService, "services"},
		{prefixGroup, "groups"}, {prefixGroupPast, "group generations"},
		{prefixSourceOffset, "source offsets"}, {prefixWatermark, "watermarks"}, {prefixGroupOffset, "group offsets"},
		{prefixCheckpoint, "checkpoints"}, {prefixAssignment, "assignments"},
		{prefixRevokedCount, "revocation counts"}, {prefixRevokedQueue, "revocation queue"},
		{prefixRequest, "requests"}, {prefixRequestQueue, "request queue"},
		{prefixOperation, "operations"}, {prefixOperationEnd, "operation queue"},
		{prefixHandover, "handovers"},
	}
}

// sumOf returns the number of the sum a key counts for.
func sumOf(prefix byte) (sumKind, bool) {
	switch prefix {
	case prefixSourceOffset:
		return sumSourceOffsets, true
	case prefixGroupOffset:
		return sumGroupOffsets, true
	case prefixWatermark:
		return sumWatermarks, true
	case prefixRequest:
		return sumRequests, true
	case prefixRequestQueue:
		return sumRequestQueue, true
	case prefixPipeline:
		return sumPipelines, true
	case prefixSidecar:
		return sumSidecars, true
	case prefixService:
		return sumServices, true
	case prefixGroup:
		return sumGroups, true
	case prefixGroupPast:
		return sumGroupPasts, true
	case prefixAssignment:
		return sumAssignments, true
	case prefixRevokedCount:
		return sumRevokedCounts, true
	case prefixRevokedQueue:
		return sumRevokedQueue, true
	case prefixOperation:
		return sumOperations, true
	case prefixOperationEnd:
		return sumOperationEnds, true
	case prefixHandover:
		return sumHandovers, true
	}
	return 0, false
}

// chainStart is the chain of a state that never held a checkpoint. A chain of 0
// is not known: the state is of a release without sums, and stays so until it is
// replaced.
const chainStart = 1

const sumMultiplier = 0x9e3779b97f4a7c15 // odd

// recordHash is what a record adds to its table's sum, given the hash of its key.
// An absent one adds 0. The multiplication keeps a value from making up for
// another record's key.
func recordHash(key uint64, v []byte) uint64 {
	if v == nil {
		return 0
	}
	h := xxhash.Sum64(v)*sumMultiplier + key
	h = (h ^ h>>32) * sumMultiplier
	return h ^ h>>29
}

// chainCheckpoint adds a write to the chain of checkpoints; v is nil for a
// removal.
func (t *tx) chainCheckpoint(k, v []byte) {
	chain := &t.clock.Sums[sumCheckpoints]
	if *chain == 0 {
		return // not known, and cannot become so
	}
	h := recordHash(xxhash.Sum64(k), v)
	if v == nil {
		h = ^xxhash.Sum64(k)
	}
	next := (*chain ^ h) * sumMultiplier
	*chain = max(1, next^next>>31)
}

// settle takes a changed cell into the sum of its table.
func (t *tx) settle(c *cell) {
	kind, ok := sumOf(c.key[0])
	if !ok {
		return
	}
	h := recordHash(xxhash.Sum64String(c.key), c.val)
	t.clock.Sums[kind] += h - c.sum
	c.sum = h
}

// sumEvery is the distance of the log indexes at which sums are remembered, and
// sumsKept how many. Replicas take entries in runs of their own, so that only
// indexes all of them stop at can be compared.
const (
	sumEvery = 128
	sumsKept = 64
)

// Sums are the sums of the state after an entry.
type Sums struct {
	Index, Epoch uint64
	// Sums are those of the tables named by SumTables, in the same order.
	Sums []uint64
}

// SumTables names what the numbers of Sums stand for. The last is that of the
// counters and clocks of the state.
func SumTables() []string {
	var out []string
	for _, t := range sumTables() {
		out = append(out, t.name)
	}
	return append(out, "clock")
}

// Differ names the tables whose sums differ. It is for sums of one index; those
// of another epoch differ in everything. A chain of checkpoints that one side
// does not know is no difference.
func (s Sums) Differ(o Sums) []string {
	names := SumTables()
	if s.Epoch != o.Epoch || s.Index != o.Index {
		return names
	}
	var out []string
	unknown := false
	for i, name := range names {
		var a, b uint64
		if i < len(s.Sums) {
			a = s.Sums[i]
		}
		if i < len(o.Sums) {
			b = o.Sums[i]
		}
		switch {
		case i == int(sumCheckpoints) && (a == 0 || b == 0):
			unknown = true
		case i == int(sumKinds) && unknown:
			// The clock holds the chain.
		case a != b:
			out = append(out, name)
		}
	}
	return out
}

// sumHistory holds the sums of the newest state and of the last few indexes at
// which all replicas stop. It is guarded by FSM.mu.
type sumHistory struct {
	index, epoch uint64
	current      [sumKinds + 1]uint64
	kept         []Sums
}

// now records the sums of the state after an entry.
func (h *sumHistory) now(index uint64, c *commandpb.Clock, encoded []byte) {
	h.index, h.epoch = index, c.Epoch
	copy(h.current[:sumKinds], c.Sums)
	h.current[sumKinds] = xxhash.Sum64(encoded)
	if index%sumEvery != 0 {
		return
	}
	if len(h.kept) == sumsKept {
		h.kept = append(h.kept[:0], h.kept[1:]...)
	}
	h.kept = append(h.kept, h.newest())
}

func (h *sumHistory) newest() Sums {
	return Sums{Index: h.index, Epoch: h.epoch, Sums: slices.Clone(h.current[:])}
}

// RecentSums returns the sums of the last log indexes that are multiples of 128,
// as far as this process applied them, and of the newest state, ascending. It
// reads nothing and never waits for Apply.
func (s *FSM) RecentSums() []Sums {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := slices.Clone(s.sums.kept)
	if n := len(out); n == 0 || out[n-1].Index != s.sums.index || out[n-1].Epoch != s.sums.epoch {
		out = append(out, s.sums.newest())
	}
	return out
}

// newClock returns the clock of a state in which nothing has happened.
func newClock() *commandpb.Clock {
	c := &commandpb.Clock{Counts: make([]uint64, countKinds), Sums: make([]uint64, sumKinds)}
	c.Sums[sumCheckpoints] = chainStart
	return c
}

// fitSums gives a clock of an older release the sums it lacks, by reading the
// tables.
func fitSums(r pebble.Reader, c *commandpb.Clock) error {
	for n := len(c.Sums); n < int(sumKinds); n++ {
		c.Sums = append(c.Sums, 0)
		table := sumTables()[n]
		if sumKind(n) == sumCheckpoints {
			continue
		}
		sum, err := scanSum(context.Background(), r, table.prefix)
		if err != nil {
			return err
		}
		c.Sums[n] = sum
	}
	return nil
}

// scanSum adds up a table.
func scanSum(ctx context.Context, r pebble.Reader, prefix byte) (uint64, error) {
	var sum uint64
	n := 0
	err := scanKeys(r, key(nil).table(prefix), nil, func(k, v []byte) (bool, error) {
		if n++; n%4096 == 0 && ctx.Err() != nil {
			return false, ctx.Err()
		}
		sum += recordHash(xxhash.Sum64(k), v)
		return true, nil
	})
	return sum, err
}

// CheckSums adds up every table and compares that with the sums kept: what is
// read from the disk is what was written to it. Checkpoints are left out, because
// their sum is a chain over the writes and does not follow from the records. It
// reads the whole state; a difference is an error that unwraps to ErrCorrupt and
// names the tables.
func (v *View) CheckSums(ctx context.Context) error {
	return v.read(func(r pebble.Reader) error {
		c, err := readClock(r)
		if err != nil {
			return err
		}
		var sums [sumKinds]uint64
		for i, table := range sumTables() {
			if sumKind(i) == sumCheckpoints {
				continue
			}
			if sums[i], err = scanSum(ctx, r, table.prefix); err != nil {
				return err
			}
		}
		if bad := unlikeSums(c, &sums); len(bad) > 0 {
			return fmt.Errorf("%w: the sums kept of %v are not those of the records", ErrCorrupt, bad)
		}
		return nil
	})
}

// unlikeSums names the tables whose kept sums are not those of their records.
func unlikeSums(c *commandpb.Clock, sums *[sumKinds]uint64) (bad []string) {
	for i, table := range sumTables() {
		// Sums that are missing are so in the clock of an older release, until the
		// next entry.
		if sumKind(i) != sumCheckpoints && i < len(c.Sums) && sums[i] != c.Sums[i] {
			bad = append(bad, table.name)
		}
	}
	return bad
}
