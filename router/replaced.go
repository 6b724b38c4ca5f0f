package router

import (
	"slices"
	"strings"

	"conveyor.etl/router/router/commandpb"
)

// maxReplaced bounds whom an assignment remembers to have handed over to. A table of so
// many more is stale until some of them are forgotten, which takes as long as a sidecar
// may go by a table that was replaced; a revocation comes through.
const maxReplaced = 4 * maxStageAssignments

// replacedHops lists to whom a sidecar may hand over by tables before the one with
// stages, which replaces prev now: to those of prev for keepMS, to others for as long as
// is left. Whom it hands over to by the new one as well is left out. It is in the
// state since a leader that is elected now has to know of it.
func (t *tx) replacedHops(prev *commandpb.Assignment, stages []*commandpb.StageAssignment, keepMS uint64) []*commandpb.ReplacedHop {
	if len(prev.GetReplaced()) == 0 && (keepMS == 0 || prev.GetRevoked() || !slices.ContainsFunc(prev.GetStages(), handsOver)) {
		return nil // most of them
	}
	until := make(map[string]uint64)
	for _, h := range prev.Replaced {
		if h.UntilMs > t.now {
			until[h.SidecarId] = h.UntilMs
		}
	}
	if keepMS > 0 && !prev.Revoked {
		for _, s := range prev.Stages {
			if handsOver(s) {
				until[s.RemoteSidecarId] = max(until[s.RemoteSidecarId], t.now+min(keepMS, maxReleaseMS))
			}
		}
	}
	for _, s := range stages {
		delete(until, s.RemoteSidecarId)
	}
	var out []*commandpb.ReplacedHop
	for id, ms := range until { // sorted below
		out = append(out, &commandpb.ReplacedHop{SidecarId: id, UntilMs: ms})
	}
	slices.SortFunc(out, func(a, b *commandpb.ReplacedHop) int { return strings.Compare(a.SidecarId, b.SidecarId) })
	return out
}

func handsOver(s *commandpb.StageAssignment) bool { return s.RemoteSidecarId != "" }

// needed is true for a revocation that must not be forgotten yet: somebody waits for
// the sidecar to let go, or it may still hand over to others.
func (t *tx) needed(a *commandpb.Assignment) bool {
	return slices.ContainsFunc(a.Replaced, func(h *commandpb.ReplacedHop) bool { return h.UntilMs > t.now }) ||
		t.handover(a.PipelineId, a.SidecarId) != nil
}
