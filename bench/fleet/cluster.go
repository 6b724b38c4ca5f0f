package fleet

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// listPage is how many records are asked for at a time: an answer has to stay
// below what gRPC takes.
const listPage = 1000

// askTimeout bounds one question to the cluster.
const askTimeout = 10 * time.Second

// status asks a node what it knows of the cluster.
func (f *Fleet) status(ctx context.Context) (*adminpb.GetClusterStatusResponse, error) {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale"), askTimeout)
	defer cancel()
	st, err := adminpb.NewRouterAdminClient(f.ask).GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{}, grpc.WaitForReady(true))
	if err == nil && st.GetLeaderId() == 0 {
		err = errors.New("no node leads")
	}
	return st, err
}

// put makes a pipeline what it is to be; it repeats what was not done.
func (f *Fleet) put(ctx context.Context, p *adminpb.PipelineConfig) error {
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		call, cancel := context.WithTimeout(ctx, askTimeout)
		reply, err := adminpb.NewRouterAdminClient(f.ask).UpdatePipeline(call,
			&adminpb.UpdatePipelineRequest{PipelineId: p.Id, Config: p}, grpc.WaitForReady(true))
		cancel()
		if err == nil && !reply.GetSuccess() {
			return fmt.Errorf("fleet: pipeline %s was refused: %s %v", p.Id, reply.GetError(), reply.GetViolations())
		}
		// Putting the same content twice changes nothing the second time.
		if err == nil || !pause(ctx, wait) {
			return errors.Join(err, ctx.Err())
		}
	}
}

// turnForm gives pipeline p another form.
func (f *Fleet) turnForm(ctx context.Context, p int) error {
	f.forms[p]++
	return f.put(ctx, f.content.pipeline(p, f.forms[p]))
}

func (f *Fleet) deletePipeline(ctx context.Context, id string) error {
	call, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := adminpb.NewRouterAdminClient(f.ask).DeletePipeline(call, &adminpb.DeletePipelineRequest{PipelineId: id, Force: true}, grpc.WaitForReady(true))
	return err
}

// placed returns nil once every stage of our pipelines runs on sidecars that
// allowed accepts; else what is missing.
func (f *Fleet) placed(ctx context.Context, allowed func(i int) bool) error {
	token := ""
	for {
		call, cancel := context.WithTimeout(ctx, askTimeout)
		page, err := adminpb.NewRouterAdminClient(f.ask).ListPipelines(call, &adminpb.ListPipelinesRequest{PageSize: listPage, PageToken: token})
		cancel()
		if err != nil {
			return err
		}
		for k, p := range page.GetPipelines() {
			if _, ours := pipelineIndex(p.GetId()); !ours {
				continue
			}
			on := make(map[string][]string)
			for _, pl := range page.GetStatuses()[k].GetPlacements() {
				on[pl.GetStageId()] = pl.GetSidecarIds()
				if len(pl.GetSidecarIds()) == 0 {
					return fmt.Errorf("stage %s of %s is not placed: %s", pl.GetStageId(), p.GetId(), pl.GetPendingReason())
				}
			}
			for _, st := range p.GetStages() {
				if len(on[st.GetId()]) == 0 {
					return fmt.Errorf("stage %s of %s is not placed", st.GetId(), p.GetId())
				}
				for _, id := range on[st.GetId()] {
					if i, ours := sidecarIndex(id); ours && !allowed(i) {
						return fmt.Errorf("stage %s of %s is still on %s", st.GetId(), p.GetId(), id)
					}
				}
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			return nil
		}
	}
}

// agreed returns nil once every sidecar that is up was told exactly what the
// cluster holds for it. With watchersOnly the others, which learn it with their
// next heartbeats, are left out.
func (f *Fleet) agreed(ctx context.Context, watchersOnly bool) error {
	token, found := "", 0
	for {
		call, cancel := context.WithTimeout(ctx, askTimeout)
		page, err := clusterpb.NewClusterClient(f.ask).ListSidecars(call,
			&clusterpb.ListSidecarsRequest{Namespace: namespace, PageSize: listPage, PageToken: token})
		cancel()
		if err != nil {
			return err
		}
		for _, info := range page.GetSidecars() {
			i, ours := sidecarIndex(info.GetSidecarId())
			if !ours || i >= len(f.sidecars) {
				continue
			}
			found++
			if err := f.agrees(i, info.GetAssignments(), watchersOnly); err != nil {
				return err
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if found != len(f.sidecars) {
		return fmt.Errorf("the cluster knows %d of the %d sidecars", found, len(f.sidecars))
	}
	return nil
}

func (f *Fleet) agrees(i int, want []*sidecarpb.PipelineAssignment, watchersOnly bool) error {
	s := &f.sidecars[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.held
	switch {
	case !s.up:
		return nil
	case s.view != nil:
		held = s.view.held
		if !s.view.synced {
			return fmt.Errorf("%s is not synced", sidecarID(i))
		}
	case watchersOnly:
		return nil
	}
	diff, err := differs(held, want)
	if err == nil && diff != "" {
		err = fmt.Errorf("%s %s", sidecarID(i), diff)
	}
	return err
}

// followLiveness counts what the cluster thinks of our sidecars, from the
// change feed of whichever node answers. With a gap in it a lost lease could be
// missed, so that is a fault.
func (f *Fleet) followLiveness() {
	var from, epoch uint64
	for f.ctx.Err() == nil {
		stream, err := clusterpb.NewClusterClient(f.ask).WatchChanges(f.ctx, &clusterpb.WatchChangesRequest{
			FromRevision: from, FromEpoch: epoch, Tables: []string{"sidecars"},
		}, grpc.WaitForReady(true))
		for err == nil {
			var ev *clusterpb.ChangeEvent
			if ev, err = stream.Recv(); err != nil {
				break
			}
			from, epoch = ev.GetRevision(), ev.GetEpoch()
			if _, ours := sidecarIndex(ev.GetKey()); ours {
				f.tally.changed(ev.GetState())
			}
		}
		if status.Code(err) == codes.OutOfRange {
			f.tally.fault("changes of the sidecars' liveness were missed: %s", status.Convert(err).Message())
			from, epoch = 0, 0
		}
		pause(f.ctx, 100*time.Millisecond)
	}
}
