package raftnode

import (
	"context"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/snap"
)

// Transport carries raft messages between members, best effort.
type Transport interface {
	// Send queues msgs for their targets (Message.To). It never blocks: a
	// message that finds its peer's queue full or its peer unknown is dropped
	// and the peer reported through Node.ReportUnreachable. Messages of one
	// sender to one target stay in order. The messages are shared with the
	// log and must not be modified.
	Send(msgs []*raftpb.Message)

	// SendImage streams the image to peer m.To, resuming where an earlier
	// attempt with the same image stopped, and then delivers m (a MsgSnap whose
	// Snapshot.Data is the image id). It blocks until the peer has stored and
	// verified the image, ctx is done or the peer fails. An error that matches
	// ErrImageHeld is asked for so often that it is passed over in silence.
	SendImage(ctx context.Context, m *raftpb.Message, image *snap.Reader) error

	// SetMembers replaces the set of peers to talk to. Those marked Removed are
	// not to be talked to, now and later. It does not block.
	SetMembers(members []Member)
}
