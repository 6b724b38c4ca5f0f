package raftnode

import (
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/raft/v3"

	"conveyor.etl/router/wal"
)

// truncator keeps the readable log short. It only drops what the state machine
// holds durably: the log is what a crash is recovered from.
type truncator struct {
	cfg   *Config
	sm    StateMachine
	log   Log
	snaps *snapshots
	conf  func() Position
	// follower returns the lowest index a live follower still lacks entries
	// after, math.MaxUint64 when there is none.
	follower *atomic.Uint64
	// acked is the applied index raft knows of, which trails the real one.
	acked *atomic.Uint64

	wake chan struct{}
	// held is the size at which a truncation was last held up entirely; until
	// the log has grown by a part of TailBytes it is not tried again.
	held atomic.Int64
}

// due reports whether the log is long enough to be worth a truncation.
func (t *truncator) due() bool {
	bytes := t.log.Bytes()
	if bytes <= t.cfg.TailBytes {
		t.held.Store(0)
		if !t.tooMany() {
			return false
		}
	}
	return bytes >= t.held.Load()
}

func (t *truncator) tooMany() bool {
	first, err1 := t.log.FirstIndex()
	last, err2 := t.log.LastIndex()
	return err1 == nil && err2 == nil && last+1-first > t.cfg.MaxTailEntries
}

// poke is called by the applier.
func (t *truncator) poke() {
	if t.due() {
		signal(t.wake)
	}
}

// step truncates the log once if that is due. Any error is final.
func (t *truncator) step(now time.Time) (bool, error) {
	if !t.due() {
		return false, nil
	}
	bytes := t.log.Bytes()
	upTo, err := t.target(bytes, now)
	if err != nil {
		return false, err
	}
	first, err := t.log.FirstIndex()
	if err != nil {
		return false, err
	}
	if upTo >= first {
		durable := t.sm.Durable()
		if durable < upTo {
			if durable, err = t.sm.Flush(); errors.Is(err, syscall.ENOSPC) {
				// The state goes on in memory and is replayed from the log, whose
				// file has room still; deletes may yet free some.
				t.cfg.Logger.Error("the disk is full: the log cannot be truncated until there is space again", "err", err)
				t.held.Store(bytes + max(1, t.cfg.TailBytes/8))
				return false, nil
			} else if err != nil {
				return false, fmt.Errorf("raftnode: flush the state before truncating the log: %w", err)
			}
		}
		upTo = min(upTo, durable)
	}
	if upTo < first {
		t.held.Store(bytes + max(1, t.cfg.TailBytes/8))
		return false, nil
	}
	if err := t.log.Compact(upTo, t.conf().ConfState); err != nil {
		if errors.Is(err, raft.ErrCompacted) {
			return false, nil // a snapshot was installed meanwhile
		}
		if !errors.Is(err, wal.ErrFailed) && !errors.Is(err, wal.ErrRefused) {
			// The log is well; files it no longer needs could not be removed.
			t.cfg.Logger.Warn("cannot remove old parts of the log", "err", err)
			t.held.Store(bytes + max(1, t.cfg.TailBytes/8))
			return false, nil
		}
		return false, fmt.Errorf("raftnode: truncate the log at %d: %w", upTo, err)
	}
	t.cfg.Events.LogTruncated(upTo)
	return true, nil
}

// target returns the index up to which entries should go: all but TrailingBytes,
// nothing that is not applied, nothing a pin or a follower needs while the log
// is short enough to afford that.
func (t *truncator) target(bytes int64, now time.Time) (uint64, error) {
	first, err := t.log.FirstIndex()
	if err != nil {
		return 0, err
	}
	last, err := t.log.LastIndex()
	if err != nil {
		return 0, err
	}
	// Raft looks at the log from its own applied index on (it panics if that is
	// gone), so what is applied but not yet reported stays.
	limit := min(t.conf().Index, t.acked.Load(), last)
	if pin, ok := t.snaps.pinned(now); ok && bytes <= t.cfg.PinnedTailBytes {
		limit = min(limit, pin)
	}
	// A follower whose next entry is gone already is not helped by waiting.
	if f := t.follower.Load(); f != math.MaxUint64 && f+1 >= first && bytes <= t.cfg.FollowerTailBytes {
		limit = min(limit, f)
	}
	excess := bytes - t.cfg.TrailingBytes
	minKeep := t.cfg.MaxTailEntries / 2
	i := first
	for i <= limit {
		ents, err := t.log.Entries(i, limit+1, 1*mib)
		if errors.Is(err, raft.ErrCompacted) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		for _, e := range ents {
			if excess <= 0 && last-i < minKeep {
				return i - 1, nil
			}
			excess -= int64(len(e.GetData())) + 128
			i++
		}
	}
	return i - 1, nil
}
