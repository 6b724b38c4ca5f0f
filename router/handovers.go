package router

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// Bounds of what may be waited for. Part of the state machine, so no options.
const (
	maxReleaseMS = 60 * 60 * 1000
	maxDrainMS   = 24 * 60 * 60 * 1000
	// flapFactor: who expires again within so many times the grace it would get
	// comes and goes.
	flapFactor = 10
	// maxCountedOwners is up to which parallelism the owners of an entry stage are
	// counted. Where more may run it, counting them for each change would cost a look
	// at all of them, and one too many is not what a source cannot bear.
	maxCountedOwners = 64
)

// pendingStages are the stages of pipelines that somebody has yet to let go of, and
// who, as one command finds and leaves them. It is read once per pipeline: a change
// of one that thousands run asks thousands of times.
type pendingStages map[string]map[string][]string

// note adds what a sidecar was told to let go of, and takes out what it was given
// back.
func (p pendingStages) note(pipeline, sidecar string, letGo, takes []string) {
	stages := p[pipeline]
	if stages == nil {
		return // not read yet
	}
	for _, s := range takes {
		stages[s] = slices.DeleteFunc(stages[s], func(by string) bool { return by == sidecar })
	}
	for _, s := range letGo {
		if !slices.Contains(stages[s], sidecar) {
			stages[s] = append(stages[s], sidecar)
		}
	}
}

// entryStage is true for a stage where records enter a pipeline: a source, or one
// without an edge into it. No more sidecars than its parallelism says may run it
// at a time. It must say what the planner says of it.
func entryStage(spec *commandpb.PipelineSpec, s *commandpb.Stage) bool {
	return s.GetType() == commandpb.StageType_STAGE_TYPE_SOURCE ||
		!slices.ContainsFunc(spec.GetEdges(), func(e *commandpb.Edge) bool { return e.GetToStage() == s.GetId() })
}

// local returns the ids of the stages that a runs itself; none when it is nil or
// revoked.
func local(a *commandpb.Assignment) []string {
	if a == nil || a.Revoked {
		return nil
	}
	var out []string
	for _, s := range a.Stages {
		if s.RemoteSidecarId == "" {
			out = append(out, s.StageId)
		}
	}
	return out
}

// handover loads what a sidecar has yet to let go of; nil when there is nothing.
// Each call returns a fresh message.
func (t *tx) handover(pipeline, sidecar string) *commandpb.Handover {
	h := &commandpb.Handover{}
	if !t.load(t.buf.pair(prefixHandover, pipeline, sidecar), h) {
		return nil
	}
	return h
}

// saveHandover stores next in place of prev; one without releases is removed.
func (t *tx) saveHandover(prev, next *commandpb.Handover) {
	k := t.buf.pair(prefixHandover, next.PipelineId, next.SidecarId)
	id := HandoverKey(next.PipelineId, next.SidecarId)
	var before proto.Message
	if prev != nil {
		before = prev
	}
	if len(next.Releases) == 0 {
		if prev != nil {
			t.remove(k)
			t.emit(TableHandovers, id, before, nil)
		}
		return
	}
	next.CreateRevision, next.ModRevision = t.revision, t.revision
	if prev != nil {
		next.CreateRevision = prev.CreateRevision
	}
	t.store(k, next)
	t.emit(TableHandovers, id, before, next)
}

// release notes that a sidecar was told by this command to let go of stages. The
// caller has made sure that it ran them. Nobody waits for a sidecar that is
// expired or gone. Of shared ones it is only kept that they were told.
func (t *tx) release(sidecar, pipeline string, stages, shared []string, timeoutMS uint64) {
	if len(stages)+len(shared) == 0 {
		return
	}
	if sc := t.sidecar(sidecar); sc == nil || sc.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED {
		return
	}
	prev := t.handover(pipeline, sidecar)
	next := &commandpb.Handover{PipelineId: pipeline, SidecarId: sidecar}
	for _, r := range prev.GetReleases() {
		if !slices.Contains(stages, r.StageId) && !slices.Contains(shared, r.StageId) {
			next.Releases = append(next.Releases, r)
		}
	}
	for i, s := range slices.Concat(stages, shared) {
		next.Releases = append(next.Releases, &commandpb.Release{
			StageId: s, Revision: t.revision, DeadlineMs: t.now + min(timeoutMS, maxReleaseMS), Shared: i >= len(stages),
		})
	}
	slices.SortFunc(next.Releases, func(a, b *commandpb.Release) int { return strings.Compare(a.StageId, b.StageId) })
	t.saveHandover(prev, next)
}

// retake takes back the releases of stages that a sidecar was given again: it
// either has let go of them, or need not.
func (t *tx) retake(sidecar, pipeline string, stages []string) {
	prev := t.handover(pipeline, sidecar)
	if prev == nil {
		return
	}
	next := &commandpb.Handover{PipelineId: pipeline, SidecarId: sidecar}
	for _, r := range prev.Releases {
		if !slices.Contains(stages, r.StageId) {
			next.Releases = append(next.Releases, r)
		}
	}
	if len(next.Releases) < len(prev.Releases) {
		t.saveHandover(prev, next)
	}
}

// mayTake reports whether a sidecar may begin to run stages of p: nobody else has
// yet to let go of one, and of the entry stages there are not as many owners
// already as there may be. Who is expired owns nothing any more.
func (t *tx) mayTake(pending pendingStages, sidecar string, p *commandpb.Pipeline, stages []string) bool {
	id := p.GetSpec().GetId()
	if _, read := pending[id]; !read {
		pending[id] = make(map[string][]string)
		t.scan(t.buf.group(prefixHandover, id), func(_, v []byte) {
			h := &commandpb.Handover{}
			t.fail(h.UnmarshalVT(v))
			for _, r := range h.Releases {
				if !r.Shared {
					pending[id][r.StageId] = append(pending[id][r.StageId], h.SidecarId)
				}
			}
		})
	}
	for _, s := range stages {
		if slices.ContainsFunc(pending[id][s], func(by string) bool { return by != sidecar }) {
			return false
		}
	}
	owners := make(map[string]uint32)
	limits := make(map[string]uint32)
	for _, s := range p.GetSpec().GetStages() {
		if slices.Contains(stages, s.GetId()) && s.Parallelism <= maxCountedOwners && entryStage(p.Spec, s) {
			limits[s.Id] = max(1, s.Parallelism)
		}
	}
	if len(limits) == 0 {
		return true
	}
	var others []string
	t.scan(t.buf.group(prefixByPipeline, id), func(k, _ []byte) {
		_, other, err := decodePair(k)
		t.fail(err)
		if other != sidecar {
			others = append(others, other)
		}
	})
	for _, other := range others {
		runs := local(t.assignment(other, id))
		if !slices.ContainsFunc(runs, func(s string) bool { return limits[s] > 0 }) {
			continue
		}
		if sc := t.sidecar(other); sc == nil || sc.State == commandpb.SidecarState_SIDECAR_STATE_EXPIRED {
			continue
		}
		for _, s := range runs {
			owners[s]++
		}
	}
	for s, n := range limits {
		if owners[s] >= n {
			return false
		}
	}
	return true
}

// endHandovers frees stages: those that a sidecar has let go of, has had enough
// time to let go of, or can no longer run. What does not hold, or is not there, is
// skipped and counted: whoever proposes it sees the newer state anyway.
//
// Rejections: INVALID (ids, reason), LIMIT.
func (t *tx) endHandovers(c *commandpb.EndHandovers) *commandpb.Rejection {
	if len(c.Ended) > maxChanges {
		return limit("handovers", "%d of them, at most %d are allowed", len(c.Ended), maxChanges)
	}
	for _, e := range c.Ended {
		if r := first(checkID("sidecar id", e.GetSidecarId()), checkID("pipeline id", e.GetPipelineId())); r != nil {
			return r
		}
		if _, ok := commandpb.HandoverEnd_name[int32(e.End)]; !ok || e.End == commandpb.HandoverEnd_HANDOVER_END_UNSPECIFIED {
			return invalid("handover of "+e.PipelineId, "%d is no way a handover can end", e.End)
		}
	}
	for _, e := range c.Ended {
		if !t.endHandover(e) {
			t.res.Stale++
		}
	}
	return nil
}

// endHandover reports false when it ended nothing.
func (t *tx) endHandover(e *commandpb.EndedHandover) bool {
	prev := t.handover(e.PipelineId, e.SidecarId)
	if prev == nil {
		return false
	}
	if e.End == commandpb.HandoverEnd_HANDOVER_END_GONE {
		if sc := t.sidecar(e.SidecarId); sc != nil && sc.State != commandpb.SidecarState_SIDECAR_STATE_EXPIRED {
			return false
		}
	}
	next := &commandpb.Handover{PipelineId: e.PipelineId, SidecarId: e.SidecarId}
	for _, r := range prev.Releases {
		if r.Revision > e.Revision || (e.End == commandpb.HandoverEnd_HANDOVER_END_DEADLINE && t.now < r.DeadlineMs) {
			next.Releases = append(next.Releases, r)
		}
	}
	if len(next.Releases) == len(prev.Releases) {
		return false
	}
	t.saveHandover(prev, next)
	return true
}

// drainSidecar has a sidecar lose what others can run. Draining one that drains
// sets the new deadline; who was to leave still is, unless it is undrained.
//
// Rejections: INVALID (id), LIMIT (timeout), NOT_FOUND.
func (t *tx) drainSidecar(c *commandpb.DrainSidecar) *commandpb.Rejection {
	if r := checkID("sidecar id", c.SidecarId); r != nil {
		return r
	}
	if c.TimeoutMs > maxDrainMS {
		return limit("sidecar "+c.SidecarId, "a drain of %d ms, at most %d are allowed", c.TimeoutMs, maxDrainMS)
	}
	prev := t.sidecar(c.SidecarId)
	if prev == nil {
		return notFound("sidecar", c.SidecarId)
	}
	t.res.Existed, t.res.Generation = true, prev.Generation
	next := proto.Clone(prev).(*commandpb.Sidecar)
	next.Leaves = prev.Leaves || c.Leaves
	if !prev.Draining {
		next.Draining, next.DrainSinceMs = true, t.now
	}
	switch {
	case c.TimeoutMs > 0:
		next.DrainDeadlineMs = t.now + c.TimeoutMs
	case !next.Leaves:
		next.DrainDeadlineMs = 0
	}
	if !proto.Equal(prev, next) {
		t.saveSidecar(prev, next)
	}
	return nil
}

// undrainSidecar lets a sidecar be given stages again. What has moved stays where
// it is.
//
// Rejections: INVALID (id), NOT_FOUND.
func (t *tx) undrainSidecar(c *commandpb.UndrainSidecar) *commandpb.Rejection {
	if r := checkID("sidecar id", c.SidecarId); r != nil {
		return r
	}
	prev := t.sidecar(c.SidecarId)
	if prev == nil {
		return notFound("sidecar", c.SidecarId)
	}
	t.res.Existed, t.res.Generation = true, prev.Generation
	if !prev.Draining {
		return nil
	}
	next := proto.Clone(prev).(*commandpb.Sidecar)
	next.Draining, next.Leaves, next.DrainSinceMs, next.DrainDeadlineMs = false, false, 0, 0
	t.saveSidecar(prev, next)
	return nil
}
