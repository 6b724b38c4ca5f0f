package control

import (
	"context"
	"sync"
	"time"

	"conveyor.etl/router/router/commandpb"
)

// LivenessStats are numbers for metrics. What is of leases is zero while another
// node leads.
type LivenessStats struct {
	Sidecars, Services LeaseStats
	// Transitions counts those that were replicated by this node, by what they
	// made of the holder.
	Revived, Suspected, Expired uint64
	// Purged counts the services that were removed since they had been expired for
	// long.
	Purged uint64
	// Unconfirmed counts sweeps whose decisions were dropped because no quorum
	// said that this node still leads, HeldUp how often this node found that it
	// had been stopped or starved.
	Unconfirmed, HeldUp uint64
	// DigestsSent counts those all nodes got, DigestsFailed those some did not,
	// DigestsTaken those of other leaders, DigestsUsed those a reign began with.
	DigestsSent, DigestsFailed, DigestsTaken, DigestsUsed uint64
}

// LeaseStats counts leases by what is known of their holders.
type LeaseStats struct {
	// Present are alive or suspect, Silent are suspect and were not heard of
	// since, Held should expire and are held back, Expired are gone.
	Present, Silent, Held, Expired int
}

func (l *leases) stats() LeaseStats {
	return LeaseStats{Present: l.present, Silent: l.silent, Held: l.due, Expired: len(l.all) - l.present}
}

// Stats returns the numbers of this moment.
func (l *Liveness) Stats() LivenessStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.stats
	if l.leading {
		out.Sidecars, out.Services = l.sidecars.stats(), l.services.stats()
	}
	return out
}

// judge sweeps the leases until ctx is done.
func (l *Liveness) judge(ctx context.Context, term uint64, flying *sync.WaitGroup) {
	w := watch{l: l, tick: time.NewTicker(l.c.Sweep), last: l.c.Now()}
	defer w.tick.Stop()
	p := proposer{l: l, term: term, watch: &w, flying: flying, slots: make(chan struct{}, l.c.InFlight)}
	var alarmed [2]bool
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.tick.C:
		case <-l.wake:
		}
		l.mu.Lock()
		now, _ := w.lookLocked()
		sidecars, services := l.sidecars.sweep(now), l.services.sweep(now)
		held := [2]int{l.sidecars.due, l.services.due}
		l.mu.Unlock()
		for i, kind := range []string{"sidecars", "services"} {
			if (held[i] > 0) != alarmed[i] {
				alarmed[i] = held[i] > 0
				if alarmed[i] {
					l.c.Logger.Error("too many leases run out at once; holding them back", "what", kind, "held", held[i], "for", l.c.MassHold)
				} else {
					l.c.Logger.Info("no leases are held back any more", "what", kind)
				}
			}
		}
		bad := p.send(ctx, "sidecar", sidecars, isBack)
		bad = p.send(ctx, "service", services, isBack) || bad
		if !bad {
			continue
		}
		// Who was silent here may have been heard of by a leader that took this
		// one's place while it slept. A quorum that follows it after the leases
		// ran out says that there was none.
		if ok, held := w.confirmed(ctx, term); ok && !held {
			p.send(ctx, "sidecar", sidecars, isJudged)
			p.send(ctx, "service", services, isJudged)
		} else {
			l.withdraw(sidecars, services)
			if !ok && ctx.Err() == nil {
				l.c.Logger.Warn("nobody is given up: no majority confirms that this node leads")
			}
		}
	}
}

// watch looks at the clock again and again while judge works. Waiting is no
// absence, and takes as long as it takes: heartbeats are heard all the same. Only
// a process that does not get to look was away, wherever in its work that was.
// Looking only before and after a wait would take one for the other.
type watch struct {
	l    *Liveness
	tick *time.Ticker
	last time.Time // of the last look
}

// look excuses an absence since the last look, and reports whether there was one.
func (w *watch) look() (heldUp bool) {
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	_, heldUp = w.lookLocked()
	return heldUp
}

func (w *watch) lookLocked() (now time.Time, heldUp bool) {
	now = w.l.c.Now()
	heldUp = w.l.excuseLocked(w.last, now)
	w.last = now
	return now, heldUp
}

// confirmed is confirmed for who keeps watch, and reports whether this node was
// held up meanwhile. It takes no longer than a heartbeat interval.
func (w *watch) confirmed(ctx context.Context, term uint64) (ok, heldUp bool) {
	said := make(chan bool, 1)
	go func() { said <- confirmed(ctx, w.l.c.Node, term, w.l.c.Beat) }()
	for {
		select {
		case ok = <-said:
			return ok, w.look() || heldUp
		case <-w.tick.C:
			heldUp = w.look() || heldUp
		}
	}
}

// excuseLocked looks whether this node was stopped or starved for longer than a
// heartbeat interval between last and now. It could hear nobody in that time,
// so the silence is its own: leases go on where they were, and nobody is judged
// before everybody has had the time to beat.
func (l *Liveness) excuseLocked(last, now time.Time) (heldUp bool) {
	// The clock leases are measured with may have stood still while the machine
	// slept; that of the day has not. If it was only set, the pause does no harm.
	gap, wall := now.Sub(last), now.Round(0).Sub(last.Round(0))
	if max(gap, wall) <= l.c.Beat+l.c.Sweep {
		return false
	}
	for _, t := range []*leases{l.sidecars, l.services} {
		t.shift(now, max(gap, 0))
		t.pause(now, l.c.Period)
	}
	l.stats.HeldUp++
	l.c.Logger.Warn("liveness was held up; all leases are extended", "by", max(gap, wall), "nobody_is_judged_for", l.c.Period)
	return true
}

// withdraw takes back decisions that were not sent.
func (l *Liveness) withdraw(sidecars, services []transition) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stats.Unconfirmed++
	for _, t := range sidecars {
		if isJudged(t) {
			l.sidecars.done(t.id)
		}
	}
	for _, t := range services {
		if isJudged(t) {
			l.services.done(t.id)
		}
	}
}

func isBack(t transition) bool   { return t.to == alive }
func isJudged(t transition) bool { return t.to != alive }

// proposer sends transitions of one reign on their way.
type proposer struct {
	l      *Liveness
	term   uint64
	watch  *watch
	flying *sync.WaitGroup
	slots  chan struct{}
}

// send proposes those of ts that which picks, and reports whether it left any.
func (p *proposer) send(ctx context.Context, kind string, ts []transition, which func(transition) bool) (left bool) {
	for _, t := range ts {
		if !which(t) {
			left = true
			continue
		}
		if !p.room(ctx) {
			return left // the leases end with the reign
		}
		p.propose(ctx, kind, t)
	}
	return left
}

// room takes a slot; false when ctx is done first.
func (p *proposer) room(ctx context.Context) bool {
	for {
		select {
		case p.slots <- struct{}{}:
			return true
		case <-p.watch.tick.C:
			// An absence extends the leases, and propose then drops what was
			// decided about them.
			p.watch.look()
		case <-ctx.Done():
			return false
		}
	}
}

// propose sends one transition, for which a slot was taken.
func (p *proposer) propose(ctx context.Context, kind string, t transition) {
	l := p.l
	l.mu.Lock()
	table := l.sidecars
	if kind == "service" {
		table = l.services
	}
	if isJudged(t) && !table.stands(t) {
		table.done(t.id)
		l.mu.Unlock()
		<-p.slots
		return
	}
	epoch := l.epoch
	l.mu.Unlock()
	cmd := transitionCommand(l.c.Now(), kind, t, l.c.FlapGrace)
	// A state restored since may have a record that looks the same, and a leader
	// elected since has heard what this one has not.
	cmd.ExpectedEpoch, cmd.ExpectedTerm = &epoch, &p.term
	p.flying.Add(1)
	l.c.Submit.SubmitFunc(cmd, func(res *commandpb.Result, _ uint64, err error) {
		defer p.flying.Done()
		<-p.slots
		took := err == nil && res.GetRejection() == nil && res.GetChanged()
		l.mu.Lock()
		table.done(t.id)
		if took {
			l.stats.count(t.to)
		}
		l.mu.Unlock()
		switch {
		case err != nil:
			if ctx.Err() == nil {
				l.c.Logger.Warn("a transition was not replicated; it is tried again", "kind", kind, "id", t.id, "to", t.to, "err", err)
			}
		case res.GetRejection() != nil:
			// It registered again or is gone, or this node leads no more: the
			// decision was about another.
			l.c.Logger.Debug("a transition came too late", "kind", kind, "id", t.id, "to", t.to, "reason", res.Rejection.Reason)
		case took:
			l.c.Logger.Info(kind+" is "+t.to.String(), "id", t.id, "was", t.from, "silent", t.silent.Round(time.Millisecond))
			l.c.Transitioned(TransitionInfo{Kind: kind, ID: t.id, From: t.from.String(), To: t.to.String(), Silent: t.silent})
		}
	})
}

func (s *LivenessStats) count(to condition) {
	switch to {
	case alive:
		s.Revived++
	case suspect:
		s.Suspected++
	case expired:
		s.Expired++
	}
}

func transitionCommand(now time.Time, kind string, t transition, grace time.Duration) *commandpb.Command {
	cmd := &commandpb.Command{TimeMs: uint64(now.UnixMilli())}
	if kind == "service" {
		state := commandpb.ServiceState_SERVICE_STATE_ALIVE
		if t.to == expired {
			state = commandpb.ServiceState_SERVICE_STATE_EXPIRED
		}
		cmd.Op = &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
			// Without it, a service that registered again meanwhile would be put
			// out of its groups right after it has come back.
			ServiceId: t.id, State: state, ExpectedRevision: t.generation,
		}}
		return cmd
	}
	state := map[condition]commandpb.SidecarState{
		alive:   commandpb.SidecarState_SIDECAR_STATE_ALIVE,
		suspect: commandpb.SidecarState_SIDECAR_STATE_SUSPECT,
		expired: commandpb.SidecarState_SIDECAR_STATE_EXPIRED,
	}[t.to]
	cmd.Op = &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: t.id, ExpectedGeneration: t.generation, State: state,
	}}
	if t.to == expired {
		cmd.GetTransitionSidecar().GraceMs = uint64(grace.Milliseconds())
	}
	return cmd
}
