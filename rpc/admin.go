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
	r, err := a.put(ctx, req.GetConfig(), req.ExpectedVersion, req.GetValidateOnly())
	if err != nil {
		return nil, err
	}
	return &adminpb.CreatePipelineResponse{
		Success:    r.err() == "",
		PipelineId: req.GetConfig().GetId(),
		Error:      r.err(),
		Version:    r.version,
		Revision:   r.revision,
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
	r, err := a.put(ctx, cfg, req.ExpectedVersion, req.GetValidateOnly())
	if err != nil {
		return nil, err
	}
	return &adminpb.UpdatePipelineResponse{
		Success:    r.err() == "",
		Version:    r.version,
		Error:      r.err(),
		Revision:   r.revision,
		Violations: r.violations,
	}, nil
}

func (a *adminAPI) put(ctx context.Context, cfg *adminpb.PipelineConfig, expected *uint64, validateOnly bool) (*putResult, error) {
	if cfg == nil {
		return nil, invalid("config", "is missing")
	}
	if err := checkPipelineShape(proto.Size(cfg), cfg); err != nil {
		return nil, err
	}
	spec := specFromAPI(cfg)
	if v := router.ValidatePipeline(spec); len(v) > 0 {
		revision := a.cfg.State.Revision()
		a.reader.SetHeader(ctx, revision, a.cfg.State.Epoch())
		return &putResult{violations: v, revision: revision}, nil
	}
	current, revision, err := a.pipeline(ctx, spec.Id)
	if err != nil {
		return nil, err
	}
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
		return &putResult{version: current.GetVersion(), revision: revision}, nil
	}
	if validateOnly {
		return nil, errVersion(spec.Id, *expected, current)
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_PutPipeline{
		PutPipeline: &commandpb.PutPipeline{Spec: spec, ExpectedVersion: expected},
	}})
	if err != nil {
		return nil, err
	}
	out := &putResult{version: res.GetVersion(), revision: res.GetRevision()}
	if rej := res.GetRejection(); rej != nil {
		if comparisonFailed(rej, expected) {
			return nil, FromRejection(rej).Err()
		}
		out.violations, out.refused = rej.Violations, rej.Reason
	}
	return out, nil
}

// pipeline reads one pipeline, nil when there is none, and the revision of the
// read, as current as can be: it decides whether a command is needed, so a
// request for stale reads does not apply to it.
func (a *adminAPI) pipeline(ctx context.Context, id string) (*commandpb.Pipeline, uint64, error) {
	if _, err := a.cfg.Node.ReadIndex(ctx); err != nil {
		// No read, no shortcut: Wait does the waiting for a leader.
		if err := a.reader.Wait(ctx); err != nil {
			return nil, 0, err
		}
	}
	v := a.cfg.State.Latest()
	defer v.Close()
	p, err := v.Pipeline(id)
	if err != nil {
		return nil, 0, err
	}
	a.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return p, v.Revision(), nil
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
	current, revision, err := a.pipeline(ctx, id)
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
			return &adminpb.DeletePipelineResponse{Success: true, Revision: revision}, nil
		}
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_DeletePipeline{
		DeletePipeline: &commandpb.DeletePipeline{PipelineId: id, ExpectedVersion: req.ExpectedVersion},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		if comparisonFailed(rej, req.ExpectedVersion) {
			return nil, FromRejection(rej).Err()
		}
		return &adminpb.DeletePipelineResponse{Error: rej.Reason, Revision: res.GetRevision()}, nil
	}
	return &adminpb.DeletePipelineResponse{Success: true, Existed: res.GetExisted(), Revision: res.GetRevision()}, nil
}

// EnablePipeline lets a pipeline be placed.
func (a *adminAPI) EnablePipeline(ctx context.Context, req *adminpb.EnablePipelineRequest) (*adminpb.EnablePipelineResponse, error) {
	r, err := a.setEnabled(ctx, req.GetPipelineId(), true, req.ExpectedVersion)
	if err != nil {
		return nil, err
	}
	return &adminpb.EnablePipelineResponse{
		Success: r.refused == "", Error: r.refused, Version: r.version, Revision: r.revision,
	}, nil
}

// DisablePipeline takes a pipeline's stages from the sidecars, which finish what
// they hold. The router sees no records, so it cannot count what is pending.
func (a *adminAPI) DisablePipeline(ctx context.Context, req *adminpb.DisablePipelineRequest) (*adminpb.DisablePipelineResponse, error) {
	r, err := a.setEnabled(ctx, req.GetPipelineId(), false, req.ExpectedVersion)
	if err != nil {
		return nil, err
	}
	return &adminpb.DisablePipelineResponse{
		Success: r.refused == "", Error: r.refused, Version: r.version, Revision: r.revision,
	}, nil
}

func (a *adminAPI) setEnabled(ctx context.Context, id string, enabled bool, expected *uint64) (*putResult, error) {
	if err := checkID("pipeline_id", id); err != nil {
		return nil, err
	}
	current, revision, err := a.pipeline(ctx, id)
	if err != nil {
		return nil, err
	}
	request, err := requestID(ctx) // see put
	if err != nil {
		return nil, err
	}
	if request == "" && current != nil && current.GetSpec().GetEnabled() == enabled && (expected == nil || *expected == current.Version) {
		return &putResult{version: current.Version, revision: revision}, nil
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_SetPipelineEnabled{
		SetPipelineEnabled: &commandpb.SetPipelineEnabled{PipelineId: id, Enabled: enabled, ExpectedVersion: expected},
	}})
	if err != nil {
		return nil, err
	}
	out := &putResult{version: res.GetVersion(), revision: res.GetRevision()}
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
		return &adminpb.GetPipelineResponse{Revision: v.Revision()}, nil
	}
	st, err := a.newPlacementReader(v).status(p)
	if err != nil {
		return nil, err
	}
	return &adminpb.GetPipelineResponse{Found: true, Config: configToAPI(p.Spec), Status: st, Revision: v.Revision()}, nil
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
	resp := &adminpb.ListPipelinesResponse{Revision: v.Revision()}
	placements := a.newPlacementReader(v)
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
