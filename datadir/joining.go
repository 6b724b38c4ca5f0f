package datadir

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// JoiningName is the file that is there while a node joins a cluster.
const JoiningName = "JOINING"

// Joining is what a node remembers while it joins, from before it asks until its
// directory is that of a member. There is no Identity meanwhile, and what log and
// state there are is worth nothing: nothing was promised yet.
type Joining struct {
	// DiskID is the one of the directory to be; with it a repeated request is
	// known for one.
	DiskID uint64 `json:"disk_id,string"`
	// NodeID is zero until the cluster has chosen one.
	NodeID uint64 `json:"node_id"`
	// Rejoin: a member whose directory was lost comes back under its id.
	Rejoin bool `json:"rejoin,omitempty"`
	// ReadReplica: it stays a learner.
	ReadReplica bool `json:"read_replica,omitempty"`
	// Members are the client addresses of nodes to ask.
	Members []string `json:"members"`
}

// NewDiskID draws the id of a directory.
func NewDiskID() (uint64, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("draw the id of a data directory: %w", err)
	}
	return NonZero(binary.LittleEndian.Uint64(b[:])), nil
}

// ReadJoining reads what dir remembers of a join; false when there is none.
func ReadJoining(dir string) (Joining, bool, error) {
	var j Joining
	name := filepath.Join(dir, JoiningName)
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return j, false, nil
	}
	if err != nil {
		return j, false, fmt.Errorf("read how far joining was: %w", err)
	}
	if err := json.Unmarshal(raw, &j); err != nil || j.DiskID == 0 {
		return j, false, fmt.Errorf("%w: %s is damaged (%v); the node had not joined yet: empty the directory and start it again",
			ErrIncomplete, name, err)
	}
	return j, true, nil
}

// WriteJoining remembers j, durably.
func WriteJoining(dir string, j Joining) error {
	raw, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", JoiningName, err)
	}
	if err := WriteFile(filepath.Join(dir, JoiningName), append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", JoiningName, err)
	}
	return nil
}

// RemoveJoining forgets the join, durably. It is no error when there is none.
func RemoveJoining(dir string) error {
	if err := os.Remove(filepath.Join(dir, JoiningName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return SyncDir(dir)
}
