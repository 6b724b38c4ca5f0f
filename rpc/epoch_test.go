package rpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// image keeps the state as it is, for restore.
func (n *oneNode) image(t *testing.T, dir string) {
	t.Helper()
	_, err := n.fsm.Image(dir)
	noError(t, err)
}

// restore puts what image kept in the place of the state, through the log.
func (n *oneNode) restore(t *testing.T, dir string) {
	t.Helper()
	im, err := router.OpenImage(n.fs, dir, router.Options{})
	noError(t, err)
	v := im.View()
	defer func() { noError(t, errors.Join(v.Close(), im.Close())) }()
	src, err := im.CheckedSource(t.Context())
	noError(t, err)
	id := fmt.Sprintf("restore-%d", n.fsm.Epoch()+1)
	n.must(t, &commandpb.Command{Op: &commandpb.Command_BeginRestore{BeginRestore: &commandpb.BeginRestore{
		OperationId: id, SnapshotId: dir, Owner: n.id, Source: src,
	}}})
	chunks, records, err := v.Chunks(t.Context(), 0, func(c router.Chunk) error {
		n.must(t, &commandpb.Command{Op: &commandpb.Command_StageRestore{StageRestore: &commandpb.StageRestore{
			OperationId: id, Sequence: c.Sequence, Data: c.Data, Records: c.Records,
		}}})
		return nil
	})
	noError(t, err)
	n.must(t, &commandpb.Command{Op: &commandpb.Command_SealRestore{SealRestore: &commandpb.SealRestore{OperationId: id, Chunks: chunks, Records: records}}})
	n.must(t, &commandpb.Command{Op: &commandpb.Command_ReportRestore{ReportRestore: &commandpb.ReportRestore{OperationId: id, NodeId: n.id}}})
	n.must(t, &commandpb.Command{Op: &commandpb.Command_SwapRestore{SwapRestore: &commandpb.SwapRestore{OperationId: id}}})
}

// wantEpoch wants a call refused because it is of another epoch, certainly not
// done, and told which one is in force.
func wantEpoch(t *testing.T, what string, err error, current uint64) {
	t.Helper()
	if status.Code(err) != codes.OutOfRange {
		t.Errorf("%s: %v, want it refused as of another epoch", what, err)
		return
	}
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			if info.Reason != "EPOCH" || info.Metadata["current_epoch"] != strconv.FormatUint(current, 10) || Outcome(info.Metadata["outcome"]) != NotDone {
				t.Errorf("%s: %v", what, info)
			}
			return
		}
	}
	t.Errorf("%s: no details: %v", what, err)
}

// pipelineTwice makes a pipeline p that has version 2 in epoch 1 as it had in
// epoch 0, with another content.
func pipelineTwice(t *testing.T) *api {
	a := newAPI(t)
	a.create(chain("p", "src", "sink"))
	a.create(chain("p", "src", "backup", "sink"))
	a.node.image(t, "image")
	_, err := a.admin.DeletePipeline(a.ctx(), &adminpb.DeletePipelineRequest{PipelineId: "p"})
	noError(t, err)
	a.create(chain("p", "src", "sink"))
	if v := a.create(chain("p", "src", "live", "sink")).Version; v != 2 {
		t.Fatal(v)
	}
	a.node.restore(t, "image")
	return a
}

// Goal: who read version 2 of a pipeline before a restore does not win with it
// after the restore gave the pipeline version 2 again, by whatever call and
// whether or not it names the epoch; who read it since does.
func TestVersionsOfTwoEpochs(t *testing.T) {
	two := proto.Uint64(2)
	named := map[string]*uint64{"without an epoch": nil, "of epoch 0": proto.Uint64(0), "of epoch 2": proto.Uint64(2)}
	calls := map[string]func(a *api, version, epoch *uint64, md ...string) error{
		"create": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.CreatePipeline(a.with(md...), &adminpb.CreatePipelineRequest{
				Config: chain("p", "src", "mine", "sink"), ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
		"update": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.UpdatePipeline(a.with(md...), &adminpb.UpdatePipelineRequest{
				Config: chain("p", "src", "mine", "sink"), ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
		// Nothing would change, so that nothing goes through the log.
		"update to the same": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.UpdatePipeline(a.with(md...), &adminpb.UpdatePipelineRequest{
				Config: chain("p", "src", "backup", "sink"), ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
		"validate": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.UpdatePipeline(a.with(md...), &adminpb.UpdatePipelineRequest{
				Config: chain("p", "src", "mine", "sink"), ExpectedVersion: version, ExpectedEpoch: epoch, ValidateOnly: true})
			return err
		},
		"enable": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.EnablePipeline(a.with(md...), &adminpb.EnablePipelineRequest{PipelineId: "p", ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
		"disable": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.DisablePipeline(a.with(md...), &adminpb.DisablePipelineRequest{PipelineId: "p", ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
		"delete": func(a *api, version, epoch *uint64, md ...string) error {
			_, err := a.admin.DeletePipeline(a.with(md...), &adminpb.DeletePipelineRequest{PipelineId: "p", ExpectedVersion: version, ExpectedEpoch: epoch})
			return err
		},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			a := pipelineTwice(t)
			before := a.node.entryCount()
			for what, epoch := range named {
				wantEpoch(t, what, call(a, two, epoch), 1)
			}
			wantEpoch(t, "of epoch 0, by metadata", call(a, two, nil, MetadataEpoch, "0"), 1)
			wantEpoch(t, "any version of epoch 0", call(a, nil, proto.Uint64(0)), 1)
			wantCode(t, call(a, two, proto.Uint64(1), MetadataEpoch, "0"), codes.InvalidArgument)
			got, err := a.admin.GetPipeline(a.ctx(), &adminpb.GetPipelineRequest{PipelineId: "p"})
			noError(t, err)
			if got.Status.Version != 2 || got.Status.Epoch != 1 || got.Epoch != 1 || got.Config.Stages[1].Id != "backup-stage" {
				t.Fatalf("it was changed: %v", got)
			}
			if n := a.node.entryCount(); n != before {
				t.Errorf("%d refused calls went through the log", n-before)
			}
			noError(t, call(a, two, &got.Status.Epoch))
		})
		t.Run(name+" by metadata", func(t *testing.T) {
			a := pipelineTwice(t)
			noError(t, call(a, two, nil, MetadataEpoch, "1"))
		})
		t.Run(name+" of any version", func(t *testing.T) {
			a := pipelineTwice(t)
			noError(t, call(a, nil, nil))
		})
	}
}

// Goal: "must not exist" is about no version that was read, so it needs no epoch.
func TestExpectedAbsence(t *testing.T) {
	a := pipelineTwice(t)
	resp, err := a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: chain("q", "src", "sink"), ExpectedVersion: proto.Uint64(0)})
	noError(t, err)
	if !resp.Success || resp.Version != 1 || resp.Epoch != 1 {
		t.Fatal(resp)
	}
	_, err = a.admin.CreatePipeline(a.ctx(), &adminpb.CreatePipelineRequest{Config: chain("p", "src", "sink"), ExpectedVersion: proto.Uint64(0)})
	wantCode(t, err, codes.AlreadyExists)
}

// Goal: a restore between the look at the state and the command is noticed too:
// the command carries the epoch, also of a caller that names none.
func TestRestoreOvertakes(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "src", "backup", "sink"))
	a.node.image(t, "image")
	a.node.holdAll()
	failed := make(chan error, 2)
	for _, epoch := range []*uint64{nil, proto.Uint64(0)} {
		go func() {
			_, err := a.admin.UpdatePipeline(a.ctx(), &adminpb.UpdatePipelineRequest{
				Config: chain("p", "src", "mine", "sink"), ExpectedVersion: proto.Uint64(1), ExpectedEpoch: epoch})
			failed <- err
		}()
	}
	eventually(t, "both are under way", func() bool { return a.node.heldCount() == 2 })
	a.node.restore(t, "image")
	a.node.release()
	for range 2 {
		wantEpoch(t, "a command that a restore overtook", <-failed, 1)
	}
}

// Goal: a call that names another epoch fails, it does not answer a refusal in a
// reply that is easily taken for one about something else.
func TestOtherEpochFailsTheCall(t *testing.T) {
	a := pipelineTwice(t)
	ctx := a.with(MetadataEpoch, "0")
	_, err := a.checkpoint.CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{SourceId: "s", Offset: 1})
	wantEpoch(t, "CommitOffset", err, 1)
	_, err = a.registry.Deregister(ctx, &registrypb.DeregisterRequest{ServiceId: "nobody"})
	wantEpoch(t, "Deregister", err, 1)
	_, err = a.registry.LeaveGroup(ctx, &registrypb.LeaveGroupRequest{ServiceId: "nobody", GroupId: "g"})
	wantEpoch(t, "LeaveGroup", err, 1)
	_, err = a.admin.ListPipelines(ctx, &adminpb.ListPipelinesRequest{PageSize: 1, PageToken: "a"})
	wantEpoch(t, "ListPipelines", err, 1)
}

// Goal: every answer of the commit stream says of which epoch its revision is,
// and a batch is fenced by the epoch it names or its stream does.
func TestCommitEpoch(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "src", "sink"))
	a.node.image(t, "image")
	batch := func(id uint64, epoch *uint64) *clusterpb.CommitRequest {
		return &clusterpb.CommitRequest{Id: id, ExpectedEpoch: epoch, Ops: []*clusterpb.CommitOp{
			{Op: &clusterpb.CommitOp_Offset{Offset: &clusterpb.OffsetCommit{SourceId: "s", Partition: uint32(id), Offset: 10}}}}}
	}
	stream := a.commitStream()
	fenced, err := a.commits.Commit(metadata.AppendToOutgoingContext(a.ctx(), MetadataEpoch, "0"))
	noError(t, err)
	noError(t, stream.Send(batch(1, nil)))
	noError(t, fenced.Send(batch(2, nil)))
	for id, s := range map[uint64]grpc.BidiStreamingClient[clusterpb.CommitRequest, clusterpb.CommitResponse]{1: stream, 2: fenced} {
		if r := collect(t, s, 1)[id]; r.Outcome != clusterpb.Outcome_OUTCOME_DONE || r.Epoch != 0 {
			t.Fatal(r)
		}
	}
	a.node.restore(t, "image")
	noError(t, stream.Send(batch(3, nil)))
	noError(t, stream.Send(batch(4, proto.Uint64(0))))
	noError(t, stream.Send(batch(5, proto.Uint64(1))))
	noError(t, stream.Send(batch(6, nil))) // nothing is left of the one before
	got := collect(t, stream, 4)
	noError(t, fenced.Send(batch(7, nil)))
	noError(t, fenced.Send(batch(8, proto.Uint64(1))))
	for id, r := range collect(t, fenced, 2) {
		got[id] = r
	}
	for id, refused := range map[uint64]bool{3: false, 4: true, 5: false, 6: false, 7: true, 8: false} {
		r := got[id]
		if r.Epoch != 1 || r.Revision == 0 {
			t.Errorf("batch %d: the answer is of epoch %d, revision %d", id, r.Epoch, r.Revision)
		}
		if !refused && r.Outcome != clusterpb.Outcome_OUTCOME_DONE {
			t.Errorf("batch %d: %v", id, r)
		}
		if refused && (r.Outcome != clusterpb.Outcome_OUTCOME_REFUSED || codes.Code(r.Code) != codes.OutOfRange) {
			t.Errorf("batch %d of another epoch: %v", id, r)
		}
	}
	bad, err := a.commits.Commit(metadata.AppendToOutgoingContext(a.ctx(), MetadataEpoch, "first"))
	noError(t, err)
	_, err = bad.Recv()
	wantCode(t, err, codes.InvalidArgument)
}

// Goal: a sidecar that keeps the assignment with the larger generation, as it is
// told to, takes what a restore puts back, though it was made before what it runs,
// and afterwards what is made anew. Method: all three ways it learns of them.
func TestAssignmentsOfTwoEpochs(t *testing.T) {
	a := newAPI(t)
	a.create(chain("p", "src", "transform"))
	s := a.startOldSidecar("ns/pod", "transform")
	a.assign(s.id, "p")
	a.node.image(t, "image")
	a.revoke(s.id, "p")
	a.assign(s.id, "p")
	a.caughtUp()
	s.beat(false)
	live := s.routes["p"].GetGeneration()
	ctx, cancel := context.WithCancel(a.ctx())
	defer cancel()
	watch, err := a.sidecar.WatchPipelineAssignments(ctx, &sidecarpb.WatchAssignmentsRequest{SidecarId: s.id})
	noError(t, err)
	next := func() *sidecarpb.PipelineAssignmentEvent {
		t.Helper()
		for {
			ev, err := watch.Recv()
			noError(t, err)
			if ev.Assignment != nil {
				return ev
			}
		}
	}
	if g := next().Assignment.Generation; g != live {
		t.Fatalf("watched %d, told %d", g, live)
	}
	a.node.restore(t, "image")
	a.caughtUp()
	s.beat(false)
	restored := s.routes["p"].GetGeneration()
	if restored <= live {
		t.Errorf("the restored assignment has generation %d, the sidecar has seen %d", restored, live)
	}
	if ev := next(); ev.Epoch != 1 || ev.Assignment.Generation != restored {
		t.Errorf("watched %v, told %d", ev, restored)
	}
	info, err := a.cluster.GetSidecar(a.ctx(), &clusterpb.GetSidecarRequest{SidecarId: s.id})
	noError(t, err)
	if g := info.Sidecar.Assignments[0].Generation; g != restored {
		t.Errorf("shown %d, told %d", g, restored)
	}
	if g := a.startOldSidecar("ns/pod", "transform").routes["p"].GetGeneration(); g != restored {
		t.Errorf("a sidecar that registers again is told %d, %d before", g, restored)
	}
	a.revoke(s.id, "p")
	a.assign(s.id, "p")
	a.caughtUp()
	s.beat(false)
	if g := s.routes["p"].GetGeneration(); g <= restored {
		t.Errorf("an assignment made after the restore has generation %d, the restored one %d", g, restored)
	}
}
