package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"conveyor.etl/router/control"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
)

// shareLeases brings a digest of the leases to all other members, learners
// included: they may be voters by the time a leader is needed.
func (s *Server) shareLeases(ctx context.Context, d control.Digest) error {
	out := &peerpb.LeaseDigest{
		Term: d.Term, Epoch: d.Epoch, Revision: d.Revision,
		Sidecars: silencesToPeer(d.Sidecars), Services: silencesToPeer(d.Services),
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	for _, m := range raftnode.Live(s.disk.machine.Applied().Members) {
		if m.ID == s.c.NodeID {
			continue
		}
		wg.Go(func() {
			if err := s.transport.ShareLeases(ctx, m.ID, out); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// takeLeases implements rpc.PeerServerConfig.Leases.
func (s *Server) takeLeases(d *peerpb.LeaseDigest) error {
	return s.control.liveness.TakeDigest(control.Digest{
		Term: d.GetTerm(), Epoch: d.GetEpoch(), Revision: d.GetRevision(),
		Sidecars: silencesFromPeer(d.GetSidecars()), Services: silencesFromPeer(d.GetServices()),
	})
}

func silencesToPeer(in []control.Silence) []*peerpb.LeaseSilence {
	out := make([]*peerpb.LeaseSilence, 0, len(in))
	for _, x := range in {
		out = append(out, &peerpb.LeaseSilence{Id: x.ID, SilentMs: uint64(x.For.Milliseconds())})
	}
	return out
}

func silencesFromPeer(in []*peerpb.LeaseSilence) []control.Silence {
	const most = 10 * 365 * 24 * time.Hour // far from where durations overflow
	out := make([]control.Silence, 0, len(in))
	for _, x := range in {
		silent := min(x.GetSilentMs(), uint64(most/time.Millisecond))
		out = append(out, control.Silence{ID: x.GetId(), For: time.Duration(silent) * time.Millisecond})
	}
	return out
}

// leaseMetrics adds the numbers of the liveness plane.
func (s *Server) leaseMetrics(out map[string]float64) {
	st := s.control.liveness.Stats()
	for kind, t := range map[string]control.LeaseStats{"sidecars": st.Sidecars, "services": st.Services} {
		out["leases_"+kind+"_present"] = float64(t.Present)
		out["leases_"+kind+"_silent"] = float64(t.Silent)
		out["leases_"+kind+"_held"] = float64(t.Held)
		out["leases_"+kind+"_expired"] = float64(t.Expired)
	}
	out["leases_revived_total"] = float64(st.Revived)
	out["leases_suspected_total"] = float64(st.Suspected)
	out["leases_expired_total"] = float64(st.Expired)
	out["services_purged_total"] = float64(st.Purged)
	out["leases_unconfirmed_total"] = float64(st.Unconfirmed)
	out["leases_held_up_total"] = float64(st.HeldUp)
	out["leases_digests_sent_total"] = float64(st.DigestsSent)
	out["leases_digests_failed_total"] = float64(st.DigestsFailed)
	out["leases_digests_taken_total"] = float64(st.DigestsTaken)
	out["leases_digests_used_total"] = float64(st.DigestsUsed)
}
