package rpc

import (
	"context"
	"slices"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/commonpb"
)

// checkpointAPI implements CheckpointService.
type checkpointAPI struct {
	checkpointpb.UnimplementedCheckpointServiceServer
	*Server
}

// refusal returns nil when a refusal belongs into the reply (an offset that
// would move backwards), and the error to fail the call with when it does not:
// whoever is fenced off must not be able to overlook it.
func refusal(rej *commandpb.Rejection) error {
	if rej.GetCode() == commandpb.Code_CODE_REGRESSION {
		return nil
	}
	return FromRejection(rej).Err()
}

// CommitOffset stores how far a source has been read. It moves forward only,
// unless forced.
func (a *checkpointAPI) CommitOffset(ctx context.Context, req *checkpointpb.CommitOffsetRequest) (*checkpointpb.CommitOffsetResponse, error) {
	if err := checkCommitOffset(req.GetSourceId(), req.GetTimestamp()); err != nil {
		return nil, err
	}
	op := &commandpb.CommitSourceOffset{
		SourceId: req.SourceId, Partition: req.Partition, Offset: req.Offset, Force: req.Force,
	}
	op.TimeS, op.TimeNs = splitTimestamp(req.Timestamp)
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: op}})
	if err != nil {
		return nil, err
	}
	if rej := res.Rejection; rej != nil {
		if err := refusal(rej); err != nil {
			return nil, err
		}
		return &checkpointpb.CommitOffsetResponse{Revision: res.Revision, CurrentOffset: rej.Current, Error: rej.Reason}, nil
	}
	return &checkpointpb.CommitOffsetResponse{Success: true, Revision: res.Revision, CurrentOffset: res.Offset}, nil
}

// GetSourceOffset returns the offsets of a source, or of one partition of it.
func (a *checkpointAPI) GetSourceOffset(ctx context.Context, req *checkpointpb.GetOffsetRequest) (*checkpointpb.GetOffsetResponse, error) {
	if err := checkID("source_id", req.GetSourceId()); err != nil {
		return nil, err
	}
	resp := &checkpointpb.GetOffsetResponse{
		Offsets: make(map[uint32]uint64), Timestamps: make(map[uint32]*timestamppb.Timestamp),
	}
	add := func(partition uint32, o *commandpb.Offset) bool {
		resp.Offsets[partition] = o.Offset
		if ts := timestampOf(o.TimeS, o.TimeNs); ts != nil {
			resp.Timestamps[partition] = ts
		}
		return true
	}
	v, err := a.latest(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp.Revision = v.Revision()
	if req.Partition == nil {
		return resp, v.SourceOffsets(req.SourceId, add)
	}
	o, err := v.SourceOffset(req.SourceId, req.GetPartition())
	if err != nil {
		return nil, err
	}
	if o != nil {
		add(req.GetPartition(), o)
	}
	return resp, nil
}

// ReportWatermark stores how far event time has come in one partition and
// answers the minimum over all partitions of the source.
func (a *checkpointAPI) ReportWatermark(ctx context.Context, req *checkpointpb.WatermarkRequest) (*checkpointpb.WatermarkResponse, error) {
	w := req.GetWatermark()
	if err := checkWatermark(w); err != nil {
		return nil, err
	}
	op := &commandpb.AdvanceWatermark{
		SourceId: w.SourceId, Partition: w.Partition, Position: w.Position, Force: req.Force,
	}
	op.TimeS, op.TimeNs = splitTimestamp(w.Timestamp)
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_AdvanceWatermark{AdvanceWatermark: op}})
	if err != nil {
		return nil, err
	}
	resp := &checkpointpb.WatermarkResponse{
		Accepted: res.Rejection == nil, Revision: res.Revision, CurrentGlobalWatermark: watermarkToAPI(res.Watermark),
	}
	if rej := res.Rejection; rej != nil {
		if err := refusal(rej); err != nil {
			return nil, err
		}
		resp.Error = rej.Reason
		if resp.CurrentGlobalWatermark == nil {
			// The refusal is certain; it does not become unknown because there is
			// no time left to read what goes with it.
			resp.CurrentGlobalWatermark, err = a.globalWatermark(ctx, w.SourceId, res.Revision)
			if err != nil && ctx.Err() == nil {
				return nil, err
			}
		}
	}
	return resp, nil
}

// globalWatermark reads the source's minimum from this node once it has applied
// revision.
func (a *checkpointAPI) globalWatermark(ctx context.Context, source string, revision uint64) (*commonpb.Watermark, error) {
	if err := a.reader.waitRevision(ctx, revision); err != nil {
		return nil, err
	}
	v := a.cfg.State.View()
	defer v.Close()
	w, err := v.GlobalWatermark(source)
	return watermarkToAPI(w), err
}

// GetWatermark returns the watermarks of a source, or of one partition of it,
// and their minimum over all partitions.
func (a *checkpointAPI) GetWatermark(ctx context.Context, req *checkpointpb.GetWatermarkRequest) (*checkpointpb.GetWatermarkResponse, error) {
	if err := checkID("source_id", req.GetSourceId()); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &checkpointpb.GetWatermarkResponse{Revision: v.Revision()}
	global, err := v.GlobalWatermark(req.SourceId)
	if err != nil {
		return nil, err
	}
	resp.GlobalWatermark = watermarkToAPI(global)
	return resp, v.Watermarks(req.SourceId, func(w *commandpb.Watermark) bool {
		if req.Partition == nil || req.GetPartition() == w.Partition {
			resp.Watermarks = append(resp.Watermarks, watermarkToAPI(w))
		}
		return true
	})
}

// SaveCheckpoint stores the newest checkpoint of a service. Without an id it is
// given one.
func (a *checkpointAPI) SaveCheckpoint(ctx context.Context, req *checkpointpb.SaveCheckpointRequest) (*checkpointpb.SaveCheckpointResponse, error) {
	if err := checkCheckpoint(req.GetServiceId(), req.GetCheckpointId(), req.GetData()); err != nil {
		return nil, err
	}
	if err := checkCheckpointOffsets(req.GetSourceOffsets()); err != nil {
		return nil, err
	}
	id := req.CheckpointId
	if id == "" {
		request, err := requestID(ctx)
		if err != nil {
			return nil, err
		}
		id = checkpointID(request, req.ServiceId)
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{
		SaveCheckpoint: &commandpb.SaveCheckpoint{
			ServiceId:     req.ServiceId,
			CheckpointId:  id,
			Data:          req.Data,
			SourceOffsets: checkpointOffsetsFromAPI(req.SourceOffsets),
		},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.Rejection; rej != nil {
		return nil, FromRejection(rej).Err()
	}
	return &checkpointpb.SaveCheckpointResponse{
		Success: true, CheckpointId: id, CreatedAt: timestampMs(res.TimeMs), Revision: res.Revision,
	}, nil
}

// checkpointID makes an id for a checkpoint that came without one, the same for
// a repeated request.
func checkpointID(request, service string) string {
	if request == "" {
		return uuid.NewString()
	}
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte("conveyor checkpoint\x00"+request+"\x00"+service)).String()
}

// GetCheckpoint returns the newest checkpoint of a service.
func (a *checkpointAPI) GetCheckpoint(ctx context.Context, req *checkpointpb.GetCheckpointRequest) (*checkpointpb.GetCheckpointResponse, error) {
	if err := checkID("service_id", req.GetServiceId()); err != nil {
		return nil, err
	}
	v, err := a.latest(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	cp, err := v.Checkpoint(req.ServiceId)
	if err != nil {
		return nil, err
	}
	if cp == nil {
		return &checkpointpb.GetCheckpointResponse{Revision: v.Revision()}, nil
	}
	return &checkpointpb.GetCheckpointResponse{
		Found:         true,
		CheckpointId:  cp.CheckpointId,
		Data:          cp.Data,
		SourceOffsets: checkpointOffsetsToAPI(cp.SourceOffsets),
		CreatedAt:     timestampMs(cp.CreatedAtMs),
		Revision:      v.Revision(),
	}, nil
}

// GetGroupOffsets returns what a group has committed, of one source or of all.
func (a *checkpointAPI) GetGroupOffsets(ctx context.Context, req *checkpointpb.GetGroupOffsetsRequest) (*checkpointpb.GetGroupOffsetsResponse, error) {
	if err := checkID("group_id", req.GetGroupId()); err != nil {
		return nil, err
	}
	if err := checkOptionalID("source_id", req.GetSourceId()); err != nil {
		return nil, err
	}
	v, err := a.latest(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &checkpointpb.GetGroupOffsetsResponse{
		SourceOffsets: make(map[string]*checkpointpb.PartitionOffsets), Revision: v.Revision(),
	}
	return resp, v.GroupOffsets(req.GroupId, req.GetSourceId(), func(source string, partition uint32, o *commandpb.Offset) bool {
		addOffset(resp.SourceOffsets, source, partition, o.Offset)
		return true
	})
}

// CommitGroupOffset stores how far a group has read a partition. With a service
// id and a generation it is refused once the partition has another owner.
func (a *checkpointAPI) CommitGroupOffset(ctx context.Context, req *checkpointpb.CommitGroupOffsetRequest) (*checkpointpb.CommitGroupOffsetResponse, error) {
	if err := checkGroupOffset(req.GetGroupId(), req.GetSourceId(), req.GetServiceId(), req.GetTimestamp()); err != nil {
		return nil, err
	}
	op := &commandpb.CommitGroupOffset{
		GroupId: req.GroupId, SourceId: req.SourceId, Partition: req.Partition, Offset: req.Offset,
		ServiceId: req.ServiceId, Generation: req.Generation, Force: req.Force,
	}
	op.TimeS, op.TimeNs = splitTimestamp(req.Timestamp)
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_CommitGroupOffset{CommitGroupOffset: op}})
	if err != nil {
		return nil, err
	}
	if rej := res.Rejection; rej != nil {
		if err := refusal(rej); err != nil {
			return nil, err
		}
		return &checkpointpb.CommitGroupOffsetResponse{Revision: res.Revision, CurrentOffset: rej.Current, Error: rej.Reason}, nil
	}
	return &checkpointpb.CommitGroupOffsetResponse{Success: true, Revision: res.Revision, CurrentOffset: res.Offset}, nil
}

// GetPipelineCheckpoints returns the checkpoints, offsets and watermarks that
// belong to a pipeline: those kept under the service names its stages select,
// and under the ids of the services registered by these names. Together they
// are of one revision.
func (a *checkpointAPI) GetPipelineCheckpoints(ctx context.Context, req *checkpointpb.GetPipelineCheckpointsRequest) (*checkpointpb.GetPipelineCheckpointsResponse, error) {
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
		return nil, errUnknownPipeline(req.PipelineId)
	}
	ids, err := ownersOf(v, p.GetSpec())
	if err != nil {
		return nil, err
	}
	resp := &checkpointpb.GetPipelineCheckpointsResponse{
		SourceOffsets: make(map[string]*checkpointpb.PartitionOffsets), Revision: v.Revision(),
	}
	for _, id := range ids {
		cp, err := v.Checkpoint(id)
		if err != nil {
			return nil, err
		}
		if cp != nil {
			resp.ServiceCheckpoints = append(resp.ServiceCheckpoints, &checkpointpb.ServiceCheckpoint{
				ServiceId: cp.ServiceId, CheckpointId: cp.CheckpointId, Data: cp.Data, CreatedAt: timestampMs(cp.CreatedAtMs),
			})
		}
		err = v.SourceOffsets(id, func(partition uint32, o *commandpb.Offset) bool {
			addOffset(resp.SourceOffsets, id, partition, o.Offset)
			return true
		})
		if err != nil {
			return nil, err
		}
		err = v.Watermarks(id, func(w *commandpb.Watermark) bool {
			resp.Watermarks = append(resp.Watermarks, watermarkToAPI(w))
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// ownersOf lists the ids under which state of a pipeline may be kept, sorted.
func ownersOf(v *router.View, spec *commandpb.PipelineSpec) ([]string, error) {
	var ids []string
	for _, st := range spec.GetStages() {
		name := st.GetSelector().GetServiceName()
		if name == "" {
			continue
		}
		if router.CheckID(name) == "" {
			ids = append(ids, name)
		}
		f := serviceFilter{labels: st.GetSelector().GetLabels(), unhealthy: true}
		group := st.GetSelector().GetGroupId()
		err := v.ServicesNamed(name, func(s *commandpb.Service) bool {
			if f.matches(s) && (group == "" || s.GroupId == group) {
				ids = append(ids, s.ServiceId)
			}
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
