package rpc

import (
	"context"
	"fmt"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// maxDrain bounds the deadline of a drain.
	maxDrain = 24 * time.Hour
	// defaultLeave is the deadline of a drain that ends with the removal of the
	// sidecar.
	defaultLeave = 5 * time.Minute
)

// drainTimeout checks the deadline of a drain, in milliseconds.
func drainTimeout(field string, ms uint64, leaves bool) (uint64, error) {
	if ms > uint64(maxDrain.Milliseconds()) {
		return 0, invalid(field, "%d ms, the limit is %d", ms, maxDrain.Milliseconds())
	}
	if ms == 0 && leaves {
		ms = uint64(defaultLeave.Milliseconds())
	}
	return ms, nil
}

// DrainSidecar marks a sidecar as draining. It answers once that is recorded; the
// stages move afterwards, which GetSidecar shows.
func (a *clusterAPI) DrainSidecar(ctx context.Context, req *clusterpb.DrainSidecarRequest) (*clusterpb.DrainSidecarResponse, error) {
	if err := checkID("sidecar_id", req.GetSidecarId()); err != nil {
		return nil, err
	}
	timeout, err := drainTimeout("deadline_ms", req.GetDeadlineMs(), req.GetRemove())
	if err != nil {
		return nil, err
	}
	info, res, err := a.changeSidecar(ctx, req.SidecarId, &commandpb.Command{Op: &commandpb.Command_DrainSidecar{
		DrainSidecar: &commandpb.DrainSidecar{SidecarId: req.SidecarId, TimeoutMs: timeout, Leaves: req.Remove},
	}})
	return &clusterpb.DrainSidecarResponse{Sidecar: info, Revision: res.GetRevision()}, err
}

// UndrainSidecar lets a sidecar be given stages again.
func (a *clusterAPI) UndrainSidecar(ctx context.Context, req *clusterpb.UndrainSidecarRequest) (*clusterpb.UndrainSidecarResponse, error) {
	if err := checkID("sidecar_id", req.GetSidecarId()); err != nil {
		return nil, err
	}
	info, res, err := a.changeSidecar(ctx, req.SidecarId, &commandpb.Command{Op: &commandpb.Command_UndrainSidecar{
		UndrainSidecar: &commandpb.UndrainSidecar{SidecarId: req.SidecarId},
	}})
	ended := res.GetChanged()
	return &clusterpb.UndrainSidecarResponse{Sidecar: info, Revision: res.GetRevision(), WasDraining: &ended}, err
}

// changeSidecar replicates cmd and shows the sidecar as it then is; nil when it was
// removed since.
func (a *clusterAPI) changeSidecar(ctx context.Context, id string, cmd *commandpb.Command) (*clusterpb.SidecarInfo, *commandpb.Result, error) {
	res, err := a.submit(ctx, cmd)
	if err != nil {
		return nil, nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return nil, nil, FromRejection(rej).Err()
	}
	if err := a.reader.waitRevision(ctx, res.GetRevision()); err != nil {
		return nil, nil, err
	}
	v := a.cfg.State.View()
	defer v.Close()
	s, err := v.Sidecar(id)
	if err != nil || s == nil {
		return nil, res, err
	}
	info, err := sidecarInfo(v, s, nil)
	return info, res, err
}

// releasesBySidecar reads what the sidecars with ids from first to last have yet to let
// go of.
func releasesBySidecar(v *router.View, first, last string) (map[string][]*clusterpb.PendingRelease, error) {
	out := make(map[string][]*clusterpb.PendingRelease)
	err := v.SidecarHandovers(first, last, func(h *commandpb.Handover) bool {
		for _, r := range h.Releases {
			out[h.SidecarId] = append(out[h.SidecarId], &clusterpb.PendingRelease{
				PipelineId: h.PipelineId, StageId: r.StageId, Revision: r.Revision, Deadline: timestampMs(r.DeadlineMs),
			})
		}
		return true
	})
	return out, err
}

// placementLabels reads where a sidecar runs and how much it can take from its
// labels. What is no capacity is warned of and counts as none.
func placementLabels(rec *commandpb.Sidecar, labels map[string]string) (warnings []string) {
	rec.Zone, rec.Node = labels[router.LabelZone], labels[router.LabelNode]
	text, ok := labels[router.LabelCapacity]
	if !ok {
		return nil
	}
	if rec.Capacity, ok = router.Capacity(text); !ok {
		return []string{fmt.Sprintf("the label %s of sidecar %s is %q, which is no whole number from 1 to %d; %d is taken instead",
			router.LabelCapacity, rec.SidecarId, text, router.MaxCapacity, router.DefaultCapacity)}
	}
	return nil
}
