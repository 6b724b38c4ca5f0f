package raftnode

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// loop owns the RawNode. It does no IO and never waits for the appender or the
// applier, so heartbeats, votes and reads go on whatever the disk does.
type loop struct {
	cfg     *Config
	rn      *raft.RawNode
	in      *inbox
	appendQ *queue[*raftpb.Message]
	applyQ  *queue[applyItem]
	tr      Transport
	snaps   *snapshots
	props   *proposals
	waits   *waits
	// leaderChanged publishes whom this node follows.
	leaderChanged func(Leadership)
	notLeaderErr  func() error
	diskBusy      func() bool
	// members lists those of the applied configuration, removed ones included.
	members func() []Member

	now   time.Time
	lanes lanes

	// What raft last told.
	term, commit, leader uint64
	state                raft.StateType
	told                 Leadership
	// termStart is the first entry of this node's own leadership, zero until
	// it has been handed out.
	termStart uint64
	// restored is the index of the newest snapshot raft has switched to.
	restored uint64
	// confState is the configuration raft works with.
	confState *raftpb.ConfState

	// unplaced holds batches proposed in this turn whose index is not known.
	unplaced []*batch
	reads    reads
	// heldReads are requests of other nodes that came before this leader has
	// committed in its term.
	heldReads []*raftpb.Message
	// commits holds news of commits that the next entries will carry.
	commits heldCommits
	// beats holds questions to followers whose answers are not needed.
	beats heldBeats
	// lastChange is the newest membership change handed out to the log.
	lastChange uint64

	transferee    uint64
	transferTicks int
	sincePublish  int
	lastTick      time.Time
	tickLag       time.Duration
	awake         time.Time // when the process last ran again after it had stood still
	stalled       bool
	contacts      contacts
	// yield is runtime.Gosched, but for tests that look at what has happened by then.
	yield func()
	// crowded is until when others are not let come, by the clock of the machine.
	crowded time.Time

	published     atomic.Pointer[loopStatus]
	commitPtr     atomic.Uint64
	followerFloor atomic.Uint64
	// acked is raft's own applied index.
	acked atomic.Uint64
}

func (l *loop) leading() bool { return l.state == raft.StateLeader }

// termCommitted reports whether this leader has committed an entry of its term.
func (l *loop) termCommitted() bool { return l.termStart != 0 && l.commit >= l.termStart }

// run turns the loop whenever something waits or a tick is due. A stalled
// process gets one tick afterwards, not all it missed: replaying a backlog would
// make every node campaign at once.
func (l *loop) run(stop <-chan struct{}) error {
	ticks, stopTicks := l.cfg.Clock.Ticker(l.cfg.TickInterval)
	defer stopTicks()
	for {
		tick := false
		select {
		case <-stop:
			return nil
		case <-ticks:
			tick = true
		case <-l.in.wake:
		}
		if err := l.turn(tick); err != nil {
			return err
		}
	}
}

// turn takes everything that waits, lets raft see it and hands out what raft
// wants done. Any error is final.
func (l *loop) turn(tick bool) error {
	l.now = l.cfg.Clock.Now()
	was := l.leading()
	l.in.swap(&l.lanes)
	for _, m := range l.lanes.local {
		if err := l.stepLocal(m); err != nil {
			return err
		}
	}
	for i := range l.lanes.ctl {
		f := l.lanes.ctl[i].run
		l.lanes.ctl[i] = control{}
		f(l)
	}
	for i := range l.lanes.peers {
		l.stepPeer(&l.lanes.peers[i])
	}
	l.reads.add(l.lanes.reads, l.now)
	l.lanes.reset()
	if tick {
		if err := l.tick(); err != nil {
			return err
		}
	}
	l.propose()
	l.serveReads()
	l.drain()
	if l.readsDue() || was && !l.leading() {
		// What was just handed out changed what can be done for those who wait;
		// without a second look they would wait for the next tick.
		l.propose()
		l.serveReads()
		l.drain()
	}
	return nil
}

// stepLocal feeds an answer of the appender or the applier to raft.
func (l *loop) stepLocal(m *raftpb.Message) error {
	if err := l.rn.Step(m); err == nil {
		switch m.GetType() {
		case raftpb.MsgStorageApplyResp:
			if ents := m.GetEntries(); len(ents) > 0 {
				l.acked.Store(ents[len(ents)-1].GetIndex())
			}
		case raftpb.MsgStorageAppendResp:
			if hasSnapshot(m) {
				l.acked.Store(m.GetSnapshot().GetMetadata().GetIndex())
			}
		}
		return nil
	} else if errors.Is(err, raft.ErrStepPeerNotFound) {
		return nil // this node has left the group meanwhile
	} else {
		return fmt.Errorf("raftnode: raft refuses a local %v: %w", m.GetType(), err)
	}
}

// stepPeer feeds a message of a peer to raft. Errors are about the message, not
// about this node: raft has lost nothing it counted on.
func (l *loop) stepPeer(it *peerItem) {
	m := it.msg
	switch m.GetType() {
	case raftpb.MsgSnap:
		l.stepSnapshot(it)
		return
	case raftpb.MsgReadIndex:
		term := m.GetTerm()
		m.Term = nil // raft knows it without
		// Raft itself is asked: it may have stepped down earlier in this turn.
		if l.rn.BasicStatus().RaftState != raft.StateLeader {
			// Raft would pass it on to the leader in the asker's name. The next
			// node takes that for a forgery, or, when it is the asker itself,
			// for nonsense. The asker hears of the change and asks again.
			return
		}
		if !l.termCommitted() {
			// See serveReads.
			if len(l.heldReads) < 1024 {
				l.heldReads = append(l.heldReads, m)
			}
			return
		}
		if l.answerReader(m, term) {
			return
		}
	}
	if err := l.rn.Step(m); err != nil {
		l.cfg.Logger.Debug("raft refuses a message", "type", m.GetType().String(), "from", m.GetFrom(), "err", err)
		return
	}
	if l.leading() {
		l.contacts.note(m, l.term)
		l.noteBeat(m)
	}
}

// stepSnapshot feeds a MsgSnap to raft, which may take it up, or find that the
// log reaches as far already: then the image is of no use.
func (l *loop) stepSnapshot(it *peerItem) {
	index := it.msg.GetSnapshot().GetMetadata().GetIndex()
	if index <= l.restored {
		// A repeated or outdated message; the image may be the very one that is
		// being installed.
		it.image.Close()
		_ = l.rn.Step(it.msg)
		return
	}
	l.drain()
	// In place before raft's answer is handed out: the applier looks for it.
	l.snaps.accept(index, it.image)
	if err := l.rn.Step(it.msg); err != nil {
		l.cfg.Logger.Debug("raft refuses a snapshot", "from", it.msg.GetFrom(), "err", err)
	}
	l.drain()
	if l.restored != index {
		l.snaps.unaccept(index)
	}
}

func (l *loop) tick() error {
	if !l.lastTick.IsZero() {
		l.tickLag = max(0, l.now.Sub(l.lastTick)-l.cfg.TickInterval)
	}
	l.lastTick = l.now
	l.contacts.tick++
	for _, id := range l.in.takeUnreachable() {
		l.rn.ReportUnreachable(id)
	}
	if held := append(l.commits.tick(), l.beats.tick()...); len(held) > 0 {
		l.tr.Send(held)
	}
	l.rn.Tick()
	if l.transferTicks > 0 {
		if l.transferTicks--; l.transferTicks == 0 {
			l.transferee = 0
		}
	}
	l.expireReads()
	for _, b := range l.props.expire(l.now, l.leading(), l.term, l.cfg.AmbiguousAfter) {
		b.fail(fmt.Errorf("%w: leadership was lost and nothing was heard of the command for %v", ErrAmbiguous, l.cfg.AmbiguousAfter))
		l.props.release(b)
	}
	if err := l.checkDisk(); err != nil {
		return err
	}
	if l.sincePublish++; l.sincePublish >= l.cfg.HeartbeatTicks {
		l.sincePublish = 0
		l.publish()
	}
	return nil
}

// propose packs the waiting commands into entries, as many as may be in flight.
func (l *loop) propose() {
	if !l.leading() {
		if !l.in.hasProposals() {
			l.in.wantNextProposal()
			return
		}
		l.drain() // it may have just become leader
		if !l.leading() {
			err := l.notLeaderErr()
			for b := l.in.popBatch(); b != nil; b = l.in.popBatch() {
				b.fail(err)
				l.in.release(b)
			}
			return
		}
	}
	if l.transferTicks > 0 {
		return // raft would drop them; the ticks look again
	}
	if l.props.inFlight(l.term)+len(l.unplaced) == 0 && l.in.hasProposals() {
		if l.letOthersCome(); !l.leading() {
			l.propose() // which tells them
			return
		}
	}
	for l.props.inFlight(l.term)+len(l.unplaced) < l.cfg.MaxBatchesInFlight {
		b := l.in.popBatch()
		if b == nil {
			return
		}
		if err := l.rn.Propose(b.data); err != nil {
			// Raft has not taken it and never will. It may have stepped down for
			// something it was shown in this turn, which only its next Ready tells:
			// then another node may take the command, and "busy" would send the
			// client away instead.
			if l.drain(); !l.leading() {
				b.fail(l.notLeaderErr())
				l.in.release(b)
				l.propose() // which tells the others
				return
			}
			b.fail(fmt.Errorf("%w: %w", ErrBusy, err))
			l.in.release(b)
			continue
		}
		l.cfg.Events.BatchProposed(len(b.waiters), len(b.data))
		l.commits.batches++
		l.unplaced = append(l.unplaced, b)
	}
}

// letOthersCome lets those goroutines of this process run that wait for a
// processor, before something is begun in which all may take part that have come
// by then. The moment at which one batch is done is the one at which its callers
// are woken and others' requests wait to be read: a batch that is proposed at once
// holds few of them, and a batch costs three nodes as much as twenty commands.
//
// With idle processors it returns at once. To wait for a time instead, however
// short, costs every lone command that time, and when the processors are busy it
// says nothing of who has had his turn. One round is too few: it brings those to
// run who then wake others, of whom each needs a round.
//
// A round may take long, since a goroutine that does not wait for anything, as that of
// a compaction, runs for 10 ms before it is the next one's turn. So what raft has ready,
// heartbeats among it, leaves before, and who has waited for such a round waits for
// none in the time that follows. After it this node may no longer lead.
func (l *loop) letOthersCome() {
	const rounds, enough, spared = 4, 5 * time.Millisecond, 20
	l.drain()
	began := time.Now() // not the node's clock: nothing but this depends on it
	if began.Before(l.crowded) {
		return
	}
	for range rounds {
		l.yield()
		if took := time.Since(began); took > enough {
			l.crowded = began.Add(spared * took)
			return
		}
	}
}

// drain hands out everything raft has ready. Only the messages count: with
// asynchronous storage writes the other fields repeat what they say.
func (l *loop) drain() {
	for l.rn.HasReady() {
		rd := l.rn.Ready()
		if rd.SoftState != nil {
			l.setSoftState(rd.SoftState)
		}
		out := rd.Messages[:0]
		var votes, behind []*raftpb.Message
		for _, m := range rd.Messages {
			switch m.GetTo() {
			case raft.LocalAppendThread:
				l.routeAppend(m)
			case raft.LocalApplyThread:
				l.applyQ.push(applyItem{msg: m})
			default:
				switch m.GetType() {
				case raftpb.MsgSnap:
					l.snaps.send(m)
				case raftpb.MsgVote:
					votes = append(votes, m)
				case raftpb.MsgApp:
					if !l.commits.hold(m, l.superfluous(m)) {
						out = append(out, m)
					}
				case raftpb.MsgHeartbeat:
					if !l.holdBeat(m) {
						out = append(out, m)
					}
				case raftpb.MsgReadIndex:
					m.Term = new(l.rn.BasicStatus().GetTerm()) // see answerReader
					out = append(out, m)
				case raftpb.MsgReadIndexResp:
					if news := l.commits.takeFor(m.GetTo()); news != nil {
						behind = append(behind, news)
					}
					out = append(out, m)
				default:
					out = append(out, m)
				}
			}
		}
		if len(votes) > 0 {
			l.askForVotes(votes)
		}
		if out = append(out, behind...); len(out) > 0 {
			l.tr.Send(out)
		}
		if len(rd.ReadStates) > 0 {
			l.readStates(rd.ReadStates)
		}
		l.tellLeadership()
	}
	l.releaseHeldReads()
}

// askForVotes sends requests for votes once the candidate's own term and vote,
// which are already on their way to the log, are durable.
//
// Raft would let them leave at once: it counts the candidate's own vote only when
// that is durable. But the others' votes can be enough without it. Say A asks B
// and C in term 6, leads with their votes, and C stores A's entry X at (8, 6).
// A crashes before its disk has heard of term 6, comes back in term 5, campaigns
// for term 6 a second time, and B repeats its vote. Now A puts Y at (8, 6). C
// takes it for the entry it has, and acknowledges it: two contents of one
// committed entry.
func (l *loop) askForVotes(votes []*raftpb.Message) {
	l.appendQ.push(&raftpb.Message{
		Type: raftpb.MsgStorageAppend.Enum(), To: new(uint64(raft.LocalAppendThread)), From: new(l.cfg.ID), Responses: votes,
	})
}

func (l *loop) setSoftState(ss *raft.SoftState) {
	was := l.leading()
	l.leader, l.state = ss.Lead, ss.RaftState
	if l.leading() != was {
		l.termStart = 0
		l.contacts.begin()
		l.transferTicks, l.transferee = 0, 0
		l.commits.drop()
		l.beats.drop()
		if was {
			l.heldReads = nil // they are asked again
		}
	}
}

// routeAppend passes a storage message on and notes what it says of raft.
func (l *loop) routeAppend(m *raftpb.Message) {
	if m.Term != nil || m.Commit != nil {
		l.term, l.commit = m.GetTerm(), m.GetCommit()
		l.commitPtr.Store(l.commit)
	}
	if hasSnapshot(m) {
		meta := m.GetSnapshot().GetMetadata()
		l.restored = meta.GetIndex()
		l.confState = cloneConfState(meta.GetConfState())
	}
	if ents := m.GetEntries(); len(ents) > 0 {
		for _, e := range ents {
			if e.GetType() != raftpb.EntryNormal {
				l.lastChange = e.GetIndex()
			}
		}
		if len(l.unplaced) > 0 {
			l.place(ents)
		}
		if l.leading() && l.termStart == 0 {
			for _, e := range ents {
				if e.GetTerm() == l.term {
					l.termStart = e.GetIndex()
					break
				}
			}
		}
	}
	l.appendQ.push(m)
}

// place finds where raft put the batches proposed since the last drain: in
// these entries, in order. A batch is known by its id. A membership change was
// proposed right after a drain, so it is the first entry; raft may have put an
// empty one in its place.
func (l *loop) place(ents []*raftpb.Entry) {
	for _, e := range ents {
		if len(l.unplaced) == 0 {
			return
		}
		b := l.unplaced[0]
		if !b.conf {
			id, ok := envelopeID(e.GetData())
			if e.GetType() != raftpb.EntryNormal || !ok || id != b.id {
				continue
			}
		}
		b.index, b.term = e.GetIndex(), e.GetTerm()
		l.unplaced[0] = nil
		if l.unplaced = l.unplaced[1:]; len(l.unplaced) == 0 {
			l.unplaced = nil
		}
		if !l.props.add(b) {
			b.fail(fmt.Errorf("%w: the node is stopping", ErrAmbiguous))
		}
	}
}

// tellLeadership publishes a change of leader, term or role.
func (l *loop) tellLeadership() {
	now := Leadership{Leader: l.leader, Term: l.term, Leading: l.leading()}
	if now == l.told {
		return
	}
	l.told = now
	l.reads.reissue()
	l.publish()
	l.leaderChanged(now)
}

func (l *loop) releaseHeldReads() {
	if len(l.heldReads) == 0 || !l.leading() || !l.termCommitted() {
		return
	}
	held := l.heldReads
	l.heldReads = nil
	for _, m := range held {
		l.stepPeer(&peerItem{msg: m})
	}
	l.drain()
}

// stop resolves what the loop holds.
func (l *loop) stop() {
	for _, b := range l.unplaced {
		b.fail(fmt.Errorf("%w: the node stopped before the result was known", ErrAmbiguous))
	}
	l.unplaced = nil
	l.reads.add(l.lanes.reads, l.now)
	l.reads.stop()
	l.lanes.abandon()
	l.lanes = lanes{}
}
