package rpc

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// adminAPI implements RouterAdmin.
//
// The operator decides between Create and Update by what its own status says,
// which may be wrong either way, and repeats Update and Enable without end. So
// both calls create or replace, and a call that would change nothing is
// answered from a linearizable read without touching the log.
type adminAPI struct {
	adminpb.UnimplementedRouterAdminServer
	*Server
}

// putResult is the outcome of creating or replacing a pipeline.
type putResult struct {
	version    uint64
	revision   uint64
	epoch      uint64
	violations []string
	refused    string
}

func (r *putResult) err() string {
	if len(r.violations) > 0 {
		return "the pipeline is not valid, nothing was changed: " + strings.Join(r.violations, "; ")
	}
	return r.refused
}

// CreatePipeline creates a pipeline, or replaces the one of that id.
func (a *adminAPI) CreatePipeline(ctx context.Context, req *adminpb.CreatePipelineRequest) (*adminpb.CreatePipelineResponse, error) {
	r, err := a.put(ctx, req.GetConfig(), comparison{req.ExpectedVersion, req.ExpectedEpoch}, req.GetValidateOnly())
	if err != nil {
		return nil, err
	}
	return &adminpb.CreatePipelineResponse{
		Success:    r.err() == "",
		PipelineId: req.GetConfig().GetId(),
		Error:      r.err(),
		Version:    r.version,
		Revision:   r.revision,
		Epoch:      r.epoch,
		Violations: r.violations,
	}, nil
}

// UpdatePipeline replaces a pipeline, or creates it.
func (a *adminAPI) UpdatePipeline(ctx context.Context, req *adminpb.UpdatePipelineRequest) (*adminpb.UpdatePipelineResponse, error) {
	cfg := req.GetConfig()
	if cfg == nil {
		return nil, invalid("config", "is missing")
	}
	if req.GetPipelineId() != "" {
		if cfg.Id == "" {
			cfg.Id = req.PipelineId
		}
		if cfg.Id != req.PipelineId {
			return nil, invalid("config.id", "%q differs from pipeline_id %q", cfg.Id, req.PipelineId)
		}
	}
	r, err := a.put(ctx, cfg, comparison{req.ExpectedVersion, req.ExpectedEpoch}, req.GetValidateOnly())
	if err != nil {
		return nil, err
	}
	return &adminpb.UpdatePipelineResponse{
		Success:    r.err() == "",
		Version:    r.version,
		Error:      r.err(),
		Revision:   r.revision,
		Epoch:      r.epoch,
		Violations: r.violations,
	}, nil
}

// comparison is what a compare-and-set insists on.
type comparison struct{ version, epoch *uint64 }

// fence returns the epoch a call insists on, nil when any will do. A version means
// something only together with the epoch it was read in: a restore may give the
// pipeline the same one again with another content. Who names none (clients from
// before epochs do not) read it in epoch 0, or else it cannot be known what they
// read. Version 0, "must not exist", was read nowhere and needs none.
func (c comparison) fence(ctx context.Context) (*uint64, error) {
	named, err := requestEpoch(ctx)
	switch {
	case err != nil:
		return nil, err
	case c.epoch != nil && named != nil && *c.epoch != *named:
		return nil, invalid("expected_epoch", "is %d, but the metadata %s says %d", *c.epoch, MetadataEpoch, *named)
	case c.epoch != nil:
		return c.epoch, nil
	case named == nil && c.version != nil && *c.version > 0:
		return new(uint64), nil
	}
	return named, nil
}

func (a *adminAPI) put(ctx context.Context, cfg *adminpb.PipelineConfig, c comparison, validateOnly bool) (*putResult, error) {
	if cfg == nil {
		return nil, invalid("config", "is missing")
	}
	if err := checkPipelineShape(proto.Size(cfg), cfg); err != nil {
		return nil, err
	}
	fence, err := c.fence(ctx)
	if err != nil {
		return nil, err
	}
	spec := specFromAPI(cfg)
	if v := router.ValidatePipeline(spec); len(v) > 0 {
		out := &putResult{violations: v, revision: a.cfg.State.Revision(), epoch: a.cfg.State.Epoch()}
		a.reader.SetHeader(ctx, out.revision, out.epoch)
		return out, nil
	}
	current, at, err := a.pipeline(ctx, spec.Id, fence)
	if err != nil {
		return nil, err
	}
	expected := c.version
	same := current != nil && proto.Equal(current.Spec, spec)
	matches := expected == nil || *expected == current.GetVersion()
	// A call with a request id goes to the log even when nothing is left to do:
	// an earlier attempt of it may still be on its way, and only the remembered
	// id keeps that one from undoing what others write from now on.
	request, err := requestID(ctx)
	if err != nil {
		return nil, err
	}
	if matches && (same && request == "" || validateOnly) {
		return &putResult{version: current.GetVersion(), revision: at.revision, epoch: at.epoch}, nil
	}
	if validateOnly {
		return nil, errVersion(spec.Id, *expected, current)
	}
	res, err := a.submit(ctx, &commandpb.Command{ExpectedEpoch: fence, Op: &commandpb.Command_PutPipeline{
		PutPipeline: &commandpb.PutPipeline{Spec: spec, ExpectedVersion: expected},
	}})
	if err != nil {
		return nil, err
	}
	out := &putResult{version: res.GetVersion(), revision: res.GetRevision(), epoch: res.GetEpoch()}
	if rej := res.GetRejection(); rej != nil {
		if comparisonFailed(rej, expected) {
			return nil, FromRejection(rej).Err()
		}
		out.violations, out.refused = rej.Violations, rej.Reason
	}
	return out, nil
}

// readPoint is what a read reflects at least.
type readPoint struct{ revision, epoch uint64 }

// pipeline reads one pipeline, nil when there is none, as current as can be: it
// decides whether a command is needed, so a request for stale reads does not
// apply to it. When the state is of another epoch than fence it fails.
func (a *adminAPI) pipeline(ctx context.Context, id string, fence *uint64) (*commandpb.Pipeline, readPoint, error) {
	if _, err := a.cfg.Node.ReadIndex(ctx); err != nil {
		// No read, no shortcut: Wait does the waiting for a leader.
		if err := a.reader.Wait(ctx); err != nil {
			return nil, readPoint{}, err
		}
	}
	v := a.cfg.State.Latest()
	defer v.Close()
	p, err := v.Pipeline(id)
	// After the read: a restore that came before it has raised the epoch before
	// it showed anything.
	if err == nil {
		err = a.reader.checkEpoch(readOptions{epoch: fence})
	}
	if err != nil {
		return nil, readPoint{}, err
	}
	a.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return p, readPoint{v.Revision(), v.Epoch()}, nil
}

// comparisonFailed says whether a compare-and-set was refused by its comparison.
// That is an error of the call, so that nobody takes the write for done.
func comparisonFailed(rej *commandpb.Rejection, expected *uint64) bool {
	if expected == nil {
		return false
	}
	switch rej.Code {
	case commandpb.Code_CODE_CONFLICT, commandpb.Code_CODE_EXISTS, commandpb.Code_CODE_NOT_FOUND:
		return true
	}
	return false
}

// errVersion refuses a compare-and-set whose comparison failed.
func errVersion(id string, expected uint64, p *commandpb.Pipeline) error {
	return FromRejection(&commandpb.Rejection{
		Code: commandpb.Code_CODE_CONFLICT,
		Reason: fmt.Sprintf("pipeline %q has version %d, expected was %d (0 = none); nothing was changed: read it again and redo",
			id, p.GetVersion(), expected),
		Subject: "pipeline " + id,
		Current: p.GetVersion(),
	}).Err()
}

func errUnknownPipeline(id string) error {
	return FromRejection(&commandpb.Rejection{
		Code:    commandpb.Code_CODE_NOT_FOUND,
		Reason:  fmt.Sprintf("there is no pipeline %q", id),
		Subject: "pipeline " + id,
	}).Err()
}

// DeletePipeline removes a pipeline. An unknown one is a success: the wish is
// fulfilled.
func (a *adminAPI) DeletePipeline(ctx context.Context, req *adminpb.DeletePipelineRequest) (*adminpb.DeletePipelineResponse, error) {
	id := req.GetPipelineId()
	if err := checkID("pipeline_id", id); err != nil {
		return nil, err
	}
	fence, err := comparison{req.ExpectedVersion, req.ExpectedEpoch}.fence(ctx)
	if err != nil {
		return nil, err
	}
	current, at, err := a.pipeline(ctx, id, fence)
	if err != nil {
		return nil, err
	}
	if current == nil {
		request, err := requestID(ctx)
		if err != nil {
			return nil, err
		}
		// A repeated request goes to the log, which remembers whether the first
		// one found the pipeline.
		if request == "" {
			return &adminpb.DeletePipelineResponse{Success: true, Revision: at.revision, Epoch: at.epoch}, nil
		}
	}
	res, err := a.submit(ctx, &commandpb.Command{ExpectedEpoch: fence, Op: &commandpb.Command_DeletePipeline{
		DeletePipeline: &commandpb.DeletePipeline{
			PipelineId: id, ExpectedVersion: req.ExpectedVersion, ReleaseTimeoutMs: uint64(a.cfg.HandoverTimeout.Milliseconds()),
		},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		if comparisonFailed(rej, req.ExpectedVersion) {
			return nil, FromRejection(rej).Err()
		}
		return &adminpb.DeletePipelineResponse{Error: rej.Reason, Revision: res.GetRevision(), Epoch: res.GetEpoch()}, nil
	}
	return &adminpb.DeletePipelineResponse{Success: true, Existed: res.GetExisted(), Revision: res.GetRevision(), Epoch: res.GetEpoch()}, nil
}

// EnablePipeline lets a pipeline be placed.
func (a *adminAPI) EnablePipeline(ctx context.Context, req *adminpb.EnablePipelineRequest) (*adminpb.EnablePipelineResponse, error) {
	r, err := a.setEnabled(ctx, req.GetPipelineId(), true, false, comparison{req.ExpectedVersion, req.ExpectedEpoch})
	if err != nil {
		return nil, err
	}
	return &adminpb.EnablePipelineResponse{
		Success: r.refused == "", Error: r.refused, Version: r.version, Revision: r.revision, Epoch: r.epoch,
	}, nil
}

// DisablePipeline takes a pipeline's stages from the sidecars. With drain they are
// told to finish what they hold, without it to stop. Either way a source is not
// started elsewhere, should the pipeline be enabled again, before its sidecar has let
// go of it. The router sees no records, so it cannot count what is pending.
func (a *adminAPI) DisablePipeline(ctx context.Context, req *adminpb.DisablePipelineRequest) (*adminpb.DisablePipelineResponse, error) {
	r, err := a.setEnabled(ctx, req.GetPipelineId(), false, !req.GetDrain(), comparison{req.ExpectedVersion, req.ExpectedEpoch})
	if err != nil {
		return nil, err
	}
	return &adminpb.DisablePipelineResponse{
		Success: r.refused == "", Error: r.refused, Version: r.version, Revision: r.revision, Epoch: r.epoch,
	}, nil
}

func (a *adminAPI) setEnabled(ctx context.Context, id string, enabled, abrupt bool, c comparison) (*putResult, error) {
	if err := checkID("pipeline_id", id); err != nil {
		return nil, err
	}
	fence, err := c.fence(ctx)
	if err != nil {
		return nil, err
	}
	current, at, err := a.pipeline(ctx, id, fence)
	if err != nil {
		return nil, err
	}
	expected := c.version
	request, err := requestID(ctx) // see put
	if err != nil {
		return nil, err
	}
	if request == "" && current != nil && current.GetSpec().GetEnabled() == enabled && (expected == nil || *expected == current.Version) {
		return &putResult{version: current.Version, revision: at.revision, epoch: at.epoch}, nil
	}
	res, err := a.submit(ctx, &commandpb.Command{ExpectedEpoch: fence, Op: &commandpb.Command_SetPipelineEnabled{
		SetPipelineEnabled: &commandpb.SetPipelineEnabled{PipelineId: id, Enabled: enabled, ExpectedVersion: expected, Abrupt: abrupt},
	}})
	if err != nil {
		return nil, err
	}
	out := &putResult{version: res.GetVersion(), revision: res.GetRevision(), epoch: res.GetEpoch()}
	if rej := res.GetRejection(); rej != nil {
		if comparisonFailed(rej, expected) {
			return nil, FromRejection(rej).Err()
		}
		out.refused = rej.Reason
	}
	return out, nil
}

// GetPipeline returns one pipeline and how it is placed.
func (a *adminAPI) GetPipeline(ctx context.Context, req *adminpb.GetPipelineRequest) (*adminpb.GetPipelineResponse, error) {
	if err := checkID("pipeline_id", req.GetPipelineId()); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	p, err := v.Pipeline(req.PipelineId)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return &adminpb.GetPipelineResponse{Revision: v.Revision(), Epoch: v.Epoch()}, nil
	}
	st, err := a.newPlacementReader(ctx, v, req.PipelineId).status(p)
	if err != nil {
		return nil, err
	}
	return &adminpb.GetPipelineResponse{Found: true, Config: configToAPI(p.Spec), Status: st, Revision: v.Revision(), Epoch: v.Epoch()}, nil
}

// ListPipelines lists pipelines by id, all of them or in pages.
func (a *adminAPI) ListPipelines(ctx context.Context, req *adminpb.ListPipelinesRequest) (*adminpb.ListPipelinesResponse, error) {
	after := req.GetPageToken()
	if err := checkOptionalID("page_token", after); err != nil {
		return nil, err
	}
	limit := int(min(req.GetPageSize(), MaxPageSize)) // 0 = all
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &adminpb.ListPipelinesResponse{Revision: v.Revision(), Epoch: v.Epoch()}
	placements := a.newPlacementReader(ctx, v, "")
	var inner error
	size := 0
	err = v.Pipelines(after, 0, func(p *commandpb.Pipeline) bool {
		if !p.GetSpec().GetEnabled() && !req.GetIncludeDisabled() {
			return true
		}
		if limit > 0 && len(resp.Pipelines) == limit {
			resp.NextPageToken = resp.Pipelines[limit-1].Id
			return false
		}
		var st *adminpb.PipelineStatus
		if st, inner = placements.status(p); inner != nil {
			return false
		}
		resp.Pipelines = append(resp.Pipelines, configToAPI(p.Spec))
		resp.Statuses = append(resp.Statuses, st)
		size += p.SizeVT()
		return size <= maxAnswerBytes
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return nil, err
	}
	if size > maxAnswerBytes {
		return nil, status.Errorf(codes.ResourceExhausted, "the list exceeds %d bytes; ask for it in pages (page_size)", maxAnswerBytes)
	}
	return resp, nil
}
