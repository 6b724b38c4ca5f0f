package router

import (
	"fmt"
	"math/rand"
	"testing"

	pb "conveyor.etl/router/router/commandpb"
)

// commands makes random commands over few names, so that they meet.
type commands struct {
	r    *rand.Rand
	time uint64
}

func (g *commands) pick(kind string, n int) string { return fmt.Sprintf("%s-%d", kind, g.r.Intn(n)) }

func (g *commands) version() *uint64 {
	if g.r.Intn(2) == 0 {
		return nil
	}
	v := uint64(g.r.Intn(4))
	return &v
}

func (g *commands) spec() *pb.PipelineSpec {
	s := &pb.PipelineSpec{Id: g.pick("pipeline", 4), Stages: []*pb.Stage{{Id: "stage-0"}, {Id: "stage-1", Type: pb.StageType_STAGE_TYPE_SOURCE}}, Enabled: g.r.Intn(3) > 0, Metadata: map[string]string{}}
	for i := range g.r.Intn(5) {
		s.Metadata[fmt.Sprint("k", i)] = fmt.Sprint(g.r.Intn(2))
	}
	return s
}

func (g *commands) sourceOffset() *pb.CommitSourceOffset {
	return &pb.CommitSourceOffset{
		SourceId: g.pick("source", 5), Partition: uint32(g.r.Intn(4)), Offset: uint64(g.r.Intn(50)),
		TimeS: int64(g.r.Intn(3)) - 1, TimeNs: int32(g.r.Intn(3)) - 1, Force: g.r.Intn(8) == 0,
	}
}

func (g *commands) watermark() *pb.AdvanceWatermark {
	return &pb.AdvanceWatermark{
		SourceId: g.pick("source", 5), Partition: uint32(g.r.Intn(6)), Position: uint64(g.r.Intn(50)),
		TimeS: int64(g.r.Intn(3)), Force: g.r.Intn(8) == 0,
	}
}

func (g *commands) groupOffset() *pb.CommitGroupOffset {
	c := &pb.CommitGroupOffset{
		GroupId: g.pick("group", 3), SourceId: g.pick("source", 2), Partition: uint32(g.r.Intn(8)), Offset: uint64(g.r.Intn(50)),
	}
	if g.r.Intn(2) == 0 {
		c.ServiceId = g.pick("service", 6)
		c.Generation = g.version()
	}
	return c
}

func (g *commands) checkpoint() *pb.SaveCheckpoint {
	c := &pb.SaveCheckpoint{ServiceId: g.pick("service", 6), CheckpointId: "c", Data: make([]byte, g.r.Intn(300))}
	g.r.Read(c.Data)
	for range g.r.Intn(3) {
		c.SourceOffsets = append(c.SourceOffsets, &pb.SourceOffset{SourceId: g.pick("source", 3), Partition: uint32(g.r.Intn(3))})
	}
	return c
}

func (g *commands) batch() *pb.CommitBatch {
	b := &pb.CommitBatch{}
	for range g.r.Intn(5) {
		op := &pb.CommitOp{}
		switch g.r.Intn(4) {
		case 0:
			op.Op = &pb.CommitOp_SourceOffset{SourceOffset: g.sourceOffset()}
		case 1:
			op.Op = &pb.CommitOp_Watermark{Watermark: g.watermark()}
		case 2:
			op.Op = &pb.CommitOp_GroupOffset{GroupOffset: g.groupOffset()}
		case 3:
			op.Op = &pb.CommitOp_Checkpoint{Checkpoint: g.checkpoint()}
		}
		b.Ops = append(b.Ops, op)
	}
	return b
}

func (g *commands) sidecar() *pb.Sidecar {
	s := &pb.Sidecar{SidecarId: g.pick("sidecar", 4), Endpoint: fmt.Sprint(g.r.Intn(2))}
	for range g.r.Intn(3) {
		s.Services = append(s.Services, &pb.LocalService{Name: g.pick("Local", 3)})
	}
	return s
}

func (g *commands) service() *pb.Service {
	return &pb.Service{
		ServiceId: g.pick("service", 6), Name: g.pick("Name", 3), RegistrationId: fmt.Sprint(g.r.Intn(2)),
		Labels: map[string]string{"a": "1", "b": fmt.Sprint(g.r.Intn(2)), "c": "3"}, SidecarId: g.pick("sidecar", 3),
	}
}

func (g *commands) changes() *pb.ApplyAssignments {
	a := &pb.ApplyAssignments{PlannedRevision: uint64(g.r.Intn(3)) * 100, Handovers: g.r.Intn(2) == 0, ReplacedMs: uint64(g.r.Intn(3)) * 5000}
	for range g.r.Intn(6) {
		a.Changes = append(a.Changes, &pb.AssignmentChange{
			SidecarId: g.pick("sidecar", 4), PipelineId: g.pick("pipeline", 4), SidecarGeneration: uint64(1 + g.r.Intn(3)),
			PipelineVersion: uint64(1 + g.r.Intn(3)), Revoke: g.r.Intn(4) == 0,
			Stages: []*pb.StageAssignment{{StageId: g.pick("stage", 2), LocalEndpoint: fmt.Sprint(g.r.Intn(2))}},
		})
		if c := a.Changes[len(a.Changes)-1]; g.r.Intn(2) == 0 {
			c.Releases, c.ReleaseTimeoutMs = []string{"stage-0"}, uint64(g.r.Intn(60_000))
			c.SharedReleases = []string{"stage-1"}
			if c.Revoke {
				c.MovedTo = g.pick("sidecar", 4)
			}
		}
	}
	return a
}

// handover makes a command about draining or the end of a handover.
func (g *commands) handover() *pb.Command {
	switch g.r.Intn(4) {
	case 0:
		return &pb.Command{Op: &pb.Command_DrainSidecar{DrainSidecar: &pb.DrainSidecar{
			SidecarId: g.pick("sidecar", 4), TimeoutMs: uint64(g.r.Intn(3)) * 10_000, Leaves: g.r.Intn(3) == 0,
		}}}
	case 1:
		return &pb.Command{Op: &pb.Command_UndrainSidecar{UndrainSidecar: &pb.UndrainSidecar{SidecarId: g.pick("sidecar", 4)}}}
	}
	c := &pb.EndHandovers{}
	for range g.r.Intn(4) {
		c.Ended = append(c.Ended, &pb.EndedHandover{
			SidecarId: g.pick("sidecar", 4), PipelineId: g.pick("pipeline", 4), Revision: uint64(g.r.Intn(1000)), End: pb.HandoverEnd(g.r.Intn(4)),
		})
	}
	return &pb.Command{Op: &pb.Command_EndHandovers{EndHandovers: c}}
}

func (g *commands) preferences() []uint32 {
	var out []uint32
	for range g.r.Intn(4) {
		out = append(out, uint32(g.r.Intn(9)))
	}
	return out
}

// operation makes a command about an operation.
func (g *commands) operation() *pb.Command {
	id := g.pick("operation", 8)
	if g.r.Intn(5) == 0 {
		return &pb.Command{Op: &pb.Command_CancelOperation{CancelOperation: &pb.CancelOperation{OperationId: id}}}
	}
	return &pb.Command{Op: &pb.Command_PutOperation{PutOperation: &pb.PutOperation{Create: g.r.Intn(2) == 0, Operation: &pb.Operation{
		OperationId: id, Kind: "backup", State: pb.OperationState(g.r.Intn(4)), Done: uint64(g.r.Intn(3)), Message: fmt.Sprint(g.r.Intn(2)),
	}}}}
}

// restore makes a command about a restore that is never carried out.
func (g *commands) restore() *pb.Command {
	id := g.pick("restore", 2)
	switch g.r.Intn(6) {
	case 0:
		return &pb.Command{Op: &pb.Command_BeginRestore{BeginRestore: &pb.BeginRestore{OperationId: id, SnapshotId: "s", Source: &pb.RestoreSource{
			ContentHash: make([]byte, 32), Clock: &pb.Clock{Revision: uint64(g.r.Intn(2))},
		}}}}
	case 1, 2:
		c := &pb.StageRestore{OperationId: id, Sequence: uint64(g.r.Intn(4)), Data: make([]byte, 1+g.r.Intn(300)), Records: 3}
		g.r.Read(c.Data)
		return &pb.Command{Op: &pb.Command_StageRestore{StageRestore: c}}
	case 3:
		n := uint64(g.r.Intn(3))
		return &pb.Command{Op: &pb.Command_SealRestore{SealRestore: &pb.SealRestore{OperationId: id, Chunks: n, Records: 3 * n}}}
	case 4:
		// Always a failure: nobody can prepare this stage.
		return &pb.Command{Op: &pb.Command_ReportRestore{ReportRestore: &pb.ReportRestore{OperationId: id, NodeId: uint64(g.r.Intn(3)), Error: "bad"}}}
	}
	return g.abandon(id)
}

func (g *commands) abandon(id string) *pb.Command {
	return &pb.Command{Op: &pb.Command_AbandonRestore{AbandonRestore: &pb.AbandonRestore{OperationId: id}}}
}

// next makes one command.
func (g *commands) next() *pb.Command {
	g.time += uint64(g.r.Intn(20_000))
	c := &pb.Command{TimeMs: g.time - uint64(g.r.Intn(10))*uint64(g.r.Intn(2))*min(g.time/10, 100)}
	if g.r.Intn(4) == 0 {
		c.RequestId = g.pick("request", 30)
	}
	if g.r.Intn(10) == 0 {
		epoch := uint64(g.r.Intn(2))
		c.ExpectedEpoch = &epoch
	}
	if g.r.Intn(20) == 0 {
		term := uint64(g.r.Intn(2))
		c.ExpectedTerm = &term
	}
	switch g.r.Intn(25) {
	case 23:
		c.Op = &pb.Command_DrainService{DrainService: &pb.DrainService{ServiceId: g.pick("service", 6), TimeoutMs: uint64(g.r.Intn(3)) * 10_000}}
	case 24:
		if g.r.Intn(2) == 0 {
			c.Op = &pb.Command_DeregisterService{DeregisterService: &pb.DeregisterService{ServiceId: g.pick("service", 6), DrainedOnly: true}}
			break
		}
		p := &pb.PurgeServices{RetentionMs: uint64(g.r.Intn(20_000))}
		for range g.r.Intn(4) {
			p.Services = append(p.Services, &pb.ExpiredService{ServiceId: g.pick("service", 6), ExpectedRevision: uint64(g.r.Intn(1000))})
		}
		c.Op = &pb.Command_PurgeServices{PurgeServices: p}
	case 20:
		c.Op = g.operation().Op
	case 21:
		c.Op = g.restore().Op
	case 22:
		c.Op = g.handover().Op
	case 0:
		c.Op = &pb.Command_RegisterService{RegisterService: &pb.RegisterService{Service: g.service()}}
	case 1:
		c.Op = &pb.Command_DeregisterService{DeregisterService: &pb.DeregisterService{ServiceId: g.pick("service", 6)}}
	case 2:
		c.Op = &pb.Command_RenewLease{RenewLease: &pb.RenewLease{ServiceId: g.pick("service", 6)}}
	case 3:
		c.Op = &pb.Command_UpdateServiceHealth{UpdateServiceHealth: &pb.UpdateServiceHealth{
			ServiceId: g.pick("service", 6), State: pb.ServiceState(g.r.Intn(3)),
			Health: &pb.Health{Components: map[string]*pb.ComponentHealth{"a": {}, "b": {Name: "b"}, "c": {}}},
		}}
	case 4, 5:
		c.Op = &pb.Command_PutPipeline{PutPipeline: &pb.PutPipeline{Spec: g.spec(), ExpectedVersion: g.version()}}
	case 6:
		c.Op = &pb.Command_DeletePipeline{DeletePipeline: &pb.DeletePipeline{
			PipelineId: g.pick("pipeline", 4), ReleaseTimeoutMs: uint64(g.r.Intn(2)) * 20_000,
		}}
	case 7:
		c.Op = &pb.Command_SetPipelineEnabled{SetPipelineEnabled: &pb.SetPipelineEnabled{
			PipelineId: g.pick("pipeline", 4), Enabled: g.r.Intn(2) == 0, Abrupt: g.r.Intn(2) == 0,
		}}
	case 8, 9:
		c.Op = &pb.Command_CommitSourceOffset{CommitSourceOffset: g.sourceOffset()}
	case 10:
		c.Op = &pb.Command_AdvanceWatermark{AdvanceWatermark: g.watermark()}
	case 11:
		c.Op = &pb.Command_SaveCheckpoint{SaveCheckpoint: g.checkpoint()}
	case 12:
		c.Op = &pb.Command_CommitGroupOffset{CommitGroupOffset: g.groupOffset()}
	case 13:
		c.Op = &pb.Command_CommitBatch{CommitBatch: g.batch()}
	case 14:
		c.Op = &pb.Command_DeleteCheckpoint{DeleteCheckpoint: &pb.DeleteCheckpoint{ServiceId: g.pick("service", 6)}}
	case 15:
		c.Op = &pb.Command_JoinGroup{JoinGroup: &pb.JoinGroup{
			ServiceId: g.pick("service", 6), GroupId: g.pick("group", 3), PartitionCount: uint32(g.r.Intn(9)), Preferences: g.preferences(),
		}}
	case 16:
		c.Op = &pb.Command_LeaveGroup{LeaveGroup: &pb.LeaveGroup{ServiceId: g.pick("service", 6), GroupId: g.pick("group", 3)}}
	case 17:
		c.Op = &pb.Command_RegisterSidecar{RegisterSidecar: &pb.RegisterSidecar{Sidecar: g.sidecar()}}
	case 18:
		c.Op = &pb.Command_ApplyAssignments{ApplyAssignments: g.changes()}
	case 19:
		switch g.r.Intn(3) {
		case 0:
			c.Op = &pb.Command_DeregisterSidecar{DeregisterSidecar: &pb.DeregisterSidecar{SidecarId: g.pick("sidecar", 4)}}
		case 1:
			c.Op = &pb.Command_TransitionSidecar{TransitionSidecar: &pb.TransitionSidecar{
				SidecarId: g.pick("sidecar", 4), State: pb.SidecarState(g.r.Intn(4)), GraceMs: uint64(g.r.Intn(2)) * 30_000,
			}}
		case 2:
			c.Op = &pb.Command_AssignPartitions{AssignPartitions: &pb.AssignPartitions{GroupId: g.pick("group", 3), ExpectedGeneration: uint64(g.r.Intn(9))}}
		}
	}
	return c
}

// restoring puts the stages of a real restore into a log, the first half of them
// before its middle, and the swap a while later.
func (g *commands) restoring(t testing.TB, log []Entry, stages []*pb.Command, id string) {
	add := func(at int, c *pb.Command) { log[at].Commands = append(log[at].Commands, marshal(t, c)) }
	half := len(log) / 2
	begin := half - len(stages)/2
	add(begin, g.abandon("restore-0"))
	add(begin, g.abandon("restore-1"))
	for i, c := range stages {
		add(begin+i, c)
	}
	add(begin+len(stages), report(id, 2))
	add(half+len(log)/10, swap(id))
}

// log makes n entries of a few commands each.
func (g *commands) log(t testing.TB, first uint64, n int) []Entry {
	out := make([]Entry, n)
	for i := range out {
		out[i] = Entry{Index: first + uint64(i), Term: 1}
		for range g.r.Intn(6) {
			out[i].Commands = append(out[i].Commands, marshal(t, g.next()))
		}
	}
	return out
}
