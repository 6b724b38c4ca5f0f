package backup

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// incompleteAge is when an upload without a description is taken for given up.
// None takes as long.
const incompleteAge = 24 * time.Hour

// Cleaning is what a cleanup does.
type Cleaning struct {
	// Expired are the backups beyond the number to be kept, the newest first.
	Expired []Metadata
	// Abandoned are uploads that were not finished within a day.
	Abandoned []Broken
	// Kept are the others; Skipped cannot be used and were left alone, for a
	// person to look at or because they are still being uploaded.
	Kept    []Metadata
	Skipped []Broken
}

// PlanCleanup says what Cleanup would do and changes nothing.
func (s *Store) PlanCleanup(ctx context.Context, keep int) (Cleaning, error) {
	if keep < 1 {
		return Cleaning{}, fmt.Errorf("backup: cannot keep %d backups; keep at least 1, delete the last one by its id", keep)
	}
	l, err := s.List(ctx)
	if err != nil {
		return Cleaning{}, err
	}
	return plan(l, keep, s.now()), nil
}

func plan(l Listing, keep int, now time.Time) Cleaning {
	n := min(keep, len(l.Backups))
	c := Cleaning{Kept: l.Backups[:n], Expired: l.Backups[n:]}
	for _, b := range l.Broken {
		if errors.Is(b.Err, ErrIncomplete) && now.Sub(b.Modified) > incompleteAge {
			c.Abandoned = append(c.Abandoned, b)
		} else {
			c.Skipped = append(c.Skipped, b)
		}
	}
	return c
}

// Cleanup keeps the newest keep backups, at least 1, and deletes the others,
// oldest first, and uploads that were not finished within a day. It tries them
// all; what it returns holds those that are gone, also with an error.
func (s *Store) Cleanup(ctx context.Context, keep int) (Cleaning, error) {
	c, err := s.PlanCleanup(ctx, keep)
	if err != nil {
		return c, err
	}
	return s.CarryOut(ctx, c)
}

// CarryOut deletes what a plan says, for callers who have asked a person
// first. See Cleanup.
func (s *Store) CarryOut(ctx context.Context, c Cleaning) (Cleaning, error) {
	var errs []error
	gone := func(id string) bool {
		err := s.Delete(ctx, id)
		if errors.Is(err, ErrNotFound) {
			return true
		}
		if err != nil {
			errs = append(errs, err)
		}
		return err == nil
	}
	done := Cleaning{Kept: c.Kept, Skipped: c.Skipped}
	for i := len(c.Expired) - 1; i >= 0; i-- {
		if gone(c.Expired[i].BackupID) {
			done.Expired = append([]Metadata{c.Expired[i]}, done.Expired...)
		}
	}
	for _, b := range c.Abandoned {
		if gone(b.ID) {
			done.Abandoned = append(done.Abandoned, b)
		}
	}
	return done, errors.Join(errs...)
}
