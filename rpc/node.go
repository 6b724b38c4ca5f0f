package rpc

import (
	"context"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/snap"
)

// ProposeNode is what a Forwarder needs of a raft node.
type ProposeNode interface {
	// ProposeFunc replicates cmd and calls done exactly once; cmd may be
	// reused when it returns.
	ProposeFunc(cmd []byte, done func(raftnode.Result, error))
	Leadership() raftnode.Leadership
	// Changed returns a channel that is closed at the next change of
	// leadership.
	Changed() <-chan struct{}
}

// PeerNode is what a PeerServer needs of a raft node.
type PeerNode interface {
	ProposeNode
	Step(ctx context.Context, msgs []*raftpb.Message) error
	Images() *snap.Store
}

// Node is what this package needs of a raft node in all.
type Node interface {
	ReadNode
	PeerNode
	UnreachableReporter
}

var _ Node = (*raftnode.Node)(nil)
