package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"conveyor.etl/router/router"
)

// HashedState is the state of this node, which knows its hashes. *router.FSM is
// one.
type HashedState interface {
	RecentSums() []router.Sums
	HashAt(ctx context.Context, index uint64) (router.StateHash, error)
	Applied() router.Position
}

// MemberClient asks other members about their states. Its calls end when ctx is
// done.
type MemberClient interface {
	// Sums also tells node up to which index, of which epoch, its state was seen to
	// be that of a majority; an index of zero tells nothing.
	Sums(ctx context.Context, node, agreedIndex, agreedEpoch uint64) ([]router.Sums, error)
	// HashAt fails with router.ErrIndexPassed when node is past index, and with
	// router.ErrHashBusy when it hashes for somebody else.
	HashAt(ctx context.Context, node, index uint64) (router.StateHash, error)
	// Quarantine says what was expected of node; without sums, that nobody knows
	// what is right. It returns whether node agrees, and why (not).
	Quarantine(ctx context.Context, node uint64, expected router.Sums, reason string) (bool, string, error)
}

// Finding is a node's own divergence, with the evidence.
type Finding struct {
	// Own and Expected are the sums of this node and of the majority at one
	// index of one epoch.
	Own, Expected router.Sums
	// Agreed are the members whose states are as expected.
	Agreed []uint64
	// Reason is a sentence for people.
	Reason string
}

// CheckerConfig holds the parts of a Checker; EnsureDefaults fills the rest.
type CheckerConfig struct {
	Self    uint64
	Node    Node
	State   HashedState
	Members MemberClient
	// Electorate returns the members of the group as of now.
	Electorate func() Electorate
	// Nudge replicates a command that changes nothing, so that the log of an
	// idle group gets to an index at which everybody can be looked at.
	Nudge func(ctx context.Context) error
	// Diverged is told, once, that this node leads with a state that is not that
	// of a majority. When it returns, no command is taken and nothing is read
	// here any more.
	Diverged func(ctx context.Context, f Finding)
	// Agreed is told up to which index, of which epoch, the state of this node was
	// seen to be that of a majority. Default: nobody is told.
	Agreed func(index, epoch uint64)
	// Hold stops this node from answering for d, or until Release: members
	// differ and nobody knows which of them is right.
	Hold    func(reason string, d time.Duration)
	Release func()

	// Interval is the time between two comparisons. Default 5 s; negative: none
	// are made but those that are asked for.
	Interval time.Duration
	// Timeout bounds how long one comparison waits for members. Default 2 s.
	Timeout time.Duration
	// Confirm is the pause before a difference without a majority is looked at
	// again: a member that is a little behind may decide it. Default 250 ms.
	Confirm time.Duration
	Logger  *slog.Logger
}

// EnsureDefaults fills what is zero.
func (c *CheckerConfig) EnsureDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Agreed == nil {
		c.Agreed = func(uint64, uint64) {}
	}
	if c.Interval == 0 {
		c.Interval = 5 * time.Second
	}
	if c.Timeout == 0 {
		c.Timeout = 2 * time.Second
	}
	if c.Confirm == 0 {
		c.Confirm = 250 * time.Millisecond
	}
}

// Checker compares the states of the members while this node leads, and has
// whoever differs from the majority rebuild its own. Its methods are safe for
// concurrent use.
type Checker struct {
	c    CheckerConfig
	wake chan struct{}

	mu sync.Mutex
	// alarms by node; 0 is the group as a whole.
	alarms map[uint64]string
	rounds uint64
	// compared is the newest index at which a majority was seen to agree.
	compared uint64
	// agreed holds where each member was last seen to agree.
	agreed map[uint64]router.Sums
	held   bool
}

// NewChecker returns a Checker; Run makes it work.
func NewChecker(c CheckerConfig) *Checker {
	c.EnsureDefaults()
	return &Checker{c: c, wake: make(chan struct{}, 1), alarms: map[uint64]string{}, agreed: map[uint64]router.Sums{}}
}

// Run compares until ctx is done.
func (k *Checker) Run(ctx context.Context) {
	if k.c.Interval < 0 {
		return
	}
	whileLeading(ctx, k.c.Node, func(ctx context.Context) {
		defer k.forget()
		if !caughtUp(ctx, k.c.Node, 100*time.Millisecond) {
			return
		}
		timer := time.NewTimer(k.c.Interval)
		defer timer.Stop()
		for {
			k.round(ctx)
			timer.Reset(k.c.Interval)
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			case <-k.wake:
			}
		}
	})
}

// forget drops what only a leader may say.
func (k *Checker) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.alarms)
	clear(k.agreed)
	k.releaseLocked()
}

func (k *Checker) releaseLocked() {
	if k.held {
		k.held = false
		k.c.Release()
	}
}

// round is one comparison and what follows from it.
func (k *Checker) round(ctx context.Context) {
	v, own := k.judge(ctx)
	if v.Split {
		if !sleep(ctx, k.c.Confirm) {
			return
		}
		v, own = k.judge(ctx)
	}
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	k.rounds++
	k.compared = max(k.compared, v.Index)
	k.agreed = v.AgreeAt // those who are told now; the others have not answered
	for _, id := range v.Agree {
		delete(k.alarms, id)
	}
	k.mu.Unlock()
	if at, ok := v.AgreeAt[k.c.Self]; ok {
		k.c.Agreed(at.Index, at.Epoch)
	}
	if expected, differs := v.Differ[k.c.Self]; differs {
		f := k.finding(expected, own, v)
		k.c.Logger.Error("the state of this leader is not that of the majority", "event", "leader_diverged",
			"index", expected.Index, "agreed", v.Agree, "own", hexes(f.Own.Sums), "expected", hexes(expected.Sums))
		k.setAlarm(k.c.Self, f.Reason)
		k.c.Diverged(ctx, f)
		return
	}
	for _, id := range slices.Sorted(maps.Keys(v.Differ)) {
		k.quarantine(ctx, id, v)
	}
	if !v.Split {
		k.mu.Lock()
		delete(k.alarms, 0)
		k.releaseLocked()
		k.mu.Unlock()
		return
	}
	k.hold(ctx, v)
}

// judge collects what the members say and judges it. It also returns what this
// node said.
func (k *Checker) judge(ctx context.Context) (Verdict, []router.Sums) {
	e := k.c.Electorate()
	reports, _ := k.collect(ctx, e)
	return Judge(e, reports), reports[k.c.Self]
}

// collect asks all members at once, this node included, and returns what those
// said that answered, and why the others did not.
func (k *Checker) collect(ctx context.Context, e Electorate) (map[uint64][]router.Sums, map[uint64]error) {
	ctx, cancel := context.WithTimeout(ctx, k.c.Timeout)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	reports, errs := map[uint64][]router.Sums{}, map[uint64]error{}
	for _, id := range e.all() {
		wg.Go(func() {
			var sums []router.Sums
			var err error
			if id == k.c.Self {
				sums = k.c.State.RecentSums()
			} else {
				k.mu.Lock()
				at := k.agreed[id]
				k.mu.Unlock()
				sums, err = k.c.Members.Sums(ctx, id, at.Index, at.Epoch)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs[id] = err
				return
			}
			reports[id] = sums
		})
	}
	wg.Wait()
	return reports, errs
}

func (k *Checker) finding(expected router.Sums, own []router.Sums, v Verdict) Finding {
	f := Finding{Expected: expected, Agreed: v.Agree}
	for _, s := range own {
		if s.Index == expected.Index && s.Epoch == expected.Epoch {
			f.Own = s
		}
	}
	f.Reason = fmt.Sprintf("the state of node %d at index %d is not that of nodes %s; it is rebuilt from one of them",
		k.c.Self, expected.Index, list(v.Agree))
	return f
}

// quarantine tells node that it differs.
func (k *Checker) quarantine(ctx context.Context, node uint64, v Verdict) {
	expected := v.Differ[node]
	reason := fmt.Sprintf("the state of node %d at index %d is not that of nodes %s", node, expected.Index, list(v.Agree))
	ctx, cancel := context.WithTimeout(ctx, 2*k.c.Timeout)
	defer cancel()
	agreed, message, err := k.c.Members.Quarantine(ctx, node, expected, reason)
	switch {
	case err != nil:
		k.setAlarm(node, fmt.Sprintf("%s, and it cannot be told: %v", reason, err))
	case agreed:
		k.setAlarm(node, reason+"; it answers nobody and rebuilds its state")
	default:
		k.setAlarm(node, fmt.Sprintf("%s, but it finds otherwise: %s", reason, message))
	}
	k.c.Logger.Error("the state of a node is not that of the majority", "event", "node_diverged", "peer", node,
		"index", expected.Index, "agreed", v.Agree, "rebuilds", agreed, "says", message, "err", err)
}

// hold stops this node, and those it can tell, from answering: they differ and
// no majority says who is right.
func (k *Checker) hold(ctx context.Context, v Verdict) {
	reason := fmt.Sprintf("the states of nodes %s differ at index %d and no majority says whose is right: no command is taken and nothing is read; "+
		"start the members that are down, or find out whose state is right ('router cluster check'), stop each other node, "+
		"create an empty file QUARANTINE in its data directory and start it: it takes the state of the others", list(v.Sides), v.SplitAt)
	k.mu.Lock()
	first := !k.held
	k.held = true
	k.mu.Unlock()
	// A node that hears nothing more goes on by itself: this one may have lost
	// the leadership, and the next one judges anew.
	d := 3*k.c.Interval + k.c.Timeout
	k.c.Hold(reason, d)
	k.setAlarm(0, reason)
	if first {
		k.c.Logger.Error("members differ and there is no majority", "event", "state_split", "nodes", v.Sides, "index", v.SplitAt)
	}
	ctx, cancel := context.WithTimeout(ctx, k.c.Timeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, id := range k.c.Electorate().all() {
		if id != k.c.Self {
			wg.Go(func() {
				// Best effort: one that is down answers nobody either.
				_, _, _ = k.c.Members.Quarantine(ctx, id, router.Sums{}, reason)
			})
		}
	}
	wg.Wait()
}

// Verify looks for itself whether the state of this node is other than a
// majority's, which another node says. Without such a majority it says no, and
// why.
func (k *Checker) Verify(ctx context.Context, expected router.Sums) (Finding, bool, string) {
	// The index of the other's finding may be forgotten here by now, and would
	// prove nothing alone: the other may be the one that is wrong.
	for _, s := range k.c.State.RecentSums() {
		if equal, ok := equalSums(s, expected); ok && equal {
			return Finding{}, false, fmt.Sprintf("the state of node %d at index %d is as expected", k.c.Self, expected.Index)
		}
	}
	v, own := k.judge(ctx)
	now, differs := v.Differ[k.c.Self]
	if !differs {
		return Finding{}, false, fmt.Sprintf("node %d finds no majority of a state other than its own (agreed: %s)", k.c.Self, list(v.Agree))
	}
	return k.finding(now, own, v), true, ""
}

// Wake makes the next comparison begin now.
func (k *Checker) Wake() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Alarms returns what the leader found, for an operator.
func (k *Checker) Alarms() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var out []string
	for _, id := range slices.Sorted(maps.Keys(k.alarms)) {
		out = append(out, k.alarms[id])
	}
	return out
}

// Stats returns how many comparisons this node has made, the newest index at
// which a majority agreed, and how many members are not known to be right.
func (k *Checker) Stats() (rounds, compared uint64, alarms int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rounds, k.compared, len(k.alarms)
}

func (k *Checker) setAlarm(node uint64, text string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.alarms[node] = text
}

// list writes ids as people do.
func list(ids []uint64) string {
	parts := make([]string, len(ids))
	for i, id := range ids {
		parts[i] = fmt.Sprint(id)
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func hexes(sums []uint64) string { return fmt.Sprintf("%016x", sums) }

// errNotComparable: no index was found at which all could be looked at.
var errNotComparable = errors.New("control: the members could not be looked at at one index")
