package raftnode

import (
	"maps"
	"slices"
	"sync"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/snap"
)

// peerItem is a message of a peer; image pins what a MsgSnap names.
type peerItem struct {
	msg   *raftpb.Message
	image *snap.Reader
	bytes int64
}

// control is a function to run on the loop. call, if any, is who waits for it:
// told that nothing was done when the node stops before.
type control struct {
	run  func(*loop)
	call *call
}

// lanes is what the loop takes in one turn.
type lanes struct {
	// local holds the answers of the appender and the applier: never dropped,
	// in order per sender.
	local []*raftpb.Message
	// ctl holds functions to run on the loop.
	ctl   []control
	peers []peerItem
	reads []*call
}

func (l *lanes) reset() {
	clear(l.local)
	clear(l.ctl)
	clear(l.peers)
	clear(l.reads)
	l.local, l.ctl, l.peers, l.reads = l.local[:0], l.ctl[:0], l.peers[:0], l.reads[:0]
}

// abandon tells those whose request will not be looked at.
func (l *lanes) abandon() {
	for _, c := range l.ctl {
		if c.call != nil {
			c.call.ch <- outcome{err: ErrStopping}
		}
	}
	for _, it := range l.peers {
		if it.image != nil {
			it.image.Close()
		}
	}
}

// inbox is everything that waits for the loop. Pushing never blocks. A push
// wakes the loop only when nothing was waiting yet: one wake covers any number
// of pushes, and the loop takes them all in one turn.
type inbox struct {
	maxCommand, maxBatch, maxWaiting int
	maxWaitingBytes, maxPeerBytes    int64
	// base is added to the sequence number of a batch: see Config.Incarnation.
	base uint64

	wake chan struct{}

	mu     sync.Mutex
	closed bool
	// signalled: the loop has been woken and has not taken the lanes since.
	signalled bool
	in        lanes
	peerBytes map[uint64]int64
	// unreachable holds peers a message to whom was lost since the last tick.
	unreachable map[uint64]struct{}

	// sealed batches are full; open takes further commands. Callers encode
	// their commands straight into it, so nothing is copied on the loop.
	sealed []*batch
	open   *batch
	free   []*batch
	// wantProposals: the loop can propose at once, so the next command wakes
	// it. While a batch is in flight it cannot, and a wake would be wasted: the
	// applier's answer wakes it when the batch is done.
	wantProposals bool
	waiting       int
	waitingBytes  int64
	nextSeq       uint64
}

func newInbox(c *Config) *inbox {
	return &inbox{
		maxCommand: c.MaxCommandBytes, maxBatch: c.MaxBatchBytes, maxWaiting: c.MaxWaiting,
		maxWaitingBytes: c.MaxWaitingBytes, maxPeerBytes: c.MaxPeerInboxBytes,
		base:          c.Incarnation,
		wake:          make(chan struct{}, 1),
		peerBytes:     map[uint64]int64{},
		unreachable:   map[uint64]struct{}{},
		wantProposals: true,
	}
}

// signalLocked returns true when the caller must send on wake after unlocking.
func (b *inbox) signalLocked() bool {
	if b.signalled {
		return false
	}
	b.signalled = true
	return true
}

func (b *inbox) send(wake bool) {
	if wake {
		select {
		case b.wake <- struct{}{}:
		default:
		}
	}
}

// pushLocal queues the answers of a storage goroutine.
func (b *inbox) pushLocal(msgs []*raftpb.Message) {
	if len(msgs) == 0 {
		return
	}
	b.mu.Lock()
	b.in.local = append(b.in.local, msgs...)
	wake := b.signalLocked()
	b.mu.Unlock()
	b.send(wake)
}

// pushControl runs f on the loop; false when the node has stopped.
func (b *inbox) pushControl(c *call, f func(*loop)) bool {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return false
	}
	b.in.ctl = append(b.in.ctl, control{f, c})
	wake := b.signalLocked()
	b.mu.Unlock()
	b.send(wake)
	return true
}

func messageBytes(m *raftpb.Message) int64 {
	n := int64(128 + len(m.GetContext()))
	for _, e := range m.Entries {
		n += int64(len(e.GetData())) + 64
	}
	return n
}

// pushPeer queues messages of peers and returns how many were dropped. Small
// messages (heartbeats, votes, acknowledgements) pass at twice the budget: they
// are what ends an overload.
func (b *inbox) pushPeer(items []peerItem) (dropped int, err error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return 0, ErrStopping
	}
	for i := range items {
		it := &items[i]
		it.bytes = messageBytes(it.msg)
		from := it.msg.GetFrom()
		limit := b.maxPeerBytes
		if len(it.msg.Entries) == 0 {
			limit *= 2
		}
		if b.peerBytes[from]+it.bytes > limit {
			dropped++
			if it.image != nil {
				it.image.Close()
			}
			continue
		}
		b.peerBytes[from] += it.bytes
		b.in.peers = append(b.in.peers, *it)
	}
	wake := len(b.in.peers) > 0 && b.signalLocked()
	b.mu.Unlock()
	b.send(wake)
	return dropped, nil
}

func (b *inbox) pushRead(c *call) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return ErrStopping
	}
	b.in.reads = append(b.in.reads, c)
	wake := b.signalLocked()
	b.mu.Unlock()
	b.send(wake)
	return nil
}

// takeReads appends the reads that wait to calls.
func (b *inbox) takeReads(calls []*call) []*call {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls = append(calls, b.in.reads...)
	clear(b.in.reads)
	b.in.reads = b.in.reads[:0]
	return calls
}

// reportUnreachable is taken up with the next tick: a sender that fails may
// report at the rate of messages.
func (b *inbox) reportUnreachable(id uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unreachable[id] = struct{}{}
}

func (b *inbox) takeUnreachable() []uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.unreachable) == 0 {
		return nil
	}
	ids := slices.Sorted(maps.Keys(b.unreachable))
	clear(b.unreachable)
	return ids
}

// bulkBytes is the size from which commands may fill only half of the room for
// those that wait. Who sends such ones (the chunks of a restore, large checkpoints)
// fills all of it with a few dozen, and everybody's small commands would be
// refused for them.
const bulkBytes = 64 * kib

// pushCommand encodes cmd into the open batch. cmd may be reused afterwards.
func (b *inbox) pushCommand(cmd []byte, w waiter) error {
	if len(cmd) > b.maxCommand {
		return ErrTooLarge
	}
	n, room := int64(len(cmd)), b.maxWaitingBytes
	if n >= bulkBytes {
		room /= 2
	}
	b.mu.Lock()
	switch {
	case b.closed:
		b.mu.Unlock()
		return ErrStopping
	case b.waiting >= b.maxWaiting, b.waitingBytes+n > room:
		b.mu.Unlock()
		return ErrBusy
	}
	if b.open != nil && len(b.open.data)+len(cmd)+5 > b.maxBatch && len(b.open.waiters) > 0 {
		b.sealed = append(b.sealed, b.open)
		b.open = nil
	}
	if b.open == nil {
		b.open = b.newBatchLocked()
	}
	b.open.data = appendCommand(b.open.data, cmd)
	b.open.waiters = append(b.open.waiters, w)
	b.open.bytes += n
	b.waiting++
	b.waitingBytes += n
	wake := b.wantProposals && b.signalLocked()
	b.wantProposals = false
	b.mu.Unlock()
	b.send(wake)
	return nil
}

func (b *inbox) newBatchLocked() *batch {
	if n := len(b.free); n > 0 {
		bt := b.free[n-1]
		b.free = b.free[:n-1]
		return bt
	}
	return &batch{data: beginEnvelope(make([]byte, 0, 4*kib))}
}

// popBatch returns the next batch to propose, or nil and then wants to be woken
// for the next command.
func (b *inbox) popBatch() *batch {
	b.mu.Lock()
	defer b.mu.Unlock()
	var bt *batch
	switch {
	case len(b.sealed) > 0:
		bt = b.sealed[0]
		b.sealed[0] = nil
		if b.sealed = b.sealed[1:]; len(b.sealed) == 0 {
			b.sealed = nil
		}
	case b.open != nil:
		bt, b.open = b.open, nil
	default:
		b.wantProposals = true
		return nil
	}
	bt.id = b.nextIDLocked()
	setEnvelopeID(bt.data, bt.id)
	return bt
}

func (b *inbox) nextIDLocked() uint64 {
	b.nextSeq++
	return b.base + b.nextSeq
}

func (b *inbox) hasProposals() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open != nil || len(b.sealed) > 0
}

// wantNextProposal makes the next command wake the loop.
func (b *inbox) wantNextProposal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wantProposals = b.open == nil && len(b.sealed) == 0
}

// release gives the room of a finished batch back and recycles it.
func (b *inbox) release(bt *batch) {
	if bt.conf {
		return // membership changes do not pass admission
	}
	const maxFree, maxKeep = 4, 2 * mib
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting -= len(bt.waiters)
	b.waitingBytes -= bt.bytes
	if len(b.free) >= maxFree || cap(bt.data) > maxKeep {
		return
	}
	clear(bt.waiters)
	*bt = batch{data: beginEnvelope(bt.data[:0]), waiters: bt.waiters[:0]}
	b.free = append(b.free, bt)
}

// swap exchanges the filled lanes for the empty ones in l.
func (b *inbox) swap(l *lanes) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.signalled = false
	b.in, *l = *l, b.in
	clear(b.peerBytes)
}

// close refuses further pushes except local answers and returns what waited.
func (b *inbox) close() (proposals []*batch, reads []*call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	proposals = b.sealed
	if b.open != nil {
		proposals = append(proposals, b.open)
	}
	reads = b.in.reads
	b.in.abandon()
	b.sealed, b.open, b.in = nil, nil, lanes{}
	return proposals, reads
}

func (b *inbox) gauges() (waiting int, waitingBytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.waiting, b.waitingBytes
}
