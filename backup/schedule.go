package backup

import (
	"errors"
	"fmt"
	"hash/fnv"
	"time"
)

const (
	// minEvery keeps a schedule from making backups faster than they are
	// stored.
	minEvery = time.Minute
	maxEvery = 366 * 24 * time.Hour
	maxKeep  = 10_000
	// retryFirst and retryMost bound the wait behind a backup that failed.
	retryFirst = time.Minute
	retryMost  = time.Hour
)

// Schedule says when backups are made, where they go and how many are kept.
// The zero value makes none.
type Schedule struct {
	Every time.Duration
	// Dest is a location, see ParseLocation.
	Dest string
	// Keep is how many are kept there; 0 keeps all.
	Keep int
}

// Enabled reports whether s makes backups at all.
func (s Schedule) Enabled() bool { return s.Every != 0 || s.Dest != "" || s.Keep != 0 }

// Validate reports every fault of s at once. A schedule that is not enabled has
// none.
func (s Schedule) Validate() error {
	if !s.Enabled() {
		return nil
	}
	var errs []error
	if s.Every < minEvery || s.Every > maxEvery {
		errs = append(errs, fmt.Errorf("backup: a backup every %s: must be between %s and %s", s.Every, minEvery, maxEvery))
	}
	if _, err := ParseLocation(s.Dest); err != nil {
		errs = append(errs, err)
	}
	if s.Keep < 0 || s.Keep > maxKeep {
		errs = append(errs, fmt.Errorf("backup: cannot keep %d backups: must be between 0 (all) and %d", s.Keep, maxKeep))
	}
	return errors.Join(errs...)
}

// Jitter returns how far a cluster's backups are shifted, less than a tenth of
// Every: clusters that share a store and a schedule do not all write to it at
// the same moment, and each keeps its time from one leader to the next.
func (s Schedule) Jitter(clusterID string) time.Duration {
	window := s.Every / 10
	if window <= 0 {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(clusterID)) // never fails
	return time.Duration(h.Sum64() % uint64(window))
}

// History is what a leader knows of the backups before.
type History struct {
	// Last is when the newest stored backup was made; zero when there is none.
	Last time.Time
	// Failed is when the newest attempt failed, zero when none did since Last;
	// Failures counts them.
	Failed   time.Time
	Failures int
}

// Next returns when the next backup is due; a time that is not after now means
// at once. It is a function of its arguments alone, so a new leader comes to
// the answer of the old one.
//
// Times lie on a grid of Every, shifted by jitter, and not at Last plus Every:
// backups that take a while would drift through the day. A time that was missed
// is made up for once. Without any backup, the first is due now. Behind a
// failure the wait doubles from a minute to an hour, and never goes beyond the
// next time of the grid.
func (s Schedule) Next(now time.Time, h History, jitter time.Duration) time.Time {
	due := now
	if !h.Last.IsZero() {
		last := h.Last
		if last.After(now) {
			// The clock was ahead, or is behind: better one too many.
			last = now
		}
		due = s.slot(last, jitter)
		// A backup made just before its time (by another leader's clock, or by
		// hand) is as good as the one that would follow at once.
		if due.Sub(last) < s.Every/10 {
			due = due.Add(s.Every)
		}
	}
	if h.Failures > 0 && h.Failed.After(h.Last) {
		wait := retryMost
		if n := h.Failures - 1; n < 6 {
			wait = min(retryFirst<<n, retryMost)
		}
		failed := h.Failed
		if failed.After(now) {
			failed = now
		}
		retry := failed.Add(wait)
		if next := s.slot(failed, jitter); next.Before(retry) {
			retry = next
		}
		if retry.After(due) {
			due = retry
		}
	}
	return due
}

// slot returns the first time of the grid after t.
func (s Schedule) slot(t time.Time, jitter time.Duration) time.Time {
	return t.Add(-jitter).Truncate(s.Every).Add(s.Every).Add(jitter)
}
