package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

var errSilent = errors.New("it does not answer the leader")

// StateReport is one comparison of all members that somebody asked for.
type StateReport struct {
	// Index is where they were compared, 0 when they could not be.
	Index uint64
	// Equal: every member was compared and all are equal.
	Equal   bool
	Members []MemberState
	Message string
}

// MemberState is what one member said.
type MemberState struct {
	Node  uint64
	Index uint64
	// Sums are by table; Full, of a full check, is of everything.
	Sums  router.Sums
	Full  []byte
	Equal bool
	// Err is why it could not be compared.
	Err error
}

const (
	// checkAttempts bounds how often an index is chosen anew for a check.
	checkAttempts = 6
	// checkAhead is the least distance of an index to be looked at from the
	// present one: so many entries are on their way at most while the members
	// are being asked.
	checkAhead = 32
)

// Check compares all members at one index, by the sums they keep or, with full,
// by everything they hold. It works on the leader only, and until ctx is done.
// That members differ is no error.
func (k *Checker) Check(ctx context.Context, full bool) (StateReport, error) {
	lead := k.c.Node.Leadership()
	switch {
	case lead.Leading:
	case lead.Leader == 0:
		return StateReport{}, raftnode.ErrNoLeader
	default:
		return StateReport{}, &raftnode.NotLeaderError{Leader: lead.Leader, Term: lead.Term}
	}
	e := k.c.Electorate()
	var members []MemberState
	var err error
	if full {
		members, err = k.compareFull(ctx, e)
	} else {
		members, err = k.compareSums(ctx, e)
	}
	if err != nil {
		return StateReport{}, err
	}
	// Let the loop, which acts, see it as well.
	k.Wake()
	return report(e, members), nil
}

// report says who is equal: to a majority, where there is one.
func report(e Electorate, members []MemberState) StateReport {
	same := func(a, b MemberState) bool {
		return a.Err == nil && b.Err == nil && a.Index == b.Index && slices.Equal(a.Sums.Sums, b.Sums.Sums) && slices.Equal(a.Full, b.Full)
	}
	var reference *MemberState
	for i := range members {
		var ids []uint64
		for _, m := range members {
			if same(members[i], m) {
				ids = append(ids, m.Node)
			}
		}
		if e.majority(ids) {
			reference = &members[i]
			break
		}
	}
	r := StateReport{Members: members, Equal: true}
	var differ, silent []uint64
	for i := range members {
		m := &members[i]
		r.Index = max(r.Index, m.Index)
		switch {
		case m.Err != nil:
			silent = append(silent, m.Node)
		case reference == nil || !same(*reference, *m):
			differ = append(differ, m.Node)
		default:
			m.Equal = true
		}
	}
	r.Equal = len(differ) == 0 && len(silent) == 0
	compared := len(members) - len(silent)
	switch {
	case r.Equal && compared == 1:
		r.Message = fmt.Sprintf("there is one member, and nothing to compare its state at index %d with", r.Index)
	case r.Equal:
		r.Message = fmt.Sprintf("all %d members have the same state at index %d", compared, r.Index)
	case reference == nil && len(silent) > 0:
		// Perhaps they would agree with one of the others.
		r.Message = fmt.Sprintf("too few members could be compared at index %d to say whose state is right", r.Index)
	case reference == nil:
		r.Message = fmt.Sprintf("no majority of the voters has the same state at index %d: nobody knows whose is right", r.Index)
	case len(differ) > 0:
		r.Message = fmt.Sprintf("the state of %s at index %d is not that of the majority", nodes(differ), r.Index)
	default:
		r.Message = fmt.Sprintf("the %d members that could be compared have the same state at index %d", compared, r.Index)
	}
	if len(silent) > 0 {
		r.Message += fmt.Sprintf("; nothing is known of %s: repeat the check when all members answer", nodes(silent))
	}
	return r
}

// nodes names nodes in a sentence.
func nodes(ids []uint64) string {
	if len(ids) == 1 {
		return fmt.Sprintf("node %d", ids[0])
	}
	return "nodes " + list(ids)
}

// compareSums finds the newest index of which all members that answer know
// their sums. Members that have only just started know few.
func (k *Checker) compareSums(ctx context.Context, e Electorate) ([]MemberState, error) {
	for attempt := 0; ; attempt++ {
		reports, errs := k.collect(ctx, e)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("%w: %w", errNotComparable, err)
		}
		p, all := commonPoint(reports)
		if !all && attempt < checkAttempts {
			// Get to the next index that everybody remembers.
			k.nudgeTo(ctx, nextBoundary(k.c.State.Applied().Index))
			continue
		}
		here := map[uint64]router.Sums{}
		for id, sums := range reports {
			for _, s := range sums {
				if s.Index == p.index && s.Epoch == p.epoch {
					here[id] = s
				}
			}
		}
		align(here)
		var members []MemberState
		for _, id := range e.all() {
			m := MemberState{Node: id, Err: errs[id]}
			s, known := here[id]
			switch {
			case m.Err != nil:
			case !known:
				m.Err = fmt.Errorf("%w, %d", errNotComparable, p.index)
			default:
				m.Index, m.Sums = p.index, s
			}
			members = append(members, m)
		}
		return members, nil
	}
}

// commonPoint returns the newest point that most nodes know, and whether all do.
func commonPoint(reports map[uint64][]router.Sums) (p point, all bool) {
	count := map[point]int{}
	best := 0
	for _, sums := range reports {
		for _, s := range sums {
			count[point{s.Index, s.Epoch}]++
		}
	}
	for q, n := range count {
		if n > best || n == best && (q.index > p.index || q.index == p.index && q.epoch > p.epoch) {
			best, p = n, q
		}
	}
	return p, best == len(reports)
}

func nextBoundary(index uint64) uint64 { return (index/router.Boundary + 1) * router.Boundary }

// nudgeTo replicates commands without effect until this node has applied index,
// one by one: together they would make one entry.
func (k *Checker) nudgeTo(ctx context.Context, index uint64) {
	for k.c.State.Applied().Index < index {
		if err := k.c.Nudge(ctx); err != nil {
			// The log may still move without us; if not, ctx ends the waiting.
			if !sleep(ctx, 50*time.Millisecond) {
				return
			}
		}
	}
}

// compareFull lets every member hash all of its state as it is at one index. A
// group that stands still is looked at where it is; otherwise at a boundary that
// is still to come.
func (k *Checker) compareFull(ctx context.Context, e Electorate) ([]MemberState, error) {
	index := k.c.State.Applied().Index
	if !sleep(ctx, 50*time.Millisecond) {
		return nil, fmt.Errorf("%w: %w", errNotComparable, ctx.Err())
	}
	still := k.c.State.Applied().Index == index
	for attempt := 0; ; attempt++ {
		if !still || attempt > 0 {
			// Farther each time: the group may be fast, or a member slow to ask.
			index = nextBoundary(k.c.State.Applied().Index+checkAhead) + router.Boundary*uint64(1<<attempt-1)
		}
		members := k.hashAll(ctx, e, index)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("%w: %w", errNotComparable, err)
		}
		missed := slices.ContainsFunc(members, func(m MemberState) bool {
			return errors.Is(m.Err, router.ErrIndexPassed)
		})
		if !missed || attempt == checkAttempts {
			return members, nil
		}
	}
}

// hashAll hashes every member's state at index.
func (k *Checker) hashAll(ctx context.Context, e Electorate, index uint64) []MemberState {
	ids := e.all()
	members := make([]MemberState, len(ids))
	var wg, nudge sync.WaitGroup
	nudging, enough := context.WithCancel(ctx)
	nudge.Go(func() {
		// After the members have heard of the index, in most cases.
		if sleep(nudging, 50*time.Millisecond) {
			k.nudgeTo(nudging, index)
		}
	})
	for i, id := range ids {
		wg.Go(func() {
			var h router.StateHash
			var err error
			switch {
			case id == k.c.Self:
				h, err = k.c.State.HashAt(ctx, index)
			case k.c.Silent(id):
				// Asking would take all the time there is.
				err = errSilent
			default:
				h, err = k.c.Members.HashAt(ctx, id, index)
			}
			members[i] = MemberState{Node: id, Index: h.Index, Full: h.Hash, Err: err}
		})
	}
	wg.Wait()
	enough()
	nudge.Wait()
	return members
}
