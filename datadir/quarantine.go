package datadir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const (
	// QuarantineName is that of the note that the state must not be used.
	QuarantineName = "QUARANTINE"
	// maxQuarantineBytes bounds the note that is read.
	maxQuarantineBytes = 1 << 20
)

// Quarantine says why the state of a data directory must not be used, and whose
// may take its place. It is written before the node stops answering for good
// and removed when the state has been replaced, so a crash in between begins
// the rebuilding again. An empty file is an operator's: this node is wrong, the
// others are right.
type Quarantine struct {
	Reason   string    `json:"reason"`
	Index    uint64    `json:"index"`
	Epoch    uint64    `json:"epoch"`
	Own      []string  `json:"own_sums,omitempty"` // hex, by table
	Expected []string  `json:"expected_sums,omitempty"`
	Agreed   []uint64  `json:"agreed_nodes,omitempty"`
	Since    time.Time `json:"since"`
}

// ReadQuarantine returns the note of dir, nil when there is none. A note that
// cannot be understood is an ErrIncomplete: the state is wrong all the same.
func ReadQuarantine(dir string) (*Quarantine, error) {
	name := filepath.Join(dir, QuarantineName)
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read whether the state may be used: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxQuarantineBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	q := &Quarantine{}
	if len(raw) == 0 {
		q.Reason = "an operator left an empty file " + QuarantineName + " in the data directory"
		return q, nil
	}
	if len(raw) > maxQuarantineBytes {
		err = fmt.Errorf("it has more than %d bytes", maxQuarantineBytes)
	} else {
		err = json.Unmarshal(raw, q)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged (%w): the state here is wrong, and it is not known whose is right; "+
			"replace it by an empty file if all other nodes are", ErrIncomplete, name, err)
	}
	return q, nil
}

// WriteQuarantine puts the note into dir, durably.
func WriteQuarantine(dir string, q *Quarantine) error {
	raw, err := json.MarshalIndent(q, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", QuarantineName, err)
	}
	if err := WriteFile(filepath.Join(dir, QuarantineName), append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", QuarantineName, err)
	}
	return nil
}

// RemoveQuarantine makes the state of dir one to be used again, durably.
func RemoveQuarantine(dir string) error {
	if err := os.Remove(filepath.Join(dir, QuarantineName)); err != nil {
		return fmt.Errorf("remove %s: %w", QuarantineName, err)
	}
	return SyncDir(dir)
}
