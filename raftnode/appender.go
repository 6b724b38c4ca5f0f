package raftnode

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"
)

// appender owns the write side of the log. It takes everything queued at once,
// so one fsync serves all that gathered during the previous one, and sends the
// answers raft attached to the messages only when that fsync is done.
type appender struct {
	id     uint64
	log    Log
	tr     Transport
	in     *inbox
	q      *queue[*raftpb.Message]
	clock  Clock
	events *EventListener

	// install hands a snapshot to the applier and returns when the state
	// machine holds it durably and everything queued before it is applied.
	install func(*raftpb.Snapshot) error

	// hard is the newest hard state given to the log.
	hard *raftpb.HardState
	// dirty: the log was given something without a sync that an answer may rest
	// on, a term or a vote. A commit index alone is not: no answer vouches for
	// it, and a lost one is found again.
	dirty bool

	// installing: the appender waits for an image, not for its disk.
	installing atomic.Bool
	// syncs and syncNanos sum up for Status; lastSync is when the last ended.
	syncs     atomic.Int64
	syncNanos atomic.Int64
	lastSync  atomic.Int64

	own []*raftpb.Message // scratch
}

// step works on everything queued. False: nothing was. Any error is final: a
// message lost or reordered on its way to the log would break raft's promises,
// and a second fsync after a failed one proves nothing.
func (a *appender) step() (bool, error) {
	msgs := a.q.take()
	if len(msgs) == 0 {
		return false, nil
	}
	err := a.process(msgs)
	a.q.done(msgs)
	return true, err
}

func hasSnapshot(m *raftpb.Message) bool { return !raft.IsEmptySnap(m.GetSnapshot()) }

func (a *appender) process(msgs []*raftpb.Message) error {
	for len(msgs) > 0 {
		if hasSnapshot(msgs[0]) {
			if err := a.installSnapshot(msgs[0]); err != nil {
				return err
			}
			msgs = msgs[1:]
			continue
		}
		n := 1
		for n < len(msgs) && !hasSnapshot(msgs[n]) {
			n++
		}
		if err := a.write(msgs[:n]); err != nil {
			return err
		}
		a.deliver(msgs[:n])
		msgs = msgs[n:]
	}
	return nil
}

// hardState rebuilds the hard state of m: raft sets either all three fields or
// none, and none means unchanged, not zero.
func hardState(m *raftpb.Message) *raftpb.HardState {
	if m.Term == nil && m.Vote == nil && m.Commit == nil {
		return nil
	}
	return &raftpb.HardState{
		Term: new(m.GetTerm()), Vote: new(m.GetVote()), Commit: new(m.GetCommit()),
	}
}

// write appends messages without snapshots in one go. Entries keep their order
// (a later run may overwrite an earlier one), the last hard state wins, and the
// entries go before it: a commit index beyond the stored log cannot be booted.
func (a *appender) write(msgs []*raftpb.Message) error {
	var ents []*raftpb.Entry
	var hs *raftpb.HardState
	owned, answers := false, false
	for _, m := range msgs {
		if e := m.GetEntries(); len(e) > 0 {
			switch {
			case ents == nil:
				// Not ours to append to: it is a window of raft's own array,
				// with room behind it that raft will write to.
				ents = e[:len(e):len(e)]
			case !owned:
				ents, owned = append(append(make([]*raftpb.Entry, 0, 2*(len(ents)+len(e))), ents...), e...), true
			default:
				ents = append(ents, e...)
			}
		}
		if h := hardState(m); h != nil {
			hs = h
		}
		answers = answers || len(m.GetResponses()) > 0
	}
	return a.append(hs, ents, answers)
}

// append gives the log what raft wants stored. It syncs when an answer will
// rest on something not yet synced: a lone commit index never needs it, and the
// acknowledgement that rides with one attests only entries, which were synced
// when they came.
func (a *appender) append(hs *raftpb.HardState, ents []*raftpb.Entry, answers bool) error {
	if len(ents) > 0 || hs != nil && (hs.GetTerm() != a.hard.GetTerm() || hs.GetVote() != a.hard.GetVote()) {
		a.dirty = true
	}
	sync := answers && a.dirty
	if hs == nil && len(ents) == 0 && !sync {
		return nil
	}
	if sync {
		// A thread that syncs keeps its processor from the goroutines that wait for it,
		// until the runtime takes it away. Among them are those that send this very
		// batch to the other nodes, for they were woken together with this one: the
		// second of two followers got it up to a millisecond later than the first, which
		// is when this node's own sync was done.
		runtime.Gosched()
	}
	start := a.clock.Now()
	if err := a.log.Append(hs, ents, sync); err != nil {
		return fmt.Errorf("raftnode: append to the log: %w", err)
	}
	if hs != nil {
		a.hard = hs
	}
	if sync {
		a.dirty = false
		a.synced(start, ents)
	}
	return nil
}

func (a *appender) synced(start time.Time, ents []*raftpb.Entry) {
	now := a.clock.Now()
	d := now.Sub(start)
	a.syncs.Add(1)
	a.syncNanos.Add(int64(d))
	a.lastSync.Store(now.UnixNano())
	var bytes int64
	for _, e := range ents {
		bytes += int64(len(e.GetData()))
	}
	a.events.AppendSynced(d, len(ents), bytes)
}

// deliver sends the answers of msgs in order: our own in one go to the loop,
// the others to their nodes.
func (a *appender) deliver(msgs []*raftpb.Message) {
	var remote []*raftpb.Message
	for _, m := range msgs {
		for _, r := range m.GetResponses() {
			if r.GetTo() == a.id {
				a.own = append(a.own, r)
			} else {
				remote = append(remote, r)
			}
		}
	}
	if len(remote) > 0 {
		a.tr.Send(remote)
	}
	a.in.pushLocal(a.own)
	clear(a.own)
	a.own = a.own[:0]
}

// installSnapshot replaces state and log by a snapshot, the state first:
//
//  1. the applier finishes what was queued before (it is older),
//  2. the state machine takes the image, durably,
//  3. the log is emptied and begins behind the snapshot, durably,
//  4. entries that came with it are appended; the answers leave.
//
// A crash before 2 finds the old node: nothing was acknowledged. Between 2 and 3
// it finds a state ahead of the log, or a log that contradicts it: boot then
// does step 3 from the position of the state alone, for which no image is
// needed. The other order would leave a state that the log cannot bring forward,
// and a node that starts only as long as the image survives.
func (a *appender) installSnapshot(m *raftpb.Message) error {
	snap := m.GetSnapshot()
	meta := snap.GetMetadata()
	a.installing.Store(true)
	err := a.install(snap)
	a.installing.Store(false)
	if err != nil {
		return err
	}
	full := hardState(m)
	hs := proto.CloneOf(full)
	if hs == nil {
		hs = proto.CloneOf(a.hard)
	}
	// Entries behind the snapshot come with the next write; until then the
	// commit index must not point past it.
	hs.Commit = new(meta.GetIndex())
	if err := a.log.InstallSnapshot(meta.GetIndex(), meta.GetTerm(), meta.GetConfState(), hs); err != nil {
		return fmt.Errorf("raftnode: begin the log behind the snapshot at %d: %w", meta.GetIndex(), err)
	}
	a.hard, a.dirty = hs, false
	if len(m.GetEntries()) > 0 {
		ents := m.GetEntries()
		if err := a.append(full, ents[:len(ents):len(ents)], true); err != nil {
			return err
		}
	}
	a.deliver([]*raftpb.Message{m})
	return nil
}
