package rpc

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

const (
	// endsGather is how long confirmations are gathered before they are reported:
	// after a change that concerns thousands of sidecars they come all at once.
	endsGather = 20 * time.Millisecond
	// endsPerCommand bounds one report.
	endsPerCommand = 1000
	// endsInFlight bounds how long one attempt of a report may take.
	endsInFlight = 5 * time.Second
	// endsRetry is how long a report that failed waits for the next attempt.
	endsRetry = 500 * time.Millisecond
)

// handovers knows what sidecars have yet to let go of, and reports to the state when
// the heartbeats that reach this node say, or show, that they have. Whoever waits
// for a stage then gets it. It is empty nearly always, and never holds more than the
// state.
type handovers struct {
	mu sync.Mutex
	// pending holds the oldest revision whose release is not confirmed, by sidecar
	// and pipeline.
	pending map[string]map[string]uint64
	ended   map[endedKey]uint64 // what was confirmed and is to be reported: up to which revision
	epoch   uint64              // of ended
	kick    bell
}

type endedKey struct{ sidecar, pipeline string }

func newHandovers() *handovers {
	return &handovers{pending: make(map[string]map[string]uint64), ended: make(map[endedKey]uint64), kick: newBell()}
}

// load reads all from v.
func (h *handovers) load(v *router.View) error {
	pending := make(map[string]map[string]uint64)
	err := v.Handovers(func(x *commandpb.Handover) bool {
		putHandover(pending, x)
		return true
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pending = pending
	return err
}

// sidecars lists those who have yet to let go of something.
func (h *handovers) sidecars() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.pending))
}

// changed takes over a change of one; next is nil when it is over.
func (h *handovers) changed(prev, next *commandpb.Handover) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if next != nil {
		putHandover(h.pending, next)
		return
	}
	delete(h.pending[prev.GetSidecarId()], prev.GetPipelineId())
	if len(h.pending[prev.GetSidecarId()]) == 0 {
		delete(h.pending, prev.GetSidecarId())
	}
}

func putHandover(in map[string]map[string]uint64, x *commandpb.Handover) {
	if in[x.SidecarId] == nil {
		in[x.SidecarId] = make(map[string]uint64)
	}
	oldest := x.Releases[0].Revision
	for _, r := range x.Releases {
		oldest = min(oldest, r.Revision)
	}
	in[x.SidecarId][x.PipelineId] = oldest
}

// heard notes that a sidecar has applied everything up to revision, of a state of
// epoch, which must be the present one.
func (h *handovers) heard(sidecar string, revision, epoch uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	found := false
	for pipeline, oldest := range h.pending[sidecar] {
		if oldest > revision {
			continue
		}
		if epoch != h.epoch {
			clear(h.ended)
			h.epoch = epoch
		}
		k := endedKey{sidecar, pipeline}
		h.ended[k] = max(h.ended[k], revision)
		found = true
	}
	if found {
		h.kick.ring()
	}
}

// confirm ends the handovers that a sidecar's last heartbeat, of a call or of a
// stream, is the confirmation of.
func (s *Server) confirm(id string, e *told) {
	if revision, epoch := e.upTo(); revision > 0 && epoch == s.cfg.State.Epoch() {
		s.handovers.heard(id, revision, epoch)
	}
}

// handoverChanged takes over a change of a handover. What confirms it may have been
// said before this node heard of it, and on a stream it is said once.
func (s *Server) handoverChanged(prev, next *commandpb.Handover) {
	s.handovers.changed(prev, next)
	if next != nil {
		s.confirmSaid(next.SidecarId)
	}
}

// loadHandovers reads all from v, when the changes are not known one by one, with
// what has been said of them already.
func (s *Server) loadHandovers(v *router.View) error {
	err := s.handovers.load(v)
	for _, id := range s.handovers.sidecars() {
		s.confirmSaid(id)
	}
	return err
}

// confirmSaid is confirm by what a sidecar has said before.
func (s *Server) confirmSaid(id string) {
	s.told.mu.Lock()
	e := s.told.by[id]
	s.told.mu.Unlock()
	if e != nil {
		s.confirm(id, e)
	}
}

// take returns what is to be reported, a bounded part of it.
func (h *handovers) take() (ended []*commandpb.EndedHandover, epoch uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, revision := range h.ended {
		if oldest, ok := h.pending[k.sidecar][k.pipeline]; !ok || oldest > revision {
			delete(h.ended, k) // it is over
			continue
		}
		ended = append(ended, &commandpb.EndedHandover{
			SidecarId: k.sidecar, PipelineId: k.pipeline, Revision: revision, End: commandpb.HandoverEnd_HANDOVER_END_APPLIED,
		})
		delete(h.ended, k)
		if len(ended) == endsPerCommand {
			break
		}
	}
	slices.SortFunc(ended, func(a, b *commandpb.EndedHandover) int {
		return strings.Compare(a.SidecarId+"\x00"+a.PipelineId, b.SidecarId+"\x00"+b.PipelineId)
	})
	return ended, h.epoch
}

// putBack takes back what take returned and could not be reported.
func (h *handovers) putBack(ended []*commandpb.EndedHandover, epoch uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if epoch != h.epoch {
		return
	}
	for _, x := range ended {
		k := endedKey{x.SidecarId, x.PipelineId}
		h.ended[k] = max(h.ended[k], x.Revision)
	}
	h.kick.ring()
}

// report replicates what was confirmed until ctx is done. What fails is tried again
// for as long as it is pending: a sidecar on a stream says it once.
func (h *handovers) report(ctx context.Context, s Submitter, now func() time.Time, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.kick:
		}
		pause := time.NewTimer(endsGather)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
		for ctx.Err() == nil {
			ended, epoch := h.take()
			if len(ended) == 0 {
				break
			}
			limited, cancel := context.WithTimeout(ctx, endsInFlight)
			res, err := s.Submit(limited, &commandpb.Command{
				TimeMs: uint64(now().UnixMilli()),
				// A revision of a state that was replaced says nothing.
				ExpectedEpoch: &epoch,
				Op:            &commandpb.Command_EndHandovers{EndHandovers: &commandpb.EndHandovers{Ended: ended}},
			})
			cancel()
			switch {
			case err != nil && ctx.Err() == nil:
				log.Debug("it was not recorded that sidecars let go of stages; it is tried again", "handovers", len(ended), "error", err)
				h.putBack(ended, epoch)
				wait := time.NewTimer(endsRetry)
				select {
				case <-ctx.Done():
				case <-wait.C:
				}
				wait.Stop()
			case res.GetRejection() != nil:
				log.Debug("the state refused that sidecars let go of stages", "reason", res.Rejection.Reason)
			}
		}
	}
}
