package router

import (
	"bytes"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// putPipeline creates or replaces a pipeline. The same spec again is no change
// and keeps the version.
//
// Rejections: INVALID (id, text), LIMIT (size), EXISTS (expected version 0),
// NOT_FOUND and CONFLICT (expected version above 0).
func (t *tx) putPipeline(c *commandpb.PutPipeline) *commandpb.Rejection {
	spec := c.GetSpec()
	if spec == nil {
		return invalid("pipeline", "the command holds no pipeline")
	}
	if r := checkID("pipeline id", spec.Id); r != nil {
		return r
	}
	subject := "pipeline " + spec.Id
	if len(spec.Stages) > maxStages || len(spec.Edges) > maxEdges {
		return limit(subject, "it has %d stages and %d edges, at most %d and %d are allowed", len(spec.Stages), len(spec.Edges), maxStages, maxEdges)
	}
	if deepConditions(spec) {
		return limit(subject, "its conditions are nested deeper than %d", maxConditionDepth)
	}
	body, err := encode(spec)
	if err != nil {
		// Not the error's text: protobuf words it differently in each build,
		// and a remembered result is part of the state.
		return invalid(subject, "it cannot be stored: a text in it is not valid UTF-8")
	}
	if len(body) > maxSpecBytes {
		return limit(subject, "it is %d bytes long, at most %d are allowed", len(body), maxSpecBytes)
	}
	k := t.buf.single(prefixPipeline, spec.Id)
	prev := &commandpb.Pipeline{}
	if !t.load(k, prev) {
		prev = nil
	}
	if r := checkVersion(subject, prev, c.ExpectedVersion); r != nil {
		return r
	}
	next := &commandpb.Pipeline{
		Spec: spec, Version: 1, CreatedAtMs: t.now, UpdatedAtMs: t.now,
		CreateRevision: t.revision, ModRevision: t.revision,
	}
	if prev != nil {
		t.res.Existed = true
		old, err := encode(prev.Spec)
		t.fail(err)
		if bytes.Equal(old, body) {
			t.res.Version = prev.Version
			return nil
		}
		next.Version, next.CreatedAtMs, next.CreateRevision = prev.Version+1, prev.CreatedAtMs, prev.CreateRevision
	} else {
		t.count(countPipelines, 1)
	}
	t.store(k, next)
	t.emit(TablePipelines, spec.Id, message1(prev), next)
	t.res.Version = next.Version
	return nil
}

// message1 makes a nil interface of a nil pipeline.
func message1(p *commandpb.Pipeline) proto.Message {
	if p == nil {
		return nil
	}
	return p
}

// checkVersion is the compare of compare-and-set; prev is nil when the
// pipeline does not exist.
func checkVersion(subject string, prev *commandpb.Pipeline, expected *uint64) *commandpb.Rejection {
	switch {
	case expected == nil:
	case *expected == 0 && prev != nil:
		r := reject(commandpb.Code_CODE_EXISTS, subject, "it exists already, at version %d", prev.Version)
		r.Current = prev.Version
		return r
	case *expected == 0:
	case prev == nil:
		return reject(commandpb.Code_CODE_NOT_FOUND, subject, "version %d was expected, but it does not exist", *expected)
	case *expected != prev.Version:
		return conflict(subject, prev.Version, "version %d was expected, but it is at version %d; read it again and redo the change", *expected, prev.Version)
	}
	return nil
}

// deletePipeline removes a pipeline and revokes its assignments. Deleting what
// is not there succeeds with existed unset.
//
// Rejections: INVALID (id), CONFLICT (expected version).
func (t *tx) deletePipeline(c *commandpb.DeletePipeline) *commandpb.Rejection {
	if r := checkID("pipeline id", c.PipelineId); r != nil {
		return r
	}
	k := t.buf.single(prefixPipeline, c.PipelineId)
	prev := &commandpb.Pipeline{}
	if !t.load(k, prev) {
		return nil
	}
	if c.ExpectedVersion != nil && *c.ExpectedVersion != prev.Version {
		return checkVersion("pipeline "+c.PipelineId, prev, c.ExpectedVersion)
	}
	t.remove(k)
	t.count(countPipelines, -1)
	t.emit(TablePipelines, c.PipelineId, prev, nil)
	t.res.Existed, t.res.Version = true, prev.Version
	sidecars := t.assigned(c.PipelineId)
	t.warmChanges(len(sidecars), func(i int) (string, string) { return sidecars[i], c.PipelineId })
	var entry []string
	if c.ReleaseTimeoutMs > 0 {
		enters := entryStages(prev.Spec)
		for _, s := range prev.GetSpec().GetStages() {
			if enters[s.GetId()] {
				entry = append(entry, s.GetId())
			}
		}
	}
	var letGo []string
	for _, sidecar := range sidecars {
		ran := t.assignment(sidecar, c.PipelineId)
		letGo = letGo[:0]
		for _, s := range entry {
			if runs(ran, s) {
				letGo = append(letGo, s)
			}
		}
		many := t.revoke(ran, c.ReleaseTimeoutMs)
		t.release(sidecar, c.PipelineId, letGo, nil, c.ReleaseTimeoutMs)
		if many {
			t.forgetOldest(sidecar)
		}
	}
	t.purgeRevoked()
	return nil
}

// assigned lists the sidecars with an assignment of a pipeline, revoked ones included.
func (t *tx) assigned(pipeline string) []string {
	var sidecars []string
	t.scan(t.buf.group(prefixByPipeline, pipeline), func(k, _ []byte) {
		_, sidecar, err := decodePair(k)
		t.fail(err)
		sidecars = append(sidecars, sidecar)
	})
	return sidecars
}

// setPipelineEnabled switches a pipeline on or off; as it is already is no
// change.
//
// Rejections: INVALID (id), NOT_FOUND, EXISTS and CONFLICT (expected version).
func (t *tx) setPipelineEnabled(c *commandpb.SetPipelineEnabled) *commandpb.Rejection {
	if r := checkID("pipeline id", c.PipelineId); r != nil {
		return r
	}
	k := t.buf.single(prefixPipeline, c.PipelineId)
	prev, next := &commandpb.Pipeline{}, &commandpb.Pipeline{}
	if !t.load(k, prev) {
		return notFound("pipeline", c.PipelineId)
	}
	if r := checkVersion("pipeline "+c.PipelineId, prev, c.ExpectedVersion); r != nil {
		return r
	}
	t.res.Existed, t.res.Version = true, prev.Version
	if prev.GetSpec().GetEnabled() == c.Enabled || !t.load(k, next) || next.Spec == nil {
		return nil
	}
	next.Spec.Enabled, next.Abrupt = c.Enabled, c.Abrupt && !c.Enabled
	next.Version++
	next.UpdatedAtMs, next.ModRevision = t.now, t.revision
	t.store(k, next)
	t.emit(TablePipelines, c.PipelineId, prev, next)
	t.res.Version = next.Version
	return nil
}
