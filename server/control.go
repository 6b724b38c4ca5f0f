package server

import (
	"context"
	"sync"
	"time"

	"conveyor.etl/router/control"
	"conveyor.etl/router/rpc"
)

// controlLoops are what this node does while it leads.
type controlLoops struct {
	liveness *control.Liveness
	placer   *control.Placer
	checker  *control.Checker
	promoter *control.Promoter
	replacer *control.Replacer
	// transfers is for every node, whoever leads.
	transfers *control.Transfers
	planned   *plannedRevision
}

func newControlLoops(s *Server) (*controlLoops, error) {
	liveness, err := control.NewLiveness(control.LivenessConfig{
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Logger: s.log.With("part", "liveness"), Now: s.o.Now,
		SuspectAfter: s.c.Liveness.SuspectAfter, ExpireAfter: s.c.Liveness.ExpireAfter, Beat: s.c.Liveness.HeartbeatInterval,
		MassFraction: float64(s.c.Liveness.MassExpiryPercent) / 100, MassHold: s.c.Liveness.MassExpiryHold,
		Retention: s.c.Liveness.ServiceRetention,
		FlapGrace: s.c.Placement.FlapGrace,
		Share:     s.shareLeases,
	})
	if err != nil {
		return nil, err
	}
	c := &controlLoops{liveness: liveness, checker: newChecker(s), planned: newPlannedRevision()}
	c.placer = control.NewPlacer(control.PlacerConfig{
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Logger: s.log.With("part", "placement"), Now: s.o.Now,
		HandoverTimeout: s.handoverTimeout(), MovesPerMinute: int(s.c.Placement.MovesPerMinute),
		BalanceInterval: s.c.Placement.BalanceInterval, FlapGrace: s.c.Placement.FlapGrace,
		Planned: func(p control.PlanInfo) {
			if p.Stale == 0 {
				c.planned.set(p.Revision)
			}
		},
		// The next leader decides: what this node had decided says nothing about that.
		Stopped: func() { c.planned.set(0) },
	})
	c.replacer = control.NewReplacer(control.ReplacerConfig{
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Logger: s.log.With("part", "members"), Now: s.o.Now,
	})
	c.promoter = control.NewPromoter(control.PromoterConfig{
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Logger: s.log.With("part", "members"), Now: s.o.Now, Promote: s.c.AutoPromote, Held: c.replacer.Holds,
	})
	c.transfers = control.NewTransfers(control.TransfersConfig{
		Self: s.c.NodeID, State: s.disk.fsm, Submit: s.forwarder, Logger: s.log.With("part", "members"), Now: s.o.Now, Position: s.disk.machine.Applied,
	})
	return c, nil
}

// handoverTimeout is how long a sidecar has to let go of a stage. One that is silent
// for as long as its lease counts as gone anyway.
func (s *Server) handoverTimeout() time.Duration {
	if d := s.c.Placement.HandoverTimeout; d > 0 {
		return d
	}
	return min(s.c.Liveness.ExpireAfter, time.Hour)
}

// waiting is what placement waits for, for GetClusterStatus.
func (s *Server) waiting() (heldMoves, handovers, draining int) {
	st := s.control.placer.Stats()
	return st.Held, st.Handovers, st.Draining
}

// held is what placement holds back, as the API has it.
func (s *Server) held(pipeline string) (out []rpc.HeldPipeline) {
	for _, h := range s.control.placer.Held(pipeline) {
		out = append(out, rpc.HeldPipeline(h))
	}
	return out
}

// start runs the loops until ctx is done.
func (c *controlLoops) start(ctx context.Context, wg *sync.WaitGroup) {
	wg.Go(func() { c.liveness.Run(ctx) })
	wg.Go(func() { c.placer.Run(ctx) })
	wg.Go(func() { c.checker.Run(ctx) })
	wg.Go(func() { c.promoter.Run(ctx) })
	wg.Go(func() { c.replacer.Run(ctx) })
}
