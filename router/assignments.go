package router

import (
	"container/heap"
	"slices"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// How long and how many revocations are kept. Part of the state machine, so no
// options.
const (
	revokedRetentionMS   = 60 * 60 * 1000
	maxRevokedPerSidecar = 64
	maxRevoked           = 200_000
	revokedPerPurge      = 64
)

// assignment loads an assignment; nil when absent.
func (t *tx) assignment(sidecar, pipeline string) *commandpb.Assignment {
	a := &commandpb.Assignment{}
	if !t.load(t.buf.pair(prefixAssignment, sidecar, pipeline), a) {
		return nil
	}
	return a
}

// saveAssignment stores next in place of prev and keeps index and counts right. It
// returns how many revocations the sidecar has, if that has changed.
func (t *tx) saveAssignment(prev, next *commandpb.Assignment) (revoked uint64) {
	next.ModRevision, next.ChangedAtMs = t.revision, t.now
	// At least the index: a purged assignment that is given again must not
	// look older than what the sidecar was told before.
	next.Generation = max(prev.GetGeneration()+1, t.revision)
	t.store(t.buf.pair(prefixAssignment, next.SidecarId, next.PipelineId), next)
	var before proto.Message
	if prev != nil {
		before = prev
	} else {
		t.mark(t.buf.pair(prefixByPipeline, next.PipelineId, next.SidecarId))
	}
	was, is := prev != nil && !prev.Revoked, !next.Revoked
	if was != is {
		t.count(countAssignments, delta(is))
	}
	was, is = prev.GetRevoked(), next.Revoked
	if was != is {
		revoked = t.countRevoked(next.SidecarId, delta(is))
	}
	t.emit(TableAssignments, AssignmentKey(next.SidecarId, next.PipelineId), before, next)
	return revoked
}

func delta(up bool) int {
	if up {
		return 1
	}
	return -1
}

// countRevoked keeps the number of a sidecar's revocations and returns it.
func (t *tx) countRevoked(sidecar string, by int) uint64 {
	t.count(countRevoked, by)
	c := t.cell(t.buf.single(prefixRevokedCount, sidecar))
	n := uint64(int64(number(c)) + int64(by))
	t.setNumber(c, n)
	return n
}

// revoke turns an assignment into a revocation, if it is none already. prev is what
// is stored, nil for nothing. The sidecar may go by what is revoked for replacedMS. It
// reports whether the sidecar has more revocations than are remembered: then the caller
// has to call forgetOldest, once what the sidecar has to let go of is recorded. Before,
// the one to go might be this very one, and nobody could tell it any more.
func (t *tx) revoke(prev *commandpb.Assignment, replacedMS uint64) (many bool) {
	return t.revokeFor("", prev, replacedMS)
}

// revokeFor is revoke for the sake of balance: the stages go to another sidecar, if that
// is not empty.
func (t *tx) revokeFor(sidecar string, prev *commandpb.Assignment, replacedMS uint64) (many bool) {
	if prev == nil || prev.Revoked {
		return false
	}
	next := &commandpb.Assignment{
		SidecarId: prev.SidecarId, PipelineId: prev.PipelineId, Revoked: true, PipelineVersion: prev.PipelineVersion,
		Replaced: t.replacedHops(prev, nil, replacedMS),
	}
	if sidecar != "" {
		next.Moved = &commandpb.Moved{SidecarId: sidecar, Stages: local(prev)}
	}
	revoked := t.saveAssignment(prev, next)
	ref := &commandpb.RevokedRef{SidecarId: next.SidecarId, PipelineId: next.PipelineId, Generation: next.Generation, TimeMs: t.now}
	// Nothing has ever been stored at the tail or behind it.
	t.storeIn(t.blind(t.buf.sequence(prefixRevokedQueue, t.clock.RevokedTail)), ref)
	t.clock.RevokedTail++
	if h := t.revocations[next.SidecarId]; h != nil {
		heap.Push(h, revocation{next.Generation, next.PipelineId})
	}
	return revoked > maxRevokedPerSidecar
}

// forget removes a revocation.
func (t *tx) forget(a *commandpb.Assignment) {
	t.remove(t.buf.pair(prefixAssignment, a.SidecarId, a.PipelineId))
	t.unmark(t.buf.pair(prefixByPipeline, a.PipelineId, a.SidecarId))
	t.countRevoked(a.SidecarId, -1)
	t.emit(TableAssignments, AssignmentKey(a.SidecarId, a.PipelineId), a, nil)
}

// purgeRevoked drops revocations that are too old or too many, up to one that is still
// remembered. The commands that make revocations call it, a bounded step
// each.
func (t *tx) purgeRevoked() {
	c := t.clock
	for range revokedPerPurge {
		if c.RevokedHead == c.RevokedTail {
			return
		}
		var ref commandpb.RevokedRef
		if k := t.buf.sequence(prefixRevokedQueue, c.RevokedHead); t.load(k, &ref) {
			if t.now <= ref.TimeMs+revokedRetentionMS && c.RevokedTail-c.RevokedHead <= maxRevoked {
				return
			}
			a := t.assignment(ref.SidecarId, ref.PipelineId)
			stands := a != nil && a.Revoked && a.Generation == ref.Generation
			if stands && t.needed(a) {
				return
			}
			t.remove(t.buf.sequence(prefixRevokedQueue, c.RevokedHead))
			if stands {
				t.forget(a)
			}
		}
		c.RevokedHead++
	}
}

// applyAssignments records what the planner decided, as far as what it was
// planned from still holds. What is stale is skipped and counted: the planner
// sees the newer state anyway and plans again.
//
// The changes of one pipeline are stale together. Its tables fit each other: were a
// stage given to one sidecar while taking it from another is void, because that one
// has registered again, both would run it. So would they if it was taken from one
// that nobody meant to wait for, as it had expired, and that lives again.
//
// Rejections: INVALID (ids, texts, a pair twice is fine), LIMIT.
func (t *tx) applyAssignments(c *commandpb.ApplyAssignments) *commandpb.Rejection {
	if len(c.Changes) > maxChanges {
		return limit("assignments", "%d changes, at most %d are allowed", len(c.Changes), maxChanges)
	}
	for _, ch := range c.Changes {
		if r := checkChange(ch); r != nil {
			return r
		}
	}
	t.warmChanges(len(c.Changes), func(i int) (string, string) { return c.Changes[i].SidecarId, c.Changes[i].PipelineId })
	var pipeline lastPipeline
	stale := make(map[string]bool)
	for _, ch := range c.Changes {
		if !stale[ch.PipelineId] && (!t.holds(ch, c.PlannedRevision, &pipeline) || c.Handovers && t.unasked(ch, &pipeline)) {
			stale[ch.PipelineId] = true
		}
	}
	claimed := make(claims)
	for _, ch := range c.Changes {
		if stale[ch.PipelineId] || !t.applyChange(ch, c, &pipeline, claimed) {
			t.res.Stale++
		}
		if t.err != nil {
			return nil
		}
	}
	t.purgeRevoked()
	return nil
}

func checkChange(ch *commandpb.AssignmentChange) *commandpb.Rejection {
	if r := first(checkID("sidecar id", ch.GetSidecarId()), checkID("pipeline id", ch.GetPipelineId())); r != nil {
		return r
	}
	if n := max(len(ch.Stages), len(ch.Releases)+len(ch.SharedReleases)); n > maxStageAssignments {
		return limit("assignment of "+ch.PipelineId, "%d stages, at most %d are allowed", n, maxStageAssignments)
	}
	if ch.MovedTo != "" {
		if r := checkID("sidecar id", ch.MovedTo); r != nil {
			return r
		}
	}
	for _, s := range slices.Concat(ch.Releases, ch.SharedReleases) {
		if r := checkID("stage id", s); r != nil {
			return r
		}
	}
	for _, s := range ch.Stages {
		if r := first(
			checkID("stage id", s.GetStageId()), checkText("local endpoint", s.GetLocalEndpoint()),
			checkText("remote sidecar", s.GetRemoteSidecarId()), checkText("remote endpoint", s.GetRemoteEndpoint()),
		); r != nil {
			return r
		}
	}
	return nil
}

// lastPipeline is the pipeline of the change before: changes of one pipeline stand
// together, and one of a thousand stages takes longer to decode than all the rest of
// a change.
type lastPipeline struct {
	id    string
	p     *commandpb.Pipeline // nil = there is none
	entry map[string]bool     // see entryStages; nil = not looked at
	// limits are how many may own an entry stage at a time, if they are counted.
	limits map[string]uint32
}

func (l *lastPipeline) load(t *tx, id string) *commandpb.Pipeline {
	if l.id != id {
		l.id, l.p, l.entry, l.limits = id, &commandpb.Pipeline{}, nil, nil
		if !t.load(t.buf.single(prefixPipeline, id), l.p) {
			l.p = nil
		}
	}
	return l.p
}

// mustWait is true for a stage that nobody may begin before who ran it has let go
// of it: an entry stage, or one that is not in the pipeline. What that was is not
// known any more, and it may be a source there again soon.
func (l *lastPipeline) mustWait(t *tx, id, stage string) bool {
	l.load(t, id)
	entry, known := l.entries()[stage]
	return entry || !known
}

func (l *lastPipeline) entries() map[string]bool {
	if l.entry == nil {
		l.entry = entryStages(l.p.GetSpec())
	}
	return l.entry
}

// limit is how many sidecars may own a stage of the pipeline at a time; 0 = it is
// not counted.
func (l *lastPipeline) limit(stage string) uint32 {
	if l.limits == nil {
		l.limits = make(map[string]uint32)
		entry := l.entries()
		for _, s := range l.p.GetSpec().GetStages() {
			if entry[s.GetId()] && s.GetParallelism() <= maxCountedOwners {
				l.limits[s.GetId()] = max(1, s.GetParallelism())
			}
		}
	}
	return l.limits[stage]
}

// unasked is true when a change takes a stage that has to be waited for from a
// sidecar that is there, and says nothing of waiting: it was expired when that was
// planned. Its generation does not tell, since it lives again with the one it had.
func (t *tx) unasked(ch *commandpb.AssignmentChange, pipeline *lastPipeline) bool {
	if !t.present(ch.SidecarId) {
		return false
	}
	had := local(t.assignment(ch.SidecarId, ch.PipelineId))
	if len(had) == 0 {
		return false
	}
	kept := make(map[string]bool, len(ch.Stages)+len(ch.Releases))
	for _, s := range ch.Releases {
		kept[s] = true
	}
	if !ch.Revoke {
		for _, s := range ch.Stages {
			kept[s.StageId] = kept[s.StageId] || s.RemoteSidecarId == ""
		}
	}
	return slices.ContainsFunc(had, func(s string) bool { return !kept[s] && pipeline.mustWait(t, ch.PipelineId, s) })
}

// holds says whether what a change was planned from is still so.
func (t *tx) holds(ch *commandpb.AssignmentChange, planned uint64, pipeline *lastPipeline) bool {
	// A sidecar or pipeline made after the plan is another one, whatever its
	// generation or version says: they begin at one again.
	newer := func(created uint64) bool { return planned != 0 && created > planned }
	sc, there := t.standing(ch.SidecarId)
	if there && (sc.generation != ch.SidecarGeneration || newer(sc.created)) {
		return false
	}
	if ch.Revoke {
		return true
	}
	if !there || sc.state == commandpb.SidecarState_SIDECAR_STATE_EXPIRED && sc.graceUntilMS == 0 {
		return false
	}
	p := pipeline.load(t, ch.PipelineId)
	return p != nil && p.Version == ch.PipelineVersion && !newer(p.CreateRevision) && p.GetSpec().GetEnabled()
}

// applyChange records one change of c that holds. It reports false, and nothing is
// recorded, when somebody else has yet to let go of what it gives.
func (t *tx) applyChange(ch *commandpb.AssignmentChange, c *commandpb.ApplyAssignments, pipeline *lastPipeline, claimed claims) bool {
	if ch.Revoke {
		prev := t.assignment(ch.SidecarId, ch.PipelineId)
		letGo, shared := released(ch, prev, nil)
		many := t.revokeFor(ch.MovedTo, prev, c.ReplacedMs)
		t.release(ch.SidecarId, ch.PipelineId, letGo, shared, ch.ReleaseTimeoutMs)
		if many {
			t.forgetOldest(ch.SidecarId)
		}
		claimed.note(t, ch.PipelineId, ch.SidecarId, letGo, local(prev), nil)
		return true
	}
	prev := t.assignment(ch.SidecarId, ch.PipelineId)
	next := &commandpb.Assignment{
		SidecarId: ch.SidecarId, PipelineId: ch.PipelineId, Stages: ch.Stages,
		LocalComplete: ch.LocalComplete, PipelineVersion: ch.PipelineVersion,
	}
	if prev != nil && !prev.Revoked && prev.LocalComplete == next.LocalComplete && prev.PipelineVersion == next.PipelineVersion &&
		slices.EqualFunc(prev.Stages, next.Stages, func(a, b *commandpb.StageAssignment) bool { return proto.Equal(a, b) }) {
		return true
	}
	had, has := local(prev), local(next)
	takes := slices.DeleteFunc(slices.Clone(has), func(s string) bool { return slices.Contains(had, s) })
	if c.Handovers && len(takes) > 0 {
		if pipeline.load(t, ch.PipelineId); !t.mayTake(claimed, ch.SidecarId, pipeline, takes) {
			return false
		}
	}
	if next.Replaced = t.replacedHops(prev, next.Stages, c.ReplacedMs); len(next.Replaced) > maxReplaced {
		return false
	}
	letGo, shared := released(ch, prev, has)
	t.saveAssignment(prev, next)
	t.retake(ch.SidecarId, ch.PipelineId, takes)
	t.release(ch.SidecarId, ch.PipelineId, letGo, shared, ch.ReleaseTimeoutMs)
	claimed.note(t, ch.PipelineId, ch.SidecarId, letGo, had, has)
	return true
}

// released returns those of a change's releases that the sidecar did run and does
// not run any more, and the same of its shared ones.
func released(ch *commandpb.AssignmentChange, prev *commandpb.Assignment, has []string) (releases, shared []string) {
	had := local(prev)
	pick := func(stages, without []string) (out []string) {
		for _, s := range stages {
			if slices.Contains(had, s) && !slices.Contains(has, s) && !slices.Contains(out, s) && !slices.Contains(without, s) {
				out = append(out, s)
			}
		}
		return out
	}
	releases = pick(ch.Releases, nil)
	return releases, pick(ch.SharedReleases, releases)
}
