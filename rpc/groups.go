package rpc

import (
	"context"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// defaultPartitions is the partition count of a group that nobody named a count
// for.
const defaultPartitions = 16

// JoinGroup makes a service a member of a group, creating the group if need be,
// and answers the partitions it holds now. Later changes come with its
// heartbeats.
func (a *registryAPI) JoinGroup(ctx context.Context, req *registrypb.JoinGroupRequest) (*registrypb.JoinGroupResponse, error) {
	if err := checkID("service_id", req.GetServiceId()); err != nil {
		return nil, err
	}
	if err := checkID("group_id", req.GetGroupId()); err != nil {
		return nil, err
	}
	if err := checkOptionalID("stage_id", req.GetStageId()); err != nil {
		return nil, err
	}
	if n := len(req.GetPartitionPreferences()); n > MaxPartitions {
		return nil, invalid("partition_preferences", "%d partitions, the limit is %d", n, MaxPartitions)
	}
	if n := req.GetPartitionCount(); n > MaxPartitions {
		return nil, invalid("partition_count", "%d, the limit is %d", n, MaxPartitions)
	}
	count, err := a.partitionCount(ctx, req)
	if err != nil {
		return nil, err
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_JoinGroup{JoinGroup: &commandpb.JoinGroup{
		ServiceId:      req.ServiceId,
		GroupId:        req.GroupId,
		StageId:        req.GetStageId(),
		Preferences:    req.GetPartitionPreferences(),
		PartitionCount: count,
	}}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return &registrypb.JoinGroupResponse{Error: rej.GetReason(), Revision: res.GetRevision()}, nil
	}
	// Whoever joins is there; the command has brought it back if it was expired.
	a.cfg.Beats.Touch("", req.ServiceId)
	return &registrypb.JoinGroupResponse{
		Success:            true,
		Generation:         res.GetGeneration(),
		AssignedPartitions: res.GetPartitions(),
		PartitionCount:     res.GetPartitionCount(),
		Revision:           res.GetRevision(),
	}, nil
}

// partitionCount decides how many partitions a group gets that does not exist
// yet: the number asked for, else the parallelism of the stage it reads for,
// else the default. The state machine keeps the count of a group that exists.
//
// It refuses a service that is not registered: nobody would notice when it dies,
// and its partitions would stay with it for ever.
func (a *registryAPI) partitionCount(ctx context.Context, req *registrypb.JoinGroupRequest) (uint32, error) {
	group, stage := req.GroupId, req.GetStageId()
	v, err := a.view(ctx)
	if err != nil {
		return 0, err
	}
	defer v.Close()
	s, err := v.Service(req.ServiceId)
	if err != nil {
		return 0, err
	}
	if s == nil {
		return 0, errUnknownService(req.ServiceId)
	}
	if req.GetPartitionCount() > 0 {
		return req.PartitionCount, nil
	}
	g, err := v.Group(group)
	if err != nil {
		return 0, err
	}
	if g != nil && g.PartitionCount > 0 {
		return g.PartitionCount, nil
	}
	var count uint32
	if stage != "" {
		// Stage ids are unique within a pipeline only. Where several match, the
		// largest wins: too many partitions cost little, too few cannot be
		// mended later.
		err = v.Pipelines("", 0, func(p *commandpb.Pipeline) bool {
			for _, st := range p.GetSpec().GetStages() {
				if st.GetId() == stage {
					count = max(count, st.GetParallelism())
				}
			}
			return true
		})
		if err != nil {
			return 0, err
		}
	}
	if count == 0 {
		return defaultPartitions, nil
	}
	return min(count, MaxPartitions), nil
}

// LeaveGroup takes a service out of a group. Not having been a member is a
// success.
func (a *registryAPI) LeaveGroup(ctx context.Context, req *registrypb.LeaveGroupRequest) (*registrypb.LeaveGroupResponse, error) {
	if err := checkID("service_id", req.GetServiceId()); err != nil {
		return nil, err
	}
	if err := checkID("group_id", req.GetGroupId()); err != nil {
		return nil, err
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_LeaveGroup{
		LeaveGroup: &commandpb.LeaveGroup{ServiceId: req.ServiceId, GroupId: req.GroupId},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		if rej.Code == commandpb.Code_CODE_NOT_FOUND {
			return &registrypb.LeaveGroupResponse{Success: true, Revision: res.GetRevision()}, nil
		}
		return nil, FromRejection(rej).Err()
	}
	return &registrypb.LeaveGroupResponse{
		Success:    true,
		Generation: res.GetGeneration(),
		Revision:   res.GetRevision(),
		WasMember:  res.GetExisted(),
	}, nil
}
