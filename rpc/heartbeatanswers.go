package rpc

import (
	"cmp"
	"context"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// dueMember is a member with what is due to it.
type dueMember struct {
	*streamMember
	what memberDue
	news *sidecarpb.SidecarHeartbeatRequest
}

// next returns some of the members to whom something is due.
func (s *sidecarStream) next(some []dueMember) []dueMember {
	s.mu.Lock()
	defer s.mu.Unlock()
	some = some[:0]
	for len(s.pending) > 0 && len(some) < cap(some) {
		m := s.pending[0]
		s.pending[0] = nil
		s.pending = s.pending[1:]
		if !m.left {
			some = append(some, dueMember{m, m.due, m.news})
		}
		m.due, m.news = 0, nil
	}
	if len(s.pending) == 0 {
		s.pending = nil
	}
	return some
}

const (
	// answersAtOnce is how many sidecars a worker of the pusher works for at a time.
	answersAtOnce = 64
	// maxAnswersBytes is where a message ends that answers several: gRPC's clients
	// take 4 MiB.
	maxAnswersBytes = 1 << 20
)

// answer tells members what is due to them until the stream ends.
func (s *sidecarStream) answer(ctx context.Context) error {
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-s.ended:
			if err == nil {
				err = aside(func() error { return s.flush(ctx) }) // it may still read
			}
			return err
		case <-s.bell:
			if err := aside(func() error {
				if err := settle(ctx, s.bell, last); err != nil {
					return err
				}
				return s.flush(ctx)
			}); err != nil {
				return err
			}
			last = time.Now()
		}
	}
}

// flush tells what is due now.
func (s *sidecarStream) flush(ctx context.Context) error {
	some := make([]dueMember, 0, answersAtOnce)
	for some = s.next(some); len(some) > 0; some = s.next(some) {
		resp, err := s.work(ctx, some)
		if err != nil {
			return err
		}
		for rest := resp.Answers; len(rest) > 0; {
			resp.Answers, rest = cutAnswers(rest, maxAnswersBytes)
			s.sending.Store(s.api.cfg.Now().UnixNano())
			err = s.stream.Send(resp)
			s.sending.Store(0)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// cutAnswers takes as many answers as fit limit, and at least one, off the head of
// all.
func cutAnswers(all []*sidecarpb.StreamedHeartbeatResponse, limit int) (head, rest []*sidecarpb.StreamedHeartbeatResponse) {
	n, size := 0, 0
	for n < len(all) {
		if size += all[n].SizeVT() + 8; n > 0 && size > limit {
			break
		}
		n++
	}
	return all[:n], all[n:]
}

// work works out what to tell some members. As with watches that is done by the
// workers of the pusher, and introductions have workers of their own.
func (s *sidecarStream) work(ctx context.Context, some []dueMember) (*sidecarpb.HeartbeatStreamResponse, error) {
	resp := &sidecarpb.HeartbeatStreamResponse{}
	var judged, changed []dueMember
	for _, d := range some {
		if d.what&dueJudge != 0 {
			judged = append(judged, d)
		} else {
			changed = append(changed, d)
		}
	}
	each := func(jobs chan *pushJob, of []dueMember, do func(*router.View, dueMember) (*sidecarpb.HeartbeatResponse, error)) error {
		if len(of) == 0 {
			return nil
		}
		var err error
		missed := turn(ctx, jobs, func() {
			v := s.api.cfg.State.View()
			defer v.Close()
			for _, d := range of {
				var r *sidecarpb.HeartbeatResponse
				if r, err = do(v, d); err != nil {
					return
				}
				if r != nil {
					r.Revision = v.Revision()
					resp.Answers = append(resp.Answers, &sidecarpb.StreamedHeartbeatResponse{Number: d.number, Response: r, Epoch: v.Epoch()})
				}
			}
		})
		return cmp.Or(missed, err)
	}
	if len(judged) > 0 {
		// "Unknown" must not be said by a node that is merely behind, nor may it
		// tell what another node has told newer things about.
		if err := s.api.reader.Wait(ctx); err != nil {
			return nil, err
		}
	}
	if err := each(s.api.push.first, judged, func(v *router.View, d dueMember) (*sidecarpb.HeartbeatResponse, error) {
		return s.introduce(ctx, v, d)
	}); err != nil {
		return nil, err
	}
	return resp, each(s.api.push.deltas, changed, func(v *router.View, d dueMember) (*sidecarpb.HeartbeatResponse, error) {
		return s.changes(ctx, v, d)
	})
}

// introduce judges whether heartbeats of d count, and tells it all it has to run.
func (s *sidecarStream) introduce(ctx context.Context, v *router.View, d dueMember) (*sidecarpb.HeartbeatResponse, error) {
	a := s.api
	if d.fault != "" {
		return &sidecarpb.HeartbeatResponse{Reason: d.fault}, nil
	}
	if d.displaced.Load() {
		return displacedAnswer(), nil
	}
	resp := &sidecarpb.HeartbeatResponse{HeartbeatIntervalMs: a.nextBeatMs(), TtlMs: uint64(a.cfg.SidecarTTL.Milliseconds())}
	if reason := a.rivals.find(ctx, d.id, a.cfg.Now()); reason != "" {
		a.told.detach(d.streamMember)
		return resp, tellRival(v, d.id, reason, resp)
	}
	sc, err := v.Sidecar(d.id)
	if err != nil {
		return nil, err
	}
	if reason := beatRefusal(sc, d.id, d.registration); reason != "" {
		a.told.detach(d.streamMember)
		resp.Reason = reason
		return resp, nil
	}
	if d.what&dueBeat != 0 {
		a.cfg.Beats.Touch(d.id, "")
	}
	e := a.told.attach(d.streamMember, a.cfg.Now())
	resp.Reason = s.hear(ctx, e, d)
	resp.Acknowledged = true
	if !d.watches {
		resp.Commands, _, err = e.commands(v, d.id, fullDue, true)
	}
	return resp, err
}

// changes tells d what is new for it, nil when nothing is.
func (s *sidecarStream) changes(ctx context.Context, v *router.View, d dueMember) (*sidecarpb.HeartbeatResponse, error) {
	if d.what&dueDisplaced != 0 {
		return displacedAnswer(), nil
	}
	e, dirty := s.api.told.takeDirty(d.streamMember)
	if e == nil {
		return nil, nil // its next heartbeat is judged
	}
	resp := &sidecarpb.HeartbeatResponse{Acknowledged: true, Reason: s.hear(ctx, e, d)}
	if d.what&dueLost != 0 {
		resp.Reason = "it was silent for longer than its lease, and what it had to run may run elsewhere; its next heartbeat brings it back"
	}
	if dirty && !d.watches {
		var err error
		if resp.Commands, _, err = e.commands(v, d.id, changesDue, true); err != nil {
			return nil, err
		}
	}
	if resp.Reason == "" && len(resp.Commands) == 0 {
		return nil, nil
	}
	return resp, nil
}

// hear takes note of what a sidecar said, and returns why a part of it does not
// count, "" when all does. That an answer was read, which the heartbeats of a call
// after another show, those of a stream do not.
func (s *sidecarStream) hear(ctx context.Context, e *told, d dueMember) string {
	if d.news == nil {
		return ""
	}
	reason := ""
	if d.news.AppliedRevision > 0 {
		var counts bool
		reason, counts = s.api.appliedFuture(ctx, d.news)
		s.api.told.heardBack(ctx, e, d.news, counts)
		s.api.confirm(d.id, e)
	}
	s.api.noteHealth(d.id, e, d.news.ServiceHealth)
	return reason
}

func displacedAnswer() *sidecarpb.HeartbeatResponse {
	return &sidecarpb.HeartbeatResponse{
		Reason: "it was introduced on another stream since and beats there; introduce it here again if this is the right one",
	}
}

// attach makes m the one who hears what its sidecar has to be told, and returns
// the entry that says what it was told so far. One who has left meanwhile is not attached.
func (t *toldSidecars) attach(m *streamMember, now time.Time) *told {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.by[m.id]
	if e == nil {
		e = t.insertLocked(m.id, now)
	}
	e.heard = now
	if m.hasLeft() {
		return e
	}
	if e.member != nil && e.member != m {
		e.member.displace()
	}
	e.member, m.entry = m, e
	e.full, e.dirty = now, false
	return e
}

// detach is the end of attach; m need not be attached. What was told m may be
// lost, so whoever beats next for the sidecar is told everything.
func (t *toldSidecars) detach(m *streamMember) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.entry != nil && m.entry.member == m {
		m.entry.member, m.entry.full = nil, time.Time{}
	}
	m.entry = nil
}

// takeDirty returns what m was told and whether that may have changed since; nil
// when m is not attached.
func (t *toldSidecars) takeDirty(m *streamMember) (e *told, dirty bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m.entry == nil || m.entry.gone || m.entry.member != m {
		return nil, false
	}
	dirty, m.entry.dirty = m.entry.dirty, false
	return m.entry, dirty
}
