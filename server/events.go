package server

import (
	"log/slog"
	"time"

	"conveyor.etl/router/raftnode"
)

// eventLog turns what raft tells into log lines for the person on call. The
// frequent events are left to the numbers of GetMetrics.
func eventLog(log *slog.Logger) raftnode.EventListener {
	return raftnode.EventListener{
		LeaderChanged: func(l raftnode.Leadership) {
			log.Info("leadership", "event", "leader_changed", "leader", l.Leader, "term", l.Term, "leading", l.Leading)
		},
		ProposalsLost: func(commands int) {
			log.Warn("commands of an earlier leadership were overwritten; their callers were told that they were not done",
				"event", "proposals_lost", "commands", commands)
		},
		MembershipChanged: func(p raftnode.Position) {
			log.Info("membership", "event", "membership_changed", "index", p.Index, "voters", p.ConfState.GetVoters(), "learners", p.ConfState.GetLearners())
			if len(p.ConfState.GetVoters()) == 2 && len(p.ConfState.GetVotersOutgoing()) == 0 {
				log.Warn("there are two voters now: losing either one stops the cluster; let a third node join", "event", "fragile", "voters", p.ConfState.GetVoters())
			}
		},
		ImageBuilt: func(d time.Duration, index uint64, bytes int64, err error) {
			if err != nil {
				log.Error("an image of the state could not be made", "event", "image_failed", "err", err)
				return
			}
			log.Info("image made", "event", "image_built", "index", index, "bytes", bytes, "took", d)
		},
		ImageSent: func(to uint64, d time.Duration, bytes int64, err error) {
			if err != nil {
				log.Warn("an image could not be sent", "event", "image_send_failed", "peer", to, "err", err)
				return
			}
			log.Info("image sent", "event", "image_sent", "peer", to, "bytes", bytes, "took", d)
		},
		ImageInstalled: func(d time.Duration, index uint64) {
			log.Info("the state was replaced by a leader's image", "event", "image_installed", "index", index, "took", d)
		},
		DiskStalled: func(age time.Duration) {
			log.Error("the disk has not answered", "event", "disk_stalled", "for", age)
		},
	}
}
