package rpc

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// appliedClaim is what a sidecar says it has applied: revision of epoch, 0 when it says
// nothing.
type appliedClaim struct{ revision, epoch uint64 }

func claimOf(req *sidecarpb.SidecarHeartbeatRequest) appliedClaim {
	return appliedClaim{req.GetAppliedRevision(), req.GetAppliedEpoch()}
}

// beyond says whether c is of a later state than d.
func (c appliedClaim) beyond(d appliedClaim) bool {
	return c.revision > 0 && (c.epoch > d.epoch || c.epoch == d.epoch && c.revision > d.revision)
}

// ahead says whether a claim is of a state that this node does not have yet, or that
// does not exist.
func (s *Server) ahead(c appliedClaim) bool {
	// The epoch first: a restore between the two makes the state older than it is, and
	// what is thought to be ahead is looked at again.
	epoch := s.cfg.State.Epoch()
	return c.beyond(appliedClaim{s.cfg.State.Revision(), epoch})
}

// learnWhatExists waits, appliedWait at most, until this node holds all that was
// decided before the call, and says whether it does. What a client asks of its own
// reads, such as stale ones, does not matter to it.
func (s *Server) learnWhatExists(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(metadata.NewIncomingContext(ctx, nil), appliedWait)
	defer cancel()
	return s.reader.Wait(ctx) == nil
}

// unheard are the streams with claims that this node could not judge because it was
// behind. Streams repeat nothing, so the claims are kept, the newest of each sidecar,
// and judged once the node has caught up.
type unheard struct {
	mu      sync.Mutex
	streams map[*sidecarStream]struct{}
	kick    bell
}

func newUnheard() *unheard {
	return &unheard{streams: make(map[*sidecarStream]struct{}), kick: newBell()}
}

func (u *unheard) add(s *sidecarStream) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.streams[s] = struct{}{}
	u.kick.ring()
}

func (u *unheard) remove(s *sidecarStream) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.streams, s)
}

// take returns all of them and forgets them: who could not be judged again adds
// itself again.
func (u *unheard) take() []*sidecarStream {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]*sidecarStream, 0, len(u.streams))
	for s := range u.streams {
		out = append(out, s)
	}
	clear(u.streams)
	return out
}

// claimsRetry is how long a node that could not catch up waits before it tries again.
const claimsRetry = 250 * time.Millisecond

// judgeClaims has the claims that were kept judged, each time this node has caught
// up, until ctx is done.
func (s *Server) judgeClaims(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.unheard.kick:
		}
		for s.reader.Wait(ctx) != nil {
			pause := time.NewTimer(claimsRetry)
			select {
			case <-ctx.Done():
				pause.Stop()
				return
			case <-pause.C:
			}
		}
		for _, stream := range s.unheard.take() {
			stream.claimsDue()
		}
	}
}

// keep keeps a claim of m that could not be judged until this node has caught up.
func (s *sidecarStream) keep(m *streamMember, c appliedClaim) {
	s.mu.Lock()
	lives := !s.closed && !m.left
	if lives && m.claim.revision == 0 { // otherwise it has said something newer since
		m.claim = c
	}
	s.mu.Unlock()
	if !lives {
		return
	}
	s.api.unheard.add(s)
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed { // it may have been taken out before it was put in
		s.api.unheard.remove(s)
	}
}

// putBack takes back what d was taken with, for the time when m is judged.
func (s *sidecarStream) putBack(d dueMember) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := d.streamMember
	if s.closed || m.left {
		return
	}
	if m.claim.revision == 0 {
		m.claim = d.claim
	}
	switch {
	case m.news == nil:
		m.news = d.news
	case len(m.news.ServiceHealth) == 0:
		m.news.ServiceHealth = d.news.GetServiceHealth()
	}
}

// claimsDue has the claims that were kept judged.
func (s *sidecarStream) claimsDue() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for _, m := range s.members {
		if m != nil && m.claim.revision > 0 {
			s.dueLocked(m, dueClaim, nil)
		}
	}
}

// awaitClaims waits, if some of them claim what is ahead of this node, until it has
// caught up, appliedWait at most, and returns whether it has. It is done once for all
// of them, and not by a worker of the pusher, of which there are few: a stream of
// thousands that are ahead of this node would hold it for each of them. For the same
// reason one wait in vain is enough for a round.
func (s *sidecarStream) awaitClaims(ctx context.Context, some []dueMember) bool {
	var newest appliedClaim
	for _, d := range some {
		if d.claim.beyond(newest) {
			newest = d.claim
		}
	}
	if !s.api.ahead(newest) {
		return true
	}
	if s.lags {
		return false
	}
	s.lags = !s.api.learnWhatExists(ctx)
	return !s.lags
}
