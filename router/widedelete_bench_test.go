package router

import (
	"fmt"
	"testing"

	"conveyor.etl/router/router/commandpb"
)

// BenchmarkDeleteWide deletes a pipeline of two stages that 10,000 sidecars run, as a
// replica applies it: one command, after which each of them has to let go of a
// source.
func BenchmarkDeleteWide(b *testing.B) {
	const wide = 10_000
	s := benchFSM(b)
	for i := range wide {
		res := apply(b, s, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: &commandpb.Sidecar{
			SidecarId: fmt.Sprintf("fleet/pod-%06d", i), Endpoint: fmt.Sprintf("10.0.%d.%d:50053", i>>8, i&0xff), Namespace: "fleet",
			Services: []*commandpb.LocalService{{Name: "wide-source", Type: commandpb.ServiceType_SERVICE_TYPE_SOURCE, Endpoint: "127.0.0.1:1"}},
		}}}})
		if res[0].GetRejection() != nil {
			b.Fatal(text(res[0]))
		}
	}
	now := uint64(1)
	for b.Loop() {
		b.StopTimer()
		now += 1000
		apply(b, s, &commandpb.Command{TimeMs: now, Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: &commandpb.PipelineSpec{
			Id: "wide", Enabled: true,
			Stages: []*commandpb.Stage{{Id: "in", Type: commandpb.StageType_STAGE_TYPE_SOURCE, Parallelism: wide}, {Id: "out", Type: commandpb.StageType_STAGE_TYPE_SINK, Parallelism: wide}},
			Edges:  []*commandpb.Edge{{FromStage: "in", ToStage: "out"}},
		}}}})
		a := &commandpb.ApplyAssignments{PlannedRevision: s.Revision()}
		v := s.View()
		p, err := v.Pipeline("wide")
		noError(b, err)
		for i := range wide {
			id := fmt.Sprintf("fleet/pod-%06d", i)
			sc, err := v.Sidecar(id)
			noError(b, err)
			a.Changes = append(a.Changes, &commandpb.AssignmentChange{
				SidecarId: id, PipelineId: "wide", SidecarGeneration: sc.Generation, PipelineVersion: p.Version,
				Stages: []*commandpb.StageAssignment{{StageId: "in", LocalEndpoint: "127.0.0.1:1"}, {StageId: "out", LocalEndpoint: "127.0.0.1:2"}},
			})
		}
		noError(b, v.Close())
		if res := apply(b, s, &commandpb.Command{TimeMs: now, Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: a}}); res[0].GetRejection() != nil {
			b.Fatal(text(res[0]))
		}
		b.StartTimer()
		res := apply(b, s, &commandpb.Command{TimeMs: now + 1, Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: "wide", ReleaseTimeoutMs: 30_000}}})
		if res[0].GetRejection() != nil {
			b.Fatal(text(res[0]))
		}
		b.StopTimer()
		ended := &commandpb.EndHandovers{}
		for i := range wide {
			ended.Ended = append(ended.Ended, &commandpb.EndedHandover{SidecarId: fmt.Sprintf("fleet/pod-%06d", i), PipelineId: "wide", Revision: s.Revision(), End: commandpb.HandoverEnd_HANDOVER_END_APPLIED})
		}
		apply(b, s, &commandpb.Command{TimeMs: now + 2, Op: &commandpb.Command_EndHandovers{EndHandovers: ended}})
		b.StartTimer()
	}
}
