package router

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// FlapFactor: who expires again within so many times the grace it would get comes and
// goes. Part of the state machine, so no option.
const FlapFactor = 10

// Bounds of what may be waited for. Part of the state machine, so no options.
const (
	maxReleaseMS = 60 * 60 * 1000
	maxDrainMS   = 24 * 60 * 60 * 1000
	// maxCountedOwners is up to which parallelism the owners of an entry stage are
	// counted. Where more may run it, counting them for each change would cost a look
	// at all of them, and one too many is not what a source cannot bear.
	maxCountedOwners = 64
)

// claims are what stands in the way of who is to be given stages of pipelines, as
// one command finds and leaves it. A pipeline is read once: a change of one that
// thousands run asks thousands of times.
type claims map[string]*pipelineClaims

type pipelineClaims struct {
	pending map[string]map[string]bool // stage -> who has yet to let go of it
	// owners counts who runs an entry stage and is not expired. It has the stages
	// whose owners are counted, and is nil until somebody is to be given one of them.
	owners map[string]uint32
}

func (p *pipelineClaims) wait(stage, sidecar string) {
	if p.pending[stage] == nil {
		p.pending[stage] = make(map[string]bool)
	}
	p.pending[stage][sidecar] = true
}

// waits is true when somebody other than sidecar has yet to let go of a stage.
func (p *pipelineClaims) waits(stage, sidecar string) bool {
	by := p.pending[stage]
	return len(by) > 1 || len(by) == 1 && !by[sidecar]
}

// note adds what a sidecar was told to let go of, and takes out what it was given
// back. had and has are all the stages that it ran and runs.
func (c claims) note(t *tx, pipeline, sidecar string, letGo, had, has []string) {
	p := c[pipeline]
	if p == nil {
		return // not read yet
	}
	for _, s := range has {
		if !slices.Contains(had, s) {
			delete(p.pending[s], sidecar)
		}
	}
	for _, s := range letGo {
		p.wait(s, sidecar)
	}
	if (p.counts(had) || p.counts(has)) && t.present(sidecar) {
		p.own(had, ^uint32(0))
		p.own(has, 1)
	}
}

// counts is true when owners are counted of one of stages at least.
func (p *pipelineClaims) counts(stages []string) bool {
	return slices.ContainsFunc(stages, func(s string) bool { _, counted := p.owners[s]; return counted })
}

// own adds by, which may be -1, to the owners of those of stages that are counted.
func (p *pipelineClaims) own(stages []string, by uint32) {
	for _, s := range stages {
		if n, counted := p.owners[s]; counted {
			p.owners[s] = n + by
		}
	}
}

// present is false for a sidecar that is expired or gone: it owns nothing any more.
func (t *tx) present(id string) bool {
	sc, there := t.standing(id)
	return there && sc.state != commandpb.SidecarState_SIDECAR_STATE_EXPIRED
}

// entryStages returns of each stage of a pipeline whether records enter there: a
// source, or one without an edge into it. No more sidecars than its parallelism says
// may run it at a time. It must say what the planner says of it.
func entryStages(spec *commandpb.PipelineSpec) map[string]bool {
	into := make(map[string]bool)
	for _, e := range spec.GetEdges() {
		into[e.GetToStage()] = true
	}
	entry := make(map[string]bool)
	for _, s := range spec.GetStages() {
		entry[s.GetId()] = s.GetType() == commandpb.StageType_STAGE_TYPE_SOURCE || !into[s.GetId()]
	}
	return entry
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

// runs is true when a runs a stage itself.
func runs(a *commandpb.Assignment, stage string) bool {
	return a != nil && !a.Revoked && slices.ContainsFunc(a.Stages, func(s *commandpb.StageAssignment) bool {
		return s.StageId == stage && s.RemoteSidecarId == ""
	})
}

// handover loads what a sidecar has yet to let go of; nil when there is nothing.
// Each call returns a fresh message.
func (t *tx) handover(pipeline, sidecar string) *commandpb.Handover {
	return t.handoverIn(t.handoverCell(pipeline, sidecar))
}

func (t *tx) handoverCell(pipeline, sidecar string) *cell {
	return t.cell(t.buf.pair(prefixHandover, pipeline, sidecar))
}

// handoverIn is handover of a cell.
func (t *tx) handoverIn(c *cell) *commandpb.Handover {
	if c.val == nil {
		return nil // as nearly always
	}
	h := &commandpb.Handover{}
	if !t.loadFrom(c, h) {
		return nil
	}
	return h
}

// saveHandover stores next in place of prev in its cell; one without releases is
// removed.
func (t *tx) saveHandover(c *cell, prev, next *commandpb.Handover) {
	id := HandoverKey(next.PipelineId, next.SidecarId)
	var before proto.Message
	if prev != nil {
		before = prev
	}
	if len(next.Releases) == 0 {
		if prev != nil {
			t.drop(c)
			t.emit(TableHandovers, id, before, nil)
		}
		return
	}
	next.CreateRevision, next.ModRevision = t.revision, t.revision
	if prev != nil {
		next.CreateRevision = prev.CreateRevision
	}
	t.storeIn(c, next)
	t.emit(TableHandovers, id, before, next)
}

// release notes that a sidecar was told by this command to let go of stages. The
// caller has made sure that it ran them. Nobody waits for a sidecar that is
// expired or gone. Of shared ones it is only kept that they were told.
func (t *tx) release(sidecar, pipeline string, stages, shared []string, timeoutMS uint64) {
	if len(stages)+len(shared) == 0 {
		return
	}
	if !t.present(sidecar) {
		return
	}
	c := t.handoverCell(pipeline, sidecar)
	prev := t.handoverIn(c)
	next := &commandpb.Handover{
		PipelineId: pipeline, SidecarId: sidecar,
		Releases: make([]*commandpb.Release, 0, len(prev.GetReleases())+len(stages)+len(shared)),
	}
	for _, r := range prev.GetReleases() {
		if !slices.Contains(stages, r.StageId) && !slices.Contains(shared, r.StageId) {
			next.Releases = append(next.Releases, r)
		}
	}
	told := func(stage string, shared bool) {
		next.Releases = append(next.Releases, &commandpb.Release{
			StageId: stage, Revision: t.revision, DeadlineMs: t.now + min(timeoutMS, maxReleaseMS), Shared: shared,
		})
	}
	for _, s := range stages {
		told(s, false)
	}
	for _, s := range shared {
		told(s, true)
	}
	slices.SortFunc(next.Releases, func(a, b *commandpb.Release) int { return strings.Compare(a.StageId, b.StageId) })
	t.saveHandover(c, prev, next)
}

// retake takes back the releases of stages that a sidecar was given again: it
// either has let go of them, or need not.
func (t *tx) retake(sidecar, pipeline string, stages []string) {
	c := t.handoverCell(pipeline, sidecar)
	prev := t.handoverIn(c)
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
		t.saveHandover(c, prev, next)
	}
}

// mayTake reports whether a sidecar may begin to run stages of p: nobody else has
// yet to let go of one, and of the entry stages there are not as many owners
// already as there may be. Who is expired owns nothing any more.
func (t *tx) mayTake(c claims, sidecar string, pipeline *lastPipeline, stages []string) bool {
	id := pipeline.p.GetSpec().GetId()
	p := c[id]
	if p == nil {
		p = &pipelineClaims{pending: make(map[string]map[string]bool)}
		c[id] = p
		t.scan(t.buf.group(prefixHandover, id), func(_, v []byte) {
			h := &commandpb.Handover{}
			t.fail(h.UnmarshalVT(v))
			for _, r := range h.Releases {
				if !r.Shared {
					p.wait(r.StageId, h.SidecarId)
				}
			}
		})
	}
	for _, s := range stages {
		if p.waits(s, sidecar) {
			return false
		}
	}
	for _, s := range stages {
		if limit := pipeline.limit(s); limit > 0 && t.ownersOf(p, pipeline, s) >= limit {
			return false
		}
	}
	return true
}

// ownersOf counts who runs a counted entry stage. The first time it counts those of
// all of the pipeline: each sidecar of it has to be looked at.
func (t *tx) ownersOf(p *pipelineClaims, pipeline *lastPipeline, stage string) uint32 {
	if p.owners == nil {
		id := pipeline.p.GetSpec().GetId()
		p.owners = make(map[string]uint32)
		for _, s := range pipeline.p.GetSpec().GetStages() {
			if pipeline.limit(s.GetId()) > 0 {
				p.owners[s.GetId()] = 0
			}
		}
		for _, sidecar := range t.assigned(id) {
			runs := local(t.assignment(sidecar, id))
			if p.counts(runs) && t.present(sidecar) {
				p.own(runs, 1)
			}
		}
	}
	return p.owners[stage]
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
	t.warmPairs(len(c.Ended), func(i int) (string, string) { return c.Ended[i].SidecarId, c.Ended[i].PipelineId }, prefixHandover)
	for _, e := range c.Ended {
		if !t.endHandover(e) {
			t.res.Stale++
		}
	}
	return nil
}

// endHandover reports false when it ended nothing.
func (t *tx) endHandover(e *commandpb.EndedHandover) bool {
	c := t.handoverCell(e.PipelineId, e.SidecarId)
	prev := t.handoverIn(c)
	if prev == nil {
		return false
	}
	if e.End == commandpb.HandoverEnd_HANDOVER_END_GONE {
		if t.present(e.SidecarId) {
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
	t.saveHandover(c, prev, next)
	return true
}

// drainSidecar has a sidecar lose what others can run. Of one that drains already the
// earlier deadline stands; who was to leave still is, unless it is undrained. One that
// is only now to leave has the time it is given now: the deadline of a drain before may
// be long over, and to remove it at once would start elsewhere what it still runs.
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
	switch asked := t.now + c.TimeoutMs; {
	case c.TimeoutMs == 0:
	case c.Leaves && !prev.Leaves:
		next.DrainDeadlineMs = asked
	default:
		next.DrainDeadlineMs = earlier(prev.DrainDeadlineMs, asked)
	}
	if !proto.Equal(prev, next) {
		t.saveSidecar(prev, next)
	}
	if next.DrainDeadlineMs != prev.DrainDeadlineMs {
		t.hasten(c.SidecarId, next.DrainDeadlineMs)
	}
	return nil
}

// hasten has no release of a sidecar last beyond a deadline: what it was told to let go
// of before that was set is part of what has to be over by then.
func (t *tx) hasten(sidecar string, deadlineMS uint64) {
	var pipelines []string
	t.scan(t.buf.group(prefixAssignment, sidecar), func(k, _ []byte) { // revoked ones are kept while they are let go of
		_, pipeline, err := decodePair(k)
		t.fail(err)
		pipelines = append(pipelines, pipeline)
	})
	for _, pipeline := range pipelines {
		c := t.handoverCell(pipeline, sidecar)
		prev := t.handoverIn(c)
		if !slices.ContainsFunc(prev.GetReleases(), func(r *commandpb.Release) bool { return r.DeadlineMs > deadlineMS }) {
			continue
		}
		next := proto.Clone(prev).(*commandpb.Handover)
		for _, r := range next.Releases {
			r.DeadlineMs = min(r.DeadlineMs, deadlineMS)
		}
		t.saveHandover(c, prev, next)
		t.changed = true
	}
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
