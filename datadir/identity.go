package datadir

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cespare/xxhash/v2"
)

// FormatVersion is that of the data directory as a whole. A change that an older
// binary would misread raises it. 2 added disk ids and removal.
const FormatVersion = 2

// Identity says whose data a data directory holds. It is written before
// anything else; only Initialized and Removed change, once.
type Identity struct {
	FormatVersion int       `json:"format_version"`
	ClusterID     uint64    `json:"cluster_id,string"`
	ClusterName   string    `json:"cluster_name"`
	NodeID        uint64    `json:"node_id"`
	Members       []uint64  `json:"initial_members"`
	CreatedAt     time.Time `json:"created_at"`
	// DiskID is random, drawn when the directory was made, never zero. The other
	// nodes know this one by it: one that comes back with another has lost its
	// promises. Releases before it leave it out; it is drawn at the next start.
	DiskID uint64 `json:"disk_id,string,omitempty"`
	// Initialized: the log and the state have been created. From then on a
	// missing log is a loss, not a first start: beginning a new one would let the
	// node vote against promises it does not remember.
	Initialized bool `json:"initialized"`
	// RaftAddr is what a first member of a cluster told its peers at its first
	// start; those who join are known by the membership.
	RaftAddr string `json:"raft_addr,omitempty"`
	// Removed: the node was taken out of its cluster, for good.
	Removed bool `json:"removed,omitempty"`
}

// ClusterID derives the id all first members of a cluster agree on without
// having talked to each other. Addresses are no part of it: nodes may know each
// other by different ones.
func ClusterID(name string, members []uint64) uint64 {
	var b []byte
	b = fmt.Appendf(b, "conveyor cluster %q of", name)
	for _, id := range members {
		b = fmt.Appendf(b, " %d", id)
	}
	return NonZero(xxhash.Sum64(b))
}

// NonZero returns id, or 1 for zero, which means "no cluster" on the wire.
func NonZero(id uint64) uint64 {
	if id != 0 {
		return id
	}
	return 1
}

// ReadIdentity reads whose data dir holds. Its errors match fs.ErrNotExist when
// the file is missing, ErrNewer or ErrIncomplete otherwise.
func ReadIdentity(dir string) (Identity, error) {
	name := filepath.Join(dir, IdentityName)
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, fmt.Errorf("%s is no data directory: it has no %s file: %w", dir, IdentityName, err)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("read whose data directory this is: %w", err)
	}
	var version struct {
		FormatVersion int `json:"format_version"`
	}
	if err := json.Unmarshal(raw, &version); err != nil || version.FormatVersion < 1 {
		return Identity{}, fmt.Errorf("%w: %s is unreadable, so it is not known whose data this is; "+
			"restore the file, or move the directory away and let the node join afresh", ErrIncomplete, name)
	}
	if version.FormatVersion > FormatVersion {
		return Identity{}, fmt.Errorf("%w: %s has format %d, this binary knows up to %d; start the newer binary",
			ErrNewer, dir, version.FormatVersion, FormatVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var have Identity
	if err := dec.Decode(&have); err != nil || have.NodeID == 0 || have.ClusterID == 0 {
		return Identity{}, fmt.Errorf("%w: %s is damaged (%v); "+
			"restore the file, or move the directory away and let the node join afresh", ErrIncomplete, name, err)
	}
	return have, nil
}

// WriteIdentity makes id the identity of dir, durably.
func WriteIdentity(dir string, id Identity) error {
	raw, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", IdentityName, err)
	}
	if err := WriteFile(filepath.Join(dir, IdentityName), append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", IdentityName, err)
	}
	return nil
}
