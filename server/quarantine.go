package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"conveyor.etl/router/control"
	"conveyor.etl/router/router"
)

const (
	quarantineName = "QUARANTINE"
	// maxQuarantineBytes bounds the file that is read.
	maxQuarantineBytes = 1 << 20
)

// quarantine says why the state of a data directory must not be used, and whose
// may take its place. It is written before the node stops answering for good
// and removed when the state has been replaced, so a crash in between begins
// the rebuilding again. An empty file is an operator's: this node is wrong, the
// others are right.
type quarantine struct {
	Reason   string    `json:"reason"`
	Index    uint64    `json:"index"`
	Epoch    uint64    `json:"epoch"`
	Own      []string  `json:"own_sums,omitempty"` // hex, by table
	Expected []string  `json:"expected_sums,omitempty"`
	Agreed   []uint64  `json:"agreed_nodes,omitempty"`
	Since    time.Time `json:"since"`
}

// readQuarantine returns that of dir, nil when there is none.
func readQuarantine(dir string) (*quarantine, error) {
	name := filepath.Join(dir, quarantineName)
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
	q := &quarantine{}
	if len(raw) == 0 {
		q.Reason = "an operator left an empty file " + quarantineName + " in the data directory"
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

func writeQuarantine(dir string, q *quarantine) error {
	raw, err := json.MarshalIndent(q, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", quarantineName, err)
	}
	tmp := filepath.Join(dir, quarantineName+".tmp")
	if err := writeSynced(tmp, append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", quarantineName, err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, quarantineName)); err != nil {
		return fmt.Errorf("write %s: %w", quarantineName, err)
	}
	return syncDir(dir)
}

// removeQuarantine makes the state of dir one to be used again, durably.
func removeQuarantine(dir string) error {
	if err := os.Remove(filepath.Join(dir, quarantineName)); err != nil {
		return fmt.Errorf("remove %s: %w", quarantineName, err)
	}
	return syncDir(dir)
}

// suspect looks into the word of another node that the state here is not that of
// the majority. It returns once nothing is answered from it any more, or why it
// is.
func (s *Server) suspect(ctx context.Context, from uint64, expected router.Sums, reason string) (bool, string) {
	if len(expected.Sums) == 0 {
		// Nobody knows who is right. Only the leader may say so: it says it
		// again as long as it is so.
		if s.node.Leadership().Leader != from {
			return false, fmt.Sprintf("node %d does not follow node %d", s.c.NodeID, from)
		}
		s.gate.Hold(reason, 3*s.c.Check.Interval+2*time.Second)
		return true, ""
	}
	f, differs, why := s.control.checker.Verify(ctx, expected)
	if !differs {
		s.log.Warn("another node says that the state here is wrong; it is not", "event", "suspected", "peer", from, "says", reason, "why", why)
		return false, why
	}
	s.isolate(f)
	s.quarantined.Do(func() { close(s.rebuilds) })
	return true, ""
}

// divergedLeader is suspect for a node that leads and found out by itself. It
// hands over first, to a node that is known to be right.
func (s *Server) divergedLeader(ctx context.Context, f control.Finding) {
	s.isolate(f)
	for _, id := range f.Agreed {
		handover, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*s.c.Raft.ElectionTimeout)
		err := s.node.TransferLeader(handover, id)
		cancel()
		if err == nil {
			break
		}
		s.log.Warn("the leadership could not be handed over", "event", "handover_failed", "peer", id, "err", err)
	}
	// Whoever leads now: this node stops, which ends its leadership as well.
	s.quarantined.Do(func() { close(s.rebuilds) })
}

// isolate ends every answer from the state of this node, for good, and writes
// down why.
func (s *Server) isolate(f control.Finding) {
	s.isolated.Do(func() { s.isolateOnce(f) })
}

func (s *Server) isolateOnce(f control.Finding) {
	s.gate.Quarantine(f.Reason)
	s.log.Error("the state of this node is wrong: nothing is answered from it any more, it is going to be rebuilt", "event", "quarantined",
		"index", f.Expected.Index, "epoch", f.Expected.Epoch, "own", hexSums(f.Own.Sums), "expected", hexSums(f.Expected.Sums), "agreed", f.Agreed)
	err := writeQuarantine(s.c.DataDir, &quarantine{
		Reason: f.Reason, Index: f.Expected.Index, Epoch: f.Expected.Epoch, Own: hexSums(f.Own.Sums), Expected: hexSums(f.Expected.Sums),
		Agreed: f.Agreed, Since: s.o.Now().UTC().Truncate(time.Second),
	})
	if err != nil {
		// Without the word on disk a restart would answer from the wrong state.
		s.fail(fmt.Errorf("the state of this node is wrong, which could not be written down: %w", err))
	}
}

func hexSums(sums []uint64) []string {
	out := make([]string, len(sums))
	for i, v := range sums {
		out[i] = fmt.Sprintf("%016x", v)
	}
	return out
}

// Quarantined returns a channel that is closed when the state of this node was
// found to be wrong. Stop it then and start another Server on the data
// directory, which rebuilds the state before it answers.
func (s *Server) Quarantined() <-chan struct{} { return s.rebuilds }
