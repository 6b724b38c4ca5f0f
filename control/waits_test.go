package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// emptyMirror is one of a state without anything.
func emptyMirror() *mirror {
	return &mirror{
		engine: placement.NewEngine(placement.View{}), sidecars: make(map[string]*commandpb.Sidecar),
		services: make(map[string]map[string]*commandpb.Service), leaving: make(map[string]*commandpb.Service),
		handovers: make(map[string]map[string]*commandpb.Handover), letting: make(map[string]map[string]*commandpb.Handover),
		timed: make(map[string]bool), draining: make(map[string]bool), graced: make(map[string]bool),
	}
}

// Goal: what is taken over change by change ends the handovers, at the times, that a look
// at all of them would, whatever begins, changes and ends and whoever goes and comes back.
func TestWaitsFollowTheHandovers(t *testing.T) {
	seed := rand.Int63()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	m := emptyMirror()
	sidecar := func(id string, gone bool) {
		if gone && r.Intn(2) == 0 {
			m.change(&router.Change{Table: router.TableSidecars, Key: id})
			return
		}
		s := &commandpb.Sidecar{SidecarId: id}
		if gone {
			s.State = commandpb.SidecarState_SIDECAR_STATE_EXPIRED
		}
		m.change(&router.Change{Table: router.TableSidecars, Key: id, Next: s})
	}
	some := func() (pipeline, sidecar string) { return fmt.Sprint("p", r.Intn(4)), fmt.Sprint("s", r.Intn(12)) }
	handover := func(pipeline, sidecar string, now uint64) *commandpb.Handover {
		h := &commandpb.Handover{PipelineId: pipeline, SidecarId: sidecar}
		for i := range 1 + r.Intn(3) {
			h.Releases = append(h.Releases, &commandpb.Release{StageId: fmt.Sprint(i), Revision: 1 + uint64(r.Intn(9)), DeadlineMs: now + 1 + uint64(r.Intn(40))})
		}
		return h
	}
	for i := range 12 {
		sidecar(fmt.Sprint("s", i), i%3 == 0)
	}
	for range 10 {
		p, s := some()
		m.putHandover(handover(p, s, 0))
	}
	w := newWaits(m)
	began := time.Now()
	measured := make(map[waitKey]time.Time) // as a look at all keeps them
	ends := 0
	for now := range uint64(2000) {
		at := began.Add(time.Duration(now) * time.Millisecond)
		var want []*commandpb.EndedHandover
		for p, hs := range m.handovers {
			for s, h := range hs {
				e := &commandpb.EndedHandover{PipelineId: p, SidecarId: s}
				for _, rel := range h.Releases {
					due, known := measured[waitKey{pipeline: p, sidecar: s, ms: rel.DeadlineMs}]
					switch {
					case m.gone(s):
						e.End = commandpb.HandoverEnd_HANDOVER_END_GONE
					case known && !at.Before(due):
						e.End = commandpb.HandoverEnd_HANDOVER_END_DEADLINE
					default:
						continue
					}
					e.Revision = max(e.Revision, rel.Revision)
				}
				if e.End != 0 {
					want = append(want, e)
				}
			}
		}
		got, _ := m.ended(w, at)
		show := func(es []*commandpb.EndedHandover) string {
			slices.SortFunc(es, func(a, b *commandpb.EndedHandover) int {
				return cmp.Or(cmp.Compare(a.PipelineId, b.PipelineId), cmp.Compare(a.SidecarId, b.SidecarId))
			})
			return fmt.Sprint(es)
		}
		if show(got) != show(want) {
			t.Fatalf("at %d: %s\nwant %s", now, show(got), show(want))
		}
		ends += len(got)
		for _, e := range got { // most of them come true, some the state refuses
			if r.Intn(5) > 0 {
				m.change(&router.Change{Table: router.TableHandovers, Prev: m.handovers[e.PipelineId][e.SidecarId]})
			}
		}
		for range r.Intn(4) {
			p, s := some()
			h := m.handovers[p][s]
			switch next := handover(p, s, now); {
			case h != nil && r.Intn(2) == 0:
				m.change(&router.Change{Table: router.TableHandovers, Prev: h})
			case h != nil:
				next.Releases = append(next.Releases, h.Releases[0]) // one goes on
				fallthrough
			default:
				m.change(&router.Change{Table: router.TableHandovers, Prev: orNothing(h), Next: next})
			}
		}
		if r.Intn(8) == 0 {
			_, s := some()
			sidecar(s, r.Intn(2) == 0)
		}
		left := func(ms uint64) time.Duration { return time.Duration(max(0, int64(ms)-int64(now))) * time.Millisecond }
		w.measure(at, left)
		there := make(map[waitKey]time.Time)
		var first time.Time
		for p, hs := range m.handovers {
			for s, h := range hs {
				for _, rel := range h.Releases {
					k := waitKey{pipeline: p, sidecar: s, ms: rel.DeadlineMs}
					due, known := measured[k]
					if !known {
						due = at.Add(left(k.ms))
					}
					if there[k] = due; first.IsZero() || due.Before(first) {
						first = due
					}
				}
			}
		}
		measured = there
		if !maps.Equal(w.due, measured) || !w.soonest().Equal(first) {
			t.Fatalf("at %d: due is %v, first %v; want %v, %v", now, w.due, w.soonest(), measured, first)
		}
		if len(w.queue) > 2*len(w.due)+1024 {
			t.Fatalf("%d are queued for %d", len(w.queue), len(w.due))
		}
	}
	if ends < 500 {
		t.Fatalf("only %d ends were seen", ends)
	}
}

// orNothing makes a nil interface of no handover.
func orNothing(h *commandpb.Handover) proto.Message {
	if h == nil {
		return nil
	}
	return h
}

// Goal: what a plan does by the clock costs what began, ended or is due, and not what
// there is: with ten thousand handovers that nobody touches, nothing of them is looked at.
func TestWaitsCostWhatChanges(t *testing.T) {
	p, m, w := manyHandovers(t, 10_000)
	if len(w.fresh)+len(w.look) > 0 {
		t.Fatalf("%d handovers are to be measured again, and %d sidecars looked at", len(w.fresh), len(w.look))
	}
	before := w.others
	if allocs := testing.AllocsPerRun(10, func() { clockOnce(t, p, m, w) }); allocs > 50 {
		t.Fatalf("%v allocations for a look at which nothing had changed", allocs)
	}
	if len(before) == 0 || !maps.Equal(before, w.others) {
		t.Fatalf("the drain is due at %v, before at %v", w.others, before)
	}
}

// BenchmarkClockWhileDraining is what a plan does by the clock while a sidecar drains and
// ten thousand have yet to let go of something.
func BenchmarkClockWhileDraining(b *testing.B) {
	p, m, w := manyHandovers(b, 10_000)
	for b.Loop() {
		clockOnce(b, p, m, w)
	}
}

// manyHandovers is the mirror of n handovers, of which a sidecar that leaves has one.
func manyHandovers(t testing.TB, n int) (*Placer, *mirror, *waits) {
	r := bigFleet(t, router.Options{}, 4, 1, 1)
	t.Cleanup(func() {
		if err := r.fsm.Close(); err != nil {
			t.Error(err)
		}
	})
	p := NewPlacer(PlacerConfig{Node: r, State: r, Submit: r})
	m := emptyMirror()
	for i := range n {
		id := fmt.Sprint("s", i)
		s := &commandpb.Sidecar{SidecarId: id}
		if i == 0 {
			s.Draining, s.Leaves, s.DrainDeadlineMs = true, true, 1<<40
		}
		m.change(&router.Change{Table: router.TableSidecars, Key: id, Next: s})
		m.putHandover(&commandpb.Handover{PipelineId: "wide", SidecarId: id, Releases: []*commandpb.Release{{StageId: "in", Revision: 1, DeadlineMs: 1 << 40}}})
	}
	w := newWaits(m)
	clockOnce(t, p, m, w)
	return p, m, w
}

func clockOnce(t testing.TB, p *Placer, m *mirror, w *waits) {
	if err := p.tidy(context.Background(), m, w); err != nil {
		t.Fatal(err)
	}
	if err := p.watchClock(m, w); err != nil {
		t.Fatal(err)
	}
}
