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
	what  memberDue
	news  *sidecarpb.SidecarHeartbeatRequest
	claim appliedClaim
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
			some = append(some, m.takeLocked())
		}
		m.due, m.news = 0, nil
	}
	if len(s.pending) == 0 {
		s.pending = nil
	}
	return some
}

// takeLocked returns what is due to m. A claim that waits for this node is left where
// it is when there is another reason to look at m: every change of a lagging node
// would wait as well otherwise.
func (m *streamMember) takeLocked() dueMember {
	d := dueMember{m, m.due, m.news, appliedClaim{}}
	if m.due&(dueJudge|dueCheck|dueNews|dueClaim) != 0 {
		d.claim, m.claim = m.claim, appliedClaim{}
	}
	return d
}

const (
	// answersAtOnce is how many sidecars a worker of the pusher works for at a time.
	answersAtOnce = 64
	// maxAnswersBytes is where a message ends that answers several: gRPC's clients
	// take 4 MiB.
	maxAnswersBytes = 1 << 20
)

// answer tells members what is due to them until the stream ends.
func (s *sidecarStream) answer(q *quietContext) error {
	var last time.Time
	for {
		select {
		case <-q.Done():
			return q.Err()
		case <-q.end.Done():
			return q.end.Err()
		case err := <-s.ended:
			if err == nil {
				err = aside(func() error { // it may still read
					ctx, cancel := q.bound()
					defer cancel()
					return s.flush(ctx)
				})
			}
			return err
		case <-s.bell:
			if err := aside(func() error {
				ctx, cancel := q.bound()
				defer cancel()
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
	s.lags = false
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
		if d.what&dueJudge != 0 || d.what&dueCheck != 0 && s.inDoubt(d) {
			judged = append(judged, d)
		} else {
			changed = append(changed, d)
		}
	}
	if len(judged) > 0 {
		// "Unknown" must not be said by a node that is merely behind, nor may it
		// tell what another node has told newer things about.
		if err := s.api.reader.Wait(ctx); err != nil {
			return nil, err
		}
	}
	caughtUp := s.awaitClaims(ctx, some)
	if len(judged) > 0 {
		var err error
		missed := turn(ctx, s.api.push.first, func() { err = s.introduce(ctx, judged, caughtUp, resp) })
		if err = cmp.Or(missed, err); err != nil {
			return nil, err
		}
	}
	if len(changed) > 0 {
		var err error
		missed := turn(ctx, s.api.push.deltas, func() { err = s.changes(ctx, changed, caughtUp, resp) })
		if err = cmp.Or(missed, err); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// inDoubt says whether this node knows of something against the heartbeats of d.
func (s *sidecarStream) inDoubt(d dueMember) bool {
	sc, err := s.api.localSidecar(d.id)
	return err != nil || beatRefusal(sc, d.id, d.registration) != ""
}

// heardMember is a member that is answered with what the state asks of it.
//
// What may have changed for it was taken before the view is opened that it is
// compared with. The other way round a change that the feed notes between the two
// would be taken with it and not be in the view, and nobody would tell it: streams
// repeat nothing.
type heardMember struct {
	dueMember
	entry *told
	resp  *sidecarpb.HeartbeatResponse
}

// introduce judges whether heartbeats of some count, and tells those all they have
// to run. With caughtUp this node knows all that there was when they were received.
func (s *sidecarStream) introduce(ctx context.Context, some []dueMember, caughtUp bool, out *sidecarpb.HeartbeatStreamResponse) error {
	heard, err := s.accept(ctx, some, caughtUp, out)
	if err != nil || len(heard) == 0 {
		return err
	}
	return s.tell(heard, fullDue, out)
}

// accept refuses those of some whose heartbeats do not count and attaches the others.
func (s *sidecarStream) accept(ctx context.Context, some []dueMember, caughtUp bool, out *sidecarpb.HeartbeatStreamResponse) (heard []heardMember, err error) {
	a := s.api
	shared := a.push.views.take()
	defer shared.Close()
	v := shared.View
	for _, d := range some {
		resp := &sidecarpb.HeartbeatResponse{HeartbeatIntervalMs: a.nextBeatMs(), TtlMs: uint64(a.cfg.SidecarTTL.Milliseconds())}
		rival := ""
		switch {
		case d.fault != "":
			resp = &sidecarpb.HeartbeatResponse{Reason: d.fault}
		case d.displaced.Load():
			resp = displacedAnswer()
		default:
			if rival = a.rivals.find(ctx, d.id, a.cfg.Now()); rival != "" {
				a.told.detach(d.streamMember)
				err = tellRival(v, d.id, rival, resp)
			} else {
				resp.Reason, err = s.refusal(v, d)
			}
		}
		if err != nil {
			return nil, err
		}
		if resp.Reason != "" {
			resp.Revision = v.Revision()
			out.Answers = append(out.Answers, &sidecarpb.StreamedHeartbeatResponse{Number: d.number, Response: resp, Epoch: v.Epoch()})
			continue
		}
		if d.what&dueBeat != 0 {
			a.cfg.Beats.Touch(d.id, "")
		}
		e := a.told.attach(d.streamMember, a.cfg.Now())
		resp.Acknowledged, resp.Reason = true, s.hear(ctx, e, d, caughtUp)
		heard = append(heard, heardMember{d, e, resp})
	}
	return heard, nil
}

// refusal says why heartbeats of d do not count, "" when they do. One that is refused
// is not attached any more.
func (s *sidecarStream) refusal(v *router.View, d dueMember) (string, error) {
	sc, err := v.Sidecar(d.id)
	if err != nil {
		return "", err
	}
	reason := beatRefusal(sc, d.id, d.registration)
	if reason != "" {
		s.api.told.detach(d.streamMember)
	}
	return reason, nil
}

// changes tells some what is new for them.
func (s *sidecarStream) changes(ctx context.Context, some []dueMember, caughtUp bool, out *sidecarpb.HeartbeatStreamResponse) error {
	var heard []heardMember
	for _, d := range some {
		if d.what&dueDisplaced != 0 {
			out.Answers = append(out.Answers, &sidecarpb.StreamedHeartbeatResponse{Number: d.number, Response: displacedAnswer()})
			continue
		}
		e, dirty := s.api.told.takeDirty(d.streamMember)
		if e == nil {
			s.putBack(d)
			continue // its next heartbeat is judged
		}
		resp := &sidecarpb.HeartbeatResponse{Acknowledged: true, Reason: s.hear(ctx, e, d, caughtUp)}
		if d.what&dueLost != 0 {
			resp.Reason = "it was silent for longer than its lease, and what it had to run may run elsewhere; its next heartbeat brings it back"
		}
		// An answer names the revision of a state. So it has to be compared with
		// that also when there is another reason for it.
		if dirty || resp.Reason != "" {
			heard = append(heard, heardMember{d, e, resp})
		}
	}
	if len(heard) == 0 {
		return nil
	}
	return s.tell(heard, changesDue, out)
}

// tell adds to the answers of those heard what the state asks of them now. An answer
// of changes that would say nothing is left out.
func (s *sidecarStream) tell(heard []heardMember, what due, out *sidecarpb.HeartbeatStreamResponse) error {
	shared := s.api.push.views.take()
	defer shared.Close()
	v := shared.View
	for _, h := range heard {
		if what == fullDue {
			// It may have gone after it was accepted, which is noted of those that
			// are attached.
			reason, err := s.refusal(v, h.dueMember)
			if err != nil {
				return err
			}
			if reason != "" {
				h.resp.Acknowledged, h.resp.Reason = false, reason
			}
		}
		if h.resp.Acknowledged && !h.watches {
			var err error
			if h.resp.Commands, _, err = h.entry.commands(v, h.id, what, true); err != nil {
				return err
			}
		}
		if what == changesDue && h.resp.Reason == "" && len(h.resp.Commands) == 0 {
			continue
		}
		if !h.watches { // which hears elsewhere up to where its assignments are
			h.resp.Revision = v.Revision()
		}
		out.Answers = append(out.Answers, &sidecarpb.StreamedHeartbeatResponse{Number: h.number, Response: h.resp, Epoch: v.Epoch()})
	}
	return nil
}

// hear takes note of what a sidecar said, and returns why a part of it does not
// count, "" when all does or it is not known yet: caughtUp says whether this node knows
// all that there was when it was said. That an answer was read, which the heartbeats of
// a call after another show, those of a stream do not.
func (s *sidecarStream) hear(ctx context.Context, e *told, d dueMember, caughtUp bool) string {
	reason := ""
	if d.claim.revision > 0 {
		counts := !s.api.ahead(d.claim)
		s.api.told.heardBack(ctx, e, d.claim, counts)
		switch {
		case counts:
			s.api.confirm(d.id, e)
		case caughtUp:
			reason = s.api.neverDecided(d.claim)
		default:
			s.keep(d.streamMember, d.claim)
		}
	}
	if d.news != nil {
		s.api.noteHealth(d.id, e, d.news.ServiceHealth)
	}
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
