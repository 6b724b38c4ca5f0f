package control

import (
	"context"
	"slices"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// A service whose lease has run out stays registered, so that its next heartbeat
// brings it back. One that never comes back would stay for ever; so the leader
// removes those that have been expired for longer than the retention.

// purgeBatch bounds the services of one command.
const purgeBatch = 256

// doomed is a service that is expired.
type doomed struct {
	revision uint64 // of the record that says so
	expired  uint64 // by the time of the state, in ms
	// due is when it is removed. It is measured with the monotonic clock from when it
	// was first seen expired: a clock of the day that jumps removes nobody.
	due time.Time
}

// purge removes services that have been expired for long, until ctx is done.
func (l *Liveness) purge(ctx context.Context, term uint64) {
	seen := make(map[string]doomed)
	for sleep(ctx, min(max(l.c.Retention/20, time.Second), time.Minute)) {
		if err := l.purgeOnce(ctx, term, seen); err != nil && ctx.Err() == nil {
			l.c.Logger.Warn("services that have been expired for long are not removed; it is tried again", "err", err)
		}
	}
}

// purgeOnce brings seen, the services that are expired, up to date, and removes those
// that have been for long.
func (l *Liveness) purgeOnce(ctx context.Context, term uint64, seen map[string]doomed) error {
	epoch, err := l.noteExpired(seen)
	if err != nil {
		return err
	}
	var due []string
	now := l.c.Now()
	for id, d := range seen {
		if !now.Before(d.due) {
			due = append(due, id)
		}
	}
	slices.Sort(due)
	for chunk := range slices.Chunk(due, purgeBatch) {
		c := &commandpb.PurgeServices{RetentionMs: uint64(l.c.Retention.Milliseconds())}
		latest := uint64(0)
		for _, id := range chunk {
			d := seen[id]
			c.Services = append(c.Services, &commandpb.ExpiredService{ServiceId: id, ExpectedRevision: d.revision})
			latest = max(latest, d.expired+c.RetentionMs)
		}
		res, err := l.c.Submit.Submit(ctx, &commandpb.Command{
			TimeMs:        max(uint64(l.c.Now().UnixMilli()), latest),
			ExpectedEpoch: &epoch, ExpectedTerm: &term,
			Op: &commandpb.Command_PurgeServices{PurgeServices: c},
		})
		if err != nil {
			return err
		}
		// What was refused or skipped has changed since, and is looked at anew.
		for _, id := range chunk {
			delete(seen, id)
		}
		if r := res.GetRejection(); r != nil {
			l.c.Logger.Debug("the state refused to remove expired services", "reason", r.Reason)
			continue
		}
		n := len(chunk) - int(res.GetStale())
		l.mu.Lock()
		l.stats.Purged += uint64(n)
		l.mu.Unlock()
		l.c.Logger.Info("services that have been expired for long are removed", "services", n, "retention", l.c.Retention)
	}
	return nil
}

// noteExpired forgets those of seen that are not expired any more and adds those that
// are since. It returns the epoch of the state it has read.
func (l *Liveness) noteExpired(seen map[string]doomed) (epoch uint64, err error) {
	gone := l.expiredServices()
	for id := range seen {
		if !gone[id] {
			delete(seen, id)
		}
	}
	v := l.c.State.View()
	defer v.Close()
	ms, err := v.Time()
	if err != nil {
		return 0, err
	}
	now := l.c.Now()
	for id := range gone {
		if _, known := seen[id]; known {
			continue
		}
		s, err := v.Service(id)
		if err != nil {
			return 0, err
		}
		if s.GetState() != commandpb.ServiceState_SERVICE_STATE_EXPIRED {
			continue
		}
		if s.SidecarId != "" {
			sc, err := v.Sidecar(s.SidecarId)
			if err != nil {
				return 0, err
			}
			if router.Offers(sc, s.Name) {
				continue // see the command
			}
		}
		at := s.ExpiredAtMs
		if at == 0 { // by a release that did not note it
			at = ms
		}
		// The time of the state is never ahead of what has passed, so nobody gets less.
		passed := time.Duration(max(0, int64(ms)-int64(at))) * time.Millisecond
		seen[id] = doomed{revision: s.ModRevision, expired: s.ExpiredAtMs, due: now.Add(max(0, l.c.Retention-passed))}
	}
	return v.Epoch(), nil
}

// expiredServices returns the services whose leases have run out. As the digest it
// looks at a part of them at a time, from the end, for heartbeats wait for it.
func (l *Liveness) expiredServices() map[string]bool {
	gone := make(map[string]bool)
	for end := -1; end != 0; {
		l.mu.Lock()
		if !l.loaded {
			l.mu.Unlock()
			return nil
		}
		order := l.services.order
		if end < 0 || end > len(order) {
			end = len(order)
		}
		begin := max(0, end-digestPart)
		for _, e := range order[begin:end] {
			if e.is == expired {
				gone[e.id] = true
			}
		}
		end = begin
		l.mu.Unlock()
	}
	return gone
}
