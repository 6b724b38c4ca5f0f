package rpc

import (
	"sync"

	"go.etcd.io/raft/v3/raftpb"
)

// peerQueue holds messages that wait for one stream to one peer. It is bounded
// in bytes: a bound on the count would let a few hundred large entries take all
// memory while the peer is away.
type peerQueue struct {
	limit int64
	// wake has room for one token: there is something to take.
	wake chan struct{}

	mu sync.Mutex
	// msgs wait; spare is the slice that take returned last.
	msgs  []*raftpb.Message
	spare []*raftpb.Message
	// bytes counts msgs and what was taken and not yet released.
	// Invariant: bytes <= limit, or a single message makes it up.
	bytes   int64
	dropped uint64
}

func newPeerQueue(limit int64) *peerQueue {
	return &peerQueue{limit: limit, wake: make(chan struct{}, 1)}
}

// push appends m, or drops it and returns false when the queue is full. It
// never blocks.
func (q *peerQueue) push(m *raftpb.Message) bool {
	size := messageBytes(m)
	q.mu.Lock()
	if q.bytes > 0 && q.bytes+size > q.limit {
		q.dropped++
		q.mu.Unlock()
		return false
	}
	q.msgs = append(q.msgs, m)
	q.bytes += size
	first := len(q.msgs) == 1
	q.mu.Unlock()
	if first {
		// Only the first message wakes the sender: it takes all that is there.
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// take returns everything that waits, nil when nothing does. The messages count
// against the limit until release. The slice is the caller's until the next
// call of take, so there is one consumer at a time.
func (q *peerQueue) take() []*raftpb.Message {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.msgs) == 0 {
		return nil
	}
	taken := q.msgs
	q.msgs, q.spare = q.spare[:0], taken
	return taken
}

// release takes messages that were sent, or given up, off the limit. It clears
// msgs so that the queue does not keep them in memory.
func (q *peerQueue) release(msgs []*raftpb.Message, sent bool) {
	var size int64
	for i, m := range msgs {
		size += messageBytes(m)
		msgs[i] = nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.bytes -= size
	if !sent {
		q.dropped += uint64(len(msgs))
	}
}

// drop gives up everything that waits and returns how many that were.
func (q *peerQueue) drop() int {
	msgs := q.take()
	q.release(msgs, false)
	return len(msgs)
}

// stats returns the bytes held and the number of messages dropped so far.
func (q *peerQueue) stats() (bytes int64, dropped uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes, q.dropped
}

// messageBytes estimates what m holds in memory and on the wire. It is exact
// enough for limits and far cheaper than proto.Size.
func messageBytes(m *raftpb.Message) int64 {
	size := int64(64 + len(m.Context))
	for _, e := range m.Entries {
		size += int64(32 + len(e.Data))
	}
	if m.Snapshot != nil {
		size += int64(len(m.Snapshot.Data))
	}
	return size
}
