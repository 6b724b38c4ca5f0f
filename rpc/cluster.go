package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// clusterAPI implements Cluster.
type clusterAPI struct {
	clusterpb.UnimplementedClusterServer
	*Server
}

// TransferLeader moves leadership to a node, or to the best one. It works on
// every node.
func (a *clusterAPI) TransferLeader(ctx context.Context, req *clusterpb.TransferLeaderRequest) (*clusterpb.TransferLeaderResponse, error) {
	if id := req.GetNodeId(); id != 0 {
		st := a.cfg.Node.Status()
		m, known := st.Position.Member(id)
		switch {
		case st.Leader != st.ID: // who leads knows better
		case !known || m.Removed:
			return nil, notAMember(id, "")
		case !slices.Contains(st.Position.ConfState.GetVoters(), id):
			return nil, newStatus(codes.FailedPrecondition, fmt.Sprintf("node %d is a learner and cannot lead; nothing was changed: promote it first", id),
				"LEARNER", NotDone, 0, nil).Err()
		}
	}
	err := a.cfg.Node.TransferLeader(ctx, req.GetNodeId())
	var elsewhere *raftnode.NotLeaderError
	if errors.As(err, &elsewhere) {
		conn, rctx, rerr := a.relay.connect(ctx)
		if rerr != nil {
			return nil, rerr
		}
		resp, err := clusterpb.NewClusterClient(conn).TransferLeader(rctx, req)
		return resp, relayedErr(err)
	}
	if err != nil {
		return nil, err
	}
	l := a.cfg.Node.Leadership()
	return &clusterpb.TransferLeaderResponse{LeaderId: l.Leader, Term: l.Term}, nil
}

// GetStateHash returns the hash of this node's state as it is here, without
// asking anybody: it exists to find out whether nodes differ.
func (a *clusterAPI) GetStateHash(ctx context.Context, _ *clusterpb.GetStateHashRequest) (*clusterpb.GetStateHashResponse, error) {
	v, err := a.cfg.State.SettledView(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	hash, err := v.Hash()
	if err != nil {
		return nil, err
	}
	a.reader.SetHeader(ctx, v.Revision(), v.Epoch())
	return &clusterpb.GetStateHashResponse{
		NodeId: a.cfg.NodeID, AppliedIndex: v.Applied(), Revision: v.Revision(), Hash: hash,
	}, nil
}

// sidecarInfo reads a sidecar's assignments and shows both. releases are those of
// sidecars by id, nil to read them.
func sidecarInfo(v *router.View, s *commandpb.Sidecar, releases map[string][]*clusterpb.PendingRelease) (*clusterpb.SidecarInfo, error) {
	if releases == nil {
		var err error
		if releases, err = releasesBySidecar(v, s.SidecarId, s.SidecarId); err != nil {
			return nil, err
		}
	}
	var held []*commandpb.Assignment
	err := v.Assignments(s.SidecarId, func(as *commandpb.Assignment) bool {
		if !as.Revoked {
			held = append(held, as)
		}
		return true
	})
	out := sidecarToAPI(s, held, v.Epoch())
	out.Releases = releases[s.SidecarId]
	return out, err
}

// ListSidecars lists sidecars by id, in pages.
func (a *clusterAPI) ListSidecars(ctx context.Context, req *clusterpb.ListSidecarsRequest) (*clusterpb.ListSidecarsResponse, error) {
	if err := checkOptionalID("page_token", req.GetPageToken()); err != nil {
		return nil, err
	}
	if err := checkText("namespace", req.GetNamespace(), MaxText); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &clusterpb.ListSidecarsResponse{Revision: v.Revision()}
	limit := pageSize(req.GetPageSize())
	var page []*commandpb.Sidecar
	err = v.Sidecars(req.GetPageToken(), 0, func(s *commandpb.Sidecar) bool {
		if req.GetNamespace() != "" && s.Namespace != req.GetNamespace() {
			return true
		}
		if len(page) == limit {
			resp.NextPageToken = page[limit-1].SidecarId
			return false
		}
		page = append(page, s)
		return true
	})
	if err != nil {
		return nil, err
	}
	if len(page) == 0 {
		return resp, nil
	}
	releases, err := releasesBySidecar(v, page[0].SidecarId, page[len(page)-1].SidecarId)
	if err != nil {
		return nil, err
	}
	for _, s := range page {
		info, err := sidecarInfo(v, s, releases)
		if err != nil {
			return nil, err
		}
		resp.Sidecars = append(resp.Sidecars, info)
	}
	return resp, nil
}

// GetSidecar returns one sidecar and what it has to run.
func (a *clusterAPI) GetSidecar(ctx context.Context, req *clusterpb.GetSidecarRequest) (*clusterpb.GetSidecarResponse, error) {
	if err := checkID("sidecar_id", req.GetSidecarId()); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	s, err := v.Sidecar(req.SidecarId)
	if err != nil {
		return nil, err
	}
	resp := &clusterpb.GetSidecarResponse{Revision: v.Revision()}
	if s != nil {
		resp.Found = true
		if resp.Sidecar, err = sidecarInfo(v, s, nil); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// DeregisterSidecar removes a sidecar; its stages move elsewhere at once, since it
// is gone by the caller's word. With graceful it drains first and is removed later.
// An unknown one is a success.
func (a *clusterAPI) DeregisterSidecar(ctx context.Context, req *clusterpb.DeregisterSidecarRequest) (*clusterpb.DeregisterSidecarResponse, error) {
	if err := checkID("sidecar_id", req.GetSidecarId()); err != nil {
		return nil, err
	}
	cmd := &commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{
		DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: req.SidecarId},
	}}
	if req.GetGraceful() {
		timeout, err := drainTimeout("drain_timeout_ms", req.GetDrainTimeoutMs(), true)
		if err != nil {
			return nil, err
		}
		cmd.Op = &commandpb.Command_DrainSidecar{DrainSidecar: &commandpb.DrainSidecar{SidecarId: req.SidecarId, TimeoutMs: timeout, Leaves: true}}
	}
	res, err := a.submit(ctx, cmd)
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil && rej.Code != commandpb.Code_CODE_NOT_FOUND {
		return nil, FromRejection(rej).Err()
	}
	return &clusterpb.DeregisterSidecarResponse{
		Existed: res.GetExisted(), Revision: res.GetRevision(), Draining: req.GetGraceful() && res.GetExisted(),
	}, nil
}

// ListGroups lists consumer groups by id, in pages.
func (a *clusterAPI) ListGroups(ctx context.Context, req *clusterpb.ListGroupsRequest) (*clusterpb.ListGroupsResponse, error) {
	if err := checkOptionalID("page_token", req.GetPageToken()); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &clusterpb.ListGroupsResponse{Revision: v.Revision()}
	limit := pageSize(req.GetPageSize())
	err = v.Groups(req.GetPageToken(), 0, func(g *commandpb.Group) bool {
		if len(resp.Groups) == limit {
			resp.NextPageToken = resp.Groups[limit-1].GroupId
			return false
		}
		resp.Groups = append(resp.Groups, groupToAPI(g, v.Epoch()))
		return true
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// GetGroup returns one consumer group.
func (a *clusterAPI) GetGroup(ctx context.Context, req *clusterpb.GetGroupRequest) (*clusterpb.GetGroupResponse, error) {
	if err := checkID("group_id", req.GetGroupId()); err != nil {
		return nil, err
	}
	v, err := a.latest(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	g, err := v.Group(req.GroupId)
	if err != nil {
		return nil, err
	}
	resp := &clusterpb.GetGroupResponse{Revision: v.Revision()}
	if g != nil {
		resp.Found, resp.Group = true, groupToAPI(g, v.Epoch())
	}
	return resp, nil
}

// watchTables turns the names of tables into tables; none means all.
func watchTables(names []string) ([]router.Table, error) {
	all := []router.Table{
		router.TablePipelines, router.TableSidecars, router.TableServices, router.TableGroups, router.TableAssignments,
		router.TableOperations,
	}
	if len(names) == 0 {
		return all, nil
	}
	var out []router.Table
	for _, name := range names {
		found := false
		for _, t := range all {
			if t.String() == name {
				out, found = append(out, t), true
			}
		}
		if !found {
			var known []string
			for _, t := range all {
				known = append(known, t.String())
			}
			return nil, invalid("tables", "%q is no table; there are %s", name, strings.Join(known, ", "))
		}
	}
	return out, nil
}

// WatchChanges streams what changes in the state, one line for each record. It
// ends with OUT_OF_RANGE and the current revision when it cannot go on without
// a gap.
func (a *clusterAPI) WatchChanges(req *clusterpb.WatchChangesRequest, stream clusterpb.Cluster_WatchChangesServer) error {
	tables, err := watchTables(req.GetTables())
	if err != nil {
		return err
	}
	closeWatch, err := a.openWatch()
	if err != nil {
		return err
	}
	defer closeWatch()
	ctx := stream.Context()
	if err := a.reader.Wait(ctx); err != nil {
		return err
	}
	// Read before the subscription: if a restore comes between, the hub refuses the
	// revision, and if it comes after, the subscription ends.
	epoch, from := a.cfg.State.Epoch(), req.GetFromRevision()
	if known := req.GetFromEpoch(); known != 0 && from != 0 && known != epoch {
		return &EpochError{Known: known, Current: epoch, Revision: a.cfg.State.Revision()}
	}
	if from == 0 {
		from = a.cfg.State.Revision()
	}
	sub, err := a.cfg.State.Hub().Subscribe(from, tables...)
	if err != nil {
		return err
	}
	defer sub.Close()
	// Tells the caller from where on it is watching, before anything happens.
	a.reader.SetHeader(ctx, from, epoch)
	for {
		changes, _, err := sub.Next(ctx)
		if err != nil {
			return err
		}
		for i := range changes {
			c := &changes[i]
			// Next hands out whole revisions; resuming from the middle of one
			// must not lose its rest.
			resume := c.Revision
			if i+1 < len(changes) && changes[i+1].Revision == c.Revision {
				resume--
			}
			err := stream.Send(&clusterpb.ChangeEvent{
				Revision: resume,
				Table:    c.Table.String(),
				Key:      strings.ReplaceAll(c.Key, "\x00", " "),
				Deleted:  c.Next == nil,
				Summary:  summarize(c),
				Epoch:    epoch,
				State:    changedState(c),
			})
			if err != nil {
				return err
			}
		}
	}
}

// summarize says in one line what a change means.
func summarize(c *router.Change) string {
	switch c.Table {
	case router.TablePipelines:
		prev, _ := c.Prev.(*commandpb.Pipeline)
		next, _ := c.Next.(*commandpb.Pipeline)
		return summarizePipeline(c.Key, prev, next)
	case router.TableSidecars:
		prev, _ := c.Prev.(*commandpb.Sidecar)
		next, _ := c.Next.(*commandpb.Sidecar)
		return summarizeSidecar(c.Key, prev, next)
	case router.TableServices:
		prev, _ := c.Prev.(*commandpb.Service)
		next, _ := c.Next.(*commandpb.Service)
		return summarizeService(c.Key, prev, next)
	case router.TableGroups:
		prev, _ := c.Prev.(*commandpb.Group)
		next, _ := c.Next.(*commandpb.Group)
		return summarizeGroup(c.Key, prev, next)
	case router.TableAssignments:
		prev, _ := c.Prev.(*commandpb.Assignment)
		next, _ := c.Next.(*commandpb.Assignment)
		return summarizeAssignment(prev, next)
	case router.TableOperations:
		prev, _ := c.Prev.(*commandpb.Operation)
		next, _ := c.Next.(*commandpb.Operation)
		return summarizeOperation(c.Key, prev, next)
	}
	return c.Key + " changed"
}

func summarizePipeline(id string, prev, next *commandpb.Pipeline) string {
	was, is := prev.GetSpec(), next.GetSpec()
	state := "disabled"
	if is.GetEnabled() {
		state = "enabled"
	}
	switch {
	case next == nil:
		return fmt.Sprintf("pipeline %s deleted", id)
	case prev == nil:
		return fmt.Sprintf("pipeline %s created with %d stages, %s", id, len(is.GetStages()), state)
	case was.GetEnabled() != is.GetEnabled():
		return fmt.Sprintf("pipeline %s %s (version %d)", id, state, next.Version)
	}
	return fmt.Sprintf("pipeline %s changed (version %d)", id, next.Version)
}

func sidecarStateWord(s commandpb.SidecarState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "SIDECAR_STATE_"))
}

// changedState names the state of a sidecar whose state is what changed, "" for
// every other change.
func changedState(c *router.Change) string {
	prev, _ := c.Prev.(*commandpb.Sidecar)
	next, _ := c.Next.(*commandpb.Sidecar)
	if prev == nil || next == nil || prev.State == next.State {
		return ""
	}
	return sidecarStateWord(next.State)
}

func summarizeSidecar(id string, prev, next *commandpb.Sidecar) string {
	word := sidecarStateWord
	switch {
	case next == nil:
		return fmt.Sprintf("sidecar %s deregistered", id)
	case prev == nil:
		return fmt.Sprintf("sidecar %s registered at %s with %d services", id, next.Endpoint, len(next.Services))
	case prev.Generation != next.Generation:
		return fmt.Sprintf("sidecar %s registered again at %s with %d services", id, next.Endpoint, len(next.Services))
	case prev.State != next.State:
		return fmt.Sprintf("sidecar %s is %s, was %s", id, word(next.State), word(prev.State))
	case next.Draining && !prev.Draining:
		return fmt.Sprintf("sidecar %s drains", id)
	case !next.Draining && prev.Draining:
		return fmt.Sprintf("sidecar %s drains no more", id)
	}
	return fmt.Sprintf("sidecar %s registered again, unchanged", id)
}

func summarizeService(id string, prev, next *commandpb.Service) string {
	word := func(s *commandpb.Service) string {
		if s.State == commandpb.ServiceState_SERVICE_STATE_EXPIRED {
			return "expired"
		}
		if s.DrainSinceMs > 0 {
			return "draining"
		}
		return strings.ToLower(strings.TrimPrefix(healthOf(s).String(), "HEALTH_STATUS_"))
	}
	switch {
	case next == nil:
		return fmt.Sprintf("service %s deregistered", id)
	case prev == nil:
		return fmt.Sprintf("service %s registered as %s", id, next.Name)
	case prev.RegistrationId != next.RegistrationId:
		return fmt.Sprintf("service %s registered again as %s", id, next.Name)
	case word(prev) != word(next):
		return fmt.Sprintf("service %s is %s, was %s", id, word(next), word(prev))
	}
	return fmt.Sprintf("service %s changed", id)
}

func summarizeGroup(id string, prev, next *commandpb.Group) string {
	switch {
	case next == nil:
		return fmt.Sprintf("group %s removed", id)
	case prev == nil:
		return fmt.Sprintf("group %s created with %d partitions", id, next.PartitionCount)
	}
	was, is := membersOf(prev), membersOf(next)
	for m := range is {
		if _, ok := was[m]; !ok {
			return fmt.Sprintf("group %s: %s joined, %d members, generation %d", id, m, len(is), next.Generation)
		}
	}
	for m := range was {
		if _, ok := is[m]; !ok {
			return fmt.Sprintf("group %s: %s left, %d members, generation %d", id, m, len(is), next.Generation)
		}
	}
	return fmt.Sprintf("group %s rebalanced, generation %d", id, next.Generation)
}

func summarizeAssignment(prev, next *commandpb.Assignment) string {
	switch {
	case next == nil:
		return fmt.Sprintf("assignment of %s to %s forgotten", prev.GetPipelineId(), prev.GetSidecarId())
	case next.Revoked:
		return fmt.Sprintf("pipeline %s taken from sidecar %s", next.PipelineId, next.SidecarId)
	}
	var local, remote []string
	for _, st := range next.Stages {
		if st.RemoteSidecarId == "" {
			local = append(local, st.StageId)
		} else {
			remote = append(remote, st.StageId+" on "+st.RemoteSidecarId)
		}
	}
	line := fmt.Sprintf("sidecar %s runs %s of %s", next.SidecarId, strings.Join(local, ", "), next.PipelineId)
	if len(remote) > 0 {
		line += ", sends to " + strings.Join(remote, ", ")
	}
	return line
}
