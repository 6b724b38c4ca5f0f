package wal

import (
	"encoding/json"
	"fmt"

	"go.etcd.io/raft/v3/raftpb"
)

// format is the number of the on-disk format this program writes. It is raised
// when an older program would misread a newer log.
const format = 1

// Identity names the owner of a log. It is written into every segment.
type Identity struct {
	ClusterID uint64
	NodeID    uint64
}

// Start is the position a new log begins after: the first entry will have
// Index+1. The zero Start makes an empty log for a node that will be brought up
// by a snapshot of its peers.
type Start struct {
	Index     uint64
	Term      uint64
	ConfState *raftpb.ConfState
}

type metadata struct {
	Format    int    `json:"format"`
	ClusterID uint64 `json:"cluster_id"`
	NodeID    uint64 `json:"node_id"`
}

func encodeMetadata(id Identity) []byte {
	b, err := json.Marshal(metadata{Format: format, ClusterID: id.ClusterID, NodeID: id.NodeID})
	if err != nil {
		panic(err) // three integers always marshal
	}
	return b
}

func decodeMetadata(b []byte) (Identity, error) {
	var m metadata
	if err := json.Unmarshal(b, &m); err != nil {
		return Identity{}, fmt.Errorf("its metadata is not ours: %w", err)
	}
	if m.Format > format {
		return Identity{}, fmt.Errorf("%w (format %d, known up to %d)", ErrNewerFormat, m.Format, format)
	}
	if m.Format < 1 {
		return Identity{}, fmt.Errorf("its metadata names no format: %q", b)
	}
	return Identity{ClusterID: m.ClusterID, NodeID: m.NodeID}, nil
}

func (s Start) validate() error {
	if s.Index == 0 {
		if s.Term != 0 {
			return fmt.Errorf("wal: a start at index 0 has term 0, not %d", s.Term)
		}
		return nil
	}
	if s.Term == 0 || s.ConfState == nil {
		return fmt.Errorf("wal: a start at index %d needs a term and a ConfState", s.Index)
	}
	return nil
}
