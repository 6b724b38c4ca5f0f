package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// stageCommands returns the commands that stage an image for an operation, the
// seal last.
func stageCommands(t testing.TB, fs vfs.FS, dir, operation string) []*commandpb.Command {
	t.Helper()
	im, err := OpenImage(fs, dir, testOptions())
	noError(t, err)
	defer func() { noError(t, im.Close()) }()
	src, err := im.checkedSource(t.Context(), false)
	noError(t, err)
	out := []*commandpb.Command{{Op: &commandpb.Command_BeginRestore{BeginRestore: &commandpb.BeginRestore{
		OperationId: operation, SnapshotId: "nightly", Owner: 1, Source: src,
	}}}}
	v := im.View()
	defer func() { noError(t, v.Close()) }()
	// Chunks of the usual size would be one or two.
	w := NewChunkWriter(0, func(c Chunk) error {
		out = append(out, &commandpb.Command{Op: &commandpb.Command_StageRestore{StageRestore: &commandpb.StageRestore{
			OperationId: operation, Sequence: c.Sequence, Data: c.Data, Records: c.Records,
		}}})
		return nil
	})
	w.limit = 2 << 10
	chunks, records, err := v.chunksTo(t.Context(), w)
	noError(t, err)
	return append(out, &commandpb.Command{Op: &commandpb.Command_SealRestore{SealRestore: &commandpb.SealRestore{
		OperationId: operation, Chunks: chunks, Records: records,
	}}})
}

func report(operation string, node uint64) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_ReportRestore{ReportRestore: &commandpb.ReportRestore{OperationId: operation, NodeId: node}}}
}

func swap(operation string) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_SwapRestore{SwapRestore: &commandpb.SwapRestore{OperationId: operation}}}
}

// accepted applies commands, one entry each, none of which may be refused.
func accepted(t testing.TB, s *FSM, cmds ...*commandpb.Command) *commandpb.Result {
	t.Helper()
	var last *commandpb.Result
	for _, c := range cmds {
		last = apply(t, s, c)[0]
		if last.Rejection != nil {
			t.Fatalf("%s: %s", text(c), text(last))
		}
	}
	return last
}

func contentHash(t testing.TB, s *FSM) string {
	t.Helper()
	v := s.View()
	defer v.Close()
	h, err := v.ContentHash(t.Context())
	noError(t, err)
	return string(h)
}

func sound(t testing.TB, s *FSM) {
	t.Helper()
	v := s.View()
	defer v.Close()
	noError(t, v.check(t.Context(), false))
}

// withBackup makes a file system with an image of a rich state of a further log
// and returns the hash of its content.
func withBackup(t testing.TB, fs vfs.FS, g *commands, entries int) string {
	t.Helper()
	src := open(t, fs, "source")
	_, err := src.Apply(g.log(t, 2, entries))
	noError(t, err)
	_, err = src.Image("image")
	noError(t, err)
	sound(t, src)
	h := contentHash(t, src)
	noError(t, errors.Join(src.Close(), syncDir(fs, "image"), syncDir(fs, "")))
	return h
}

// TestRestore: the content is that of the backup, everything of the cluster goes
// on, readers are told, and the old state can be had back.
func TestRestore(t *testing.T) {
	fs := vfs.NewMem()
	g := &commands{r: randomness(t), time: 1_000_000}
	backup := withBackup(t, fs, g, 400)
	s := open(t, fs, "state")
	accepted(t, s, put("live", "1"), command(t, `put_operation { create: true operation { operation_id: "op" kind: "restore" state: OPERATION_STATE_RUNNING } }`))
	if _, ok := s.UndoPoint(); ok {
		t.Fatal("an undo point before the first restore")
	}
	cmds := stageCommands(t, fs, "image", "op")
	accepted(t, s, cmds...)
	if err := s.Prepare(t.Context(), "other"); !errors.Is(err, ErrNotStaged) {
		t.Fatalf("got %v, want ErrNotStaged", err)
	}
	noError(t, s.Prepare(t.Context(), "op"))
	noError(t, s.Prepare(t.Context(), "op"))
	accepted(t, s, report("op", 2), report("op", 1), report("op", 2))
	old := contentHash(t, s)
	view := s.View()
	sub, err := s.Hub().Subscribe(s.Revision())
	noError(t, err)
	before := s.Applied()

	// Commands of the entry of the swap come before it, wherever they stand.
	res := apply(t, s, swap("op"), put("lost", "1"), swap("op"), command(t, `abandon_restore { operation_id: "op" }`))
	e := before.Index + 1
	if r := res[0]; r.Rejection != nil || r.Epoch != 1 || r.Revision != s.Revision() || !proto.Equal(res[2], &commandpb.Result{
		Revision: r.Revision, Epoch: 1, Existed: true, TimeMs: r.TimeMs,
	}) {
		t.Fatalf("the swap: %s, again: %s", text(r), text(res[2]))
	}
	if r := res[1]; r.Rejection != nil || r.Epoch != 0 || r.Revision != e {
		t.Fatalf("a command beside the swap: %s", text(r))
	}
	if res[3].Rejection.GetCode() != commandpb.Code_CODE_PRECONDITION {
		t.Fatalf("abandoned while it is swapped in: %s", text(res[3]))
	}
	if contentHash(t, s) != backup {
		t.Fatal("the restored content is not the backup's")
	}
	src := cmds[0].GetBeginRestore().Source.Clock
	if s.Epoch() != 1 || s.Revision() != src.Revision+1 || s.RevisionBase() != src.Revision+1-e {
		t.Fatalf("epoch %d revision %d base %d at entry %d, the backup is at %d", s.Epoch(), s.Revision(), s.RevisionBase(), e, src.Revision)
	}
	if p := s.Applied(); p.Index != e || !bytes.Equal(p.Members, start.Members) || s.Durable() != e {
		t.Fatalf("applied %+v, durable %d", p, s.Durable())
	}
	sound(t, s)
	// Who watched is told; who reads on sees the old state.
	if _, _, err := sub.Next(t.Context()); !errors.Is(err, ErrResync) {
		t.Fatalf("got %v, want ErrResync", err)
	}
	if p, err := view.Pipeline("live"); p == nil || err != nil {
		t.Fatalf("the view changed: %v, %v", p, err)
	}
	if h, err := view.ContentHash(t.Context()); err != nil || string(h) != old {
		t.Fatalf("the view changed: %v", err)
	}
	noError(t, view.Close())
	now := s.View()
	if now.Epoch() != 1 || view.Epoch() != 0 {
		t.Fatalf("epochs %d and %d", now.Epoch(), view.Epoch())
	}
	op, err := now.Operation("op")
	if op == nil || err != nil {
		t.Fatalf("the operation did not outlive the swap: %v", err)
	}
	if stage, err := now.Stage(); stage != nil || err != nil {
		t.Fatalf("the stage outlived the swap: %v, %v", stage, err)
	}
	if last, err := now.LastRestore(); err != nil || last.GetOperationId() != "op" {
		t.Fatalf("last restore %v, %v", last, err)
	}
	noError(t, now.Close())
	accepted(t, s, swap("op")) // a repeat

	// A command for the old epoch does nothing and is not remembered.
	c := put("late", "1")
	c.RequestId, c.ExpectedEpoch = "late", proto.Uint64(0)
	r := apply(t, s, c)[0]
	if r.Rejection.GetCode() != commandpb.Code_CODE_EPOCH || r.Rejection.Current != s.Revision() || !strings.Contains(r.Rejection.Reason, "read everything again") {
		t.Fatalf("a command for another epoch: %s", text(r))
	}
	c.ExpectedEpoch = proto.Uint64(1)
	r = accepted(t, s, c)
	if r.Epoch != 1 || r.Revision != s.Applied().Index+s.RevisionBase() {
		t.Fatalf("after the restore: %s", text(r))
	}

	// Undo is a restore of the undo point.
	u, ok := s.UndoPoint()
	if !ok || u.Epoch != 0 || u.Index != e || u.Revision != e {
		t.Fatalf("undo point %+v, %v", u, ok)
	}
	im, err := OpenImage(fs, u.Dir, testOptions())
	noError(t, err)
	noError(t, im.View().check(t.Context(), false))
	want, err := im.checkedSource(t.Context(), false)
	noError(t, err)
	noError(t, im.Close())
	high := s.Revision()
	accepted(t, s, stageCommands(t, fs, u.Dir, "undo")...)
	noError(t, s.Prepare(t.Context(), "undo"))
	accepted(t, s, report("undo", 1), swap("undo"))
	if contentHash(t, s) != string(want.ContentHash) || s.Epoch() != 2 || s.Revision() <= high {
		t.Fatalf("undone: epoch %d revision %d (was %d)", s.Epoch(), s.Revision(), high)
	}
	if u2, ok := s.UndoPoint(); !ok || u2.Epoch != 1 || u2.Dir == u.Dir {
		t.Fatalf("undo point %+v, %v", u2, ok)
	}
	s.retiring.Wait()
	names, err := fs.List("state")
	noError(t, err)
	slices.Sort(names)
	if len(names) != 3 { // CURRENT, db, undo
		t.Fatalf("left in the directory: %v", names)
	}
	sound(t, s)
	before2 := dump(t, s)
	noError(t, s.Close())
	s = open(t, fs, "state")
	if dump(t, s) != before2 {
		t.Fatal("the state changed with the restart")
	}
	if u3, ok := s.UndoPoint(); !ok || u3.Epoch != 1 {
		t.Fatalf("undo point after a restart %+v, %v", u3, ok)
	}
	noError(t, s.Close())
}

// TestGenerationsOfAnotherEpochAreFenced although the group has the same number
// again.
func TestGenerationsOfAnotherEpochAreFenced(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	join := `join_group { service_id: "a" group_id: "g" partition_count: 1 }`
	first := do(t, s, join).Generation
	if first != 1 || Fence(0, 7) != 7 {
		t.Fatalf("generation %d in epoch 0", first)
	}
	_, err := s.Image("image")
	noError(t, err)
	accepted(t, s, stageCommands(t, fs, "image", "op")...)
	noError(t, s.Prepare(t.Context(), "op"))
	accepted(t, s, report("op", 1), swap("op"))
	commit := `commit_group_offset { group_id: "g" source_id: "s" offset: 3 service_id: "a" generation: %d }`
	r := do(t, s, fmt.Sprintf(commit, first))
	again := do(t, s, join)
	if r.Rejection.GetCode() != commandpb.Code_CODE_FENCED || r.Rejection.Current != again.Generation || again.Generation != Fence(1, 1) {
		t.Fatalf("%s, then %s", text(r), text(again))
	}
	if r := do(t, s, fmt.Sprintf(`assign_partitions { group_id: "g" expected_generation: %d members { service_id: "a" partitions: 0 } }`, first)); r.Rejection.GetCode() != commandpb.Code_CODE_FENCED {
		t.Fatalf("an assignment of another epoch: %s", text(r))
	}
	if r := do(t, s, fmt.Sprintf(commit, again.Generation)); r.Rejection != nil {
		t.Fatal(text(r))
	}
	if r := do(t, s, fmt.Sprintf(`assign_partitions { group_id: "g" expected_generation: %d members { service_id: "a" partitions: 0 } }`, again.Generation)); r.Rejection != nil {
		t.Fatal(text(r))
	}
}

// TestBadStagesAreNotPrepared, and so never swapped in.
func TestBadStagesAreNotPrepared(t *testing.T) {
	fs := vfs.NewMem()
	g := &commands{r: randomness(t), time: 1_000_000}
	withBackup(t, fs, g, 100)
	pack := func(kv ...string) []byte {
		var data []byte
		w := NewChunkWriter(0, func(c Chunk) error { data = c.Data; return nil })
		for i := 0; i < len(kv); i += 2 {
			noError(t, w.Add([]byte(kv[i]), []byte(kv[i+1])))
		}
		_, _, err := w.Finish()
		noError(t, err)
		return data
	}
	cases := map[string]func(c []*commandpb.Command){
		"no zstd":       func(c []*commandpb.Command) { c[1].GetStageRestore().Data = []byte("nothing") },
		"another table": func(c []*commandpb.Command) { c[1].GetStageRestore().Data = pack("xabc", "") },
		"meta":          func(c []*commandpb.Command) { c[1].GetStageRestore().Data = pack("\x01clock", "") },
		"order":         func(c []*commandpb.Command) { c[1].GetStageRestore().Data = pack("pb", "", "pa", "") },
		"twice":         func(c []*commandpb.Command) { c[1].GetStageRestore().Data = pack("pa", "", "pa", "") },
		"other content": func(c []*commandpb.Command) { c[1].GetStageRestore().Data = pack("pa", "") },
		"hash":          func(c []*commandpb.Command) { c[0].GetBeginRestore().Source.ContentHash[0] ^= 1 },
		"counters":      func(c []*commandpb.Command) { c[0].GetBeginRestore().Source.Clock.Counts[countPipelines]++ },
		"sums":          func(c []*commandpb.Command) { c[0].GetBeginRestore().Source.Clock.Sums[sumSourceOffsets]++ },
	}
	for name, spoil := range cases {
		t.Run(name, func(t *testing.T) {
			s := open(t, fs, "state "+name)
			defer func() { noError(t, s.Close()) }()
			cmds := stageCommands(t, fs, "image", "op")
			spoil(cmds)
			accepted(t, s, cmds...)
			if err := s.Prepare(t.Context(), "op"); !errors.Is(err, ErrBadChunk) {
				t.Fatalf("got %v, want ErrBadChunk", err)
			}
			if r := apply(t, s, swap("op"))[0]; r.Rejection.GetCode() != commandpb.Code_CODE_PRECONDITION {
				t.Fatalf("swapped in: %s", text(r))
			}
			if left, err := databases(fs, "state "+name); err != nil || len(left) != 1 {
				t.Fatalf("databases %v are left, %v", left, err)
			}
		})
	}
}

// TestPrepareEndsWithItsStage: a preparation that is cancelled or overtaken
// leaves nothing.
func TestPrepareEndsWithItsStage(t *testing.T) {
	fs := vfs.NewMem()
	withBackup(t, fs, &commands{r: randomness(t), time: 1_000_000}, 100)
	s := open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	accepted(t, s, stageCommands(t, fs, "image", "op")...)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Prepare(ctx, "op"); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want Canceled", err)
	}
	noError(t, s.Prepare(t.Context(), "op"))
	abandon := command(t, `abandon_restore { operation_id: "op" reason: "changed our mind" }`)
	if r := accepted(t, s, abandon); !r.Existed {
		t.Fatal(text(r))
	}
	if r := accepted(t, s, abandon); r.Existed || r.Changed {
		t.Fatal(text(r))
	}
	if err := s.Prepare(t.Context(), "op"); !errors.Is(err, ErrNotStaged) {
		t.Fatalf("got %v, want ErrNotStaged", err)
	}
	if left, err := databases(fs, "state"); err != nil || len(left) != 1 {
		t.Fatalf("databases %v are left, %v", left, err)
	}
	// Staged, abandoned and staged again within one run.
	cmds := stageCommands(t, fs, "image", "again")
	cmds = append(append(slices.Clone(cmds), command(t, `abandon_restore { operation_id: "again" }`)), cmds...)
	for _, r := range apply(t, s, cmds...) {
		if r.Rejection != nil {
			t.Fatal(text(r))
		}
	}
	noError(t, s.Prepare(t.Context(), "again"))
}

// TestPrepareFollowsStaging: it begins before the first chunk is there and is
// ready when the last one is; what ends the stage ends it.
func TestPrepareFollowsStaging(t *testing.T) {
	fs := vfs.NewMem()
	withBackup(t, fs, &commands{r: randomness(t), time: 1_000_000}, 100)
	cmds := stageCommands(t, fs, "image", "op")
	other := open(t, fs, "other")
	_, err := other.Flush()
	noError(t, err)
	_, err = other.Image("plain")
	noError(t, err)
	noError(t, other.Close())
	for _, x := range []struct {
		name  string
		after int // commands of the stage that come first
		do    func(t *testing.T, s *FSM)
		want  error
	}{
		{"sealed", 1, func(t *testing.T, s *FSM) { accepted(t, s, cmds[1:]...) }, nil},
		{"sealed at once with the rest", 2, func(t *testing.T, s *FSM) {
			for _, r := range apply(t, s, cmds[2:]...) {
				if r.Rejection != nil {
					t.Error(text(r))
				}
			}
		}, nil},
		{"abandoned", 3, func(t *testing.T, s *FSM) {
			accepted(t, s, command(t, `abandon_restore { operation_id: "op" }`))
		}, ErrNotStaged},
		{"abandoned and begun again", 3, func(t *testing.T, s *FSM) {
			apply(t, s, append([]*commandpb.Command{command(t, `abandon_restore { operation_id: "op" }`)}, cmds[:2]...)...)
		}, ErrNotStaged},
		{"the state replaced", 3, func(t *testing.T, s *FSM) {
			_, err := s.Install("plain")
			noError(t, err)
		}, ErrNotStaged},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := open(t, fs, "state "+x.name)
			defer func() { noError(t, s.Close()) }()
			accepted(t, s, cmds[:x.after]...)
			ready := make(chan error, 1)
			go func() { ready <- s.Prepare(t.Context(), "op") }()
			for len(must(databases(fs, "state "+x.name))) < 2 {
				runtime.Gosched() // until it has begun
			}
			x.do(t, s)
			if err := <-ready; !errors.Is(err, x.want) {
				t.Fatalf("got %v, want %v", err, x.want)
			}
			if x.want != nil {
				s.retiring.Wait()
				if left := must(databases(fs, "state "+x.name)); len(left) != 1 {
					t.Fatalf("databases %v are left", left)
				}
				return
			}
			accepted(t, s, report("op", 1), swap("op"))
			sound(t, s)
		})
	}
}

// TestInstallAndWhatIsPrepared: an image that does not hold the stage leaves nothing
// of what was built from it; one that holds it leaves it, for the node has said
// that it is prepared.
func TestInstallAndWhatIsPrepared(t *testing.T) {
	fs := vfs.NewMem()
	withBackup(t, fs, &commands{r: randomness(t), time: 1_000_000}, 100)
	other := open(t, fs, "other")
	_, err := other.Image("plain")
	noError(t, err)
	noError(t, other.Close())
	for image, want := range map[string]int{"plain": 1, "staged": 2} {
		s := open(t, fs, "state "+image)
		accepted(t, s, stageCommands(t, fs, "image", "op")...)
		noError(t, s.Prepare(t.Context(), "op"))
		if image == "staged" {
			_, err := s.Image(image)
			noError(t, err)
		}
		_, err := s.Install(image)
		noError(t, err)
		s.retiring.Wait()
		if left := must(databases(fs, "state "+image)); len(left) != want {
			t.Errorf("%s: databases %v, want %d", image, left, want)
		}
		if want == 2 {
			accepted(t, s, report("op", 1), swap("op"))
			sound(t, s)
		}
		noError(t, s.Close())
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestSwapSurvivesACrashAnywhere: what is found is the old or the new state,
// whole; the swap always completes in the end, and the undo point holds the old
// state.
func TestSwapSurvivesACrashAnywhere(t *testing.T) {
	base := vfs.NewCrashableMem()
	backup := withBackup(t, base, &commands{r: randomness(t), time: 1_000_000}, 60)
	setup := open(t, base, "state")
	accepted(t, setup, put("live", "1"))
	accepted(t, setup, stageCommands(t, base, "image", "op")...)
	accepted(t, setup, report("op", 1))
	_, err := setup.Flush()
	noError(t, err)
	at := setup.Applied().Index
	old := contentHash(t, setup)
	noError(t, setup.Close())
	everyWrite(t, func(t *testing.T, inj *nthWrite, crashed func(*vfs.MemFS) []*vfs.MemFS) {
		fs := crash(base, 0, 1)
		crashed(fs)
		s, err := Open(faulty(fs, inj), "state", testOptions())
		if err == nil {
			if err = s.Prepare(context.Background(), "op"); err == nil {
				_, err = s.Apply([]Entry{{Index: at + 1, Term: 1, Commands: [][]byte{marshal(t, swap("op"))}}})
			}
			if err == nil && !inj.fired.Load() {
				// Power is lost right after Apply returned.
				inj.off.Store(true)
				checkSwapped(t, inj, crash(fs, 0, 1), at, old, backup, true)
				inj.off.Store(false)
			}
		}
		for _, c := range crashed(fs) {
			checkSwapped(t, inj, c, at, old, backup, false)
		}
		inj.off.Store(true)
		if s != nil {
			_ = s.Close()
		}
	})
}

// checkSwapped opens what a crash left and brings the swap to its end.
func checkSwapped(t *testing.T, inj *nthWrite, fs *vfs.MemFS, at uint64, old, backup string, done bool) {
	t.Helper()
	s := open(t, fs, "state")
	switch got := contentHash(t, s); {
	case got == old && s.Epoch() == 0 && s.Applied().Index == at && !done:
		// The log has the entry.
		_, err := s.Apply([]Entry{{Index: at + 1, Term: 1, Commands: [][]byte{marshal(t, swap("op"))}}})
		noError(t, err)
	case got == backup && s.Epoch() == 1 && s.Applied().Index == at+1:
	default:
		t.Fatalf("write %d: neither the old nor the new state: %s", inj.at, dump(t, s))
	}
	if contentHash(t, s) != backup || s.Epoch() != 1 || s.Applied().Index != at+1 || s.Durable() != at+1 {
		t.Fatalf("write %d: the swap is not complete: %s", inj.at, dump(t, s))
	}
	sound(t, s)
	u, ok := s.UndoPoint()
	if !ok || u.Epoch != 0 || u.Index != at+1 {
		t.Fatalf("write %d: undo point %+v, %v", inj.at, u, ok)
	}
	im, err := OpenImage(fs, u.Dir, testOptions())
	noError(t, err)
	v := im.View()
	h, err := v.ContentHash(t.Context())
	if err != nil || string(h) != old {
		t.Fatalf("write %d: the undo point is another state: %v", inj.at, err)
	}
	noError(t, errors.Join(v.check(t.Context(), false), v.Close(), im.Close()))
	s.retiring.Wait()
	names, err := fs.List("state")
	noError(t, err)
	if len(names) != 3 { // CURRENT, db, undo
		t.Fatalf("write %d: left in the directory: %v", inj.at, names)
	}
	noError(t, s.Close())
}

// TestFinishingASwapSurvivesACrashAnywhere: the crash comes while Open does what
// an earlier crash left undone.
func TestFinishingASwapSurvivesACrashAnywhere(t *testing.T) {
	base := vfs.NewCrashableMem()
	backup := withBackup(t, base, &commands{r: randomness(t), time: 1_000_000}, 60)
	setup := open(t, base, "state")
	accepted(t, setup, put("live", "1"))
	accepted(t, setup, stageCommands(t, base, "image", "op")...)
	accepted(t, setup, report("op", 1))
	at := setup.Applied().Index
	old := contentHash(t, setup)
	// As if the power failed right after the record that the swap is due.
	tx := setup.newTx(setup.cur)
	tx.revision = at + 1
	if _, err := tx.command(marshal(t, swap("op")), false); err != nil {
		t.Fatal(err)
	}
	tx.pos.Index = at + 1
	noError(t, setup.commit(tx))
	_, err := setup.Flush()
	noError(t, err)
	due := crash(base, 0, 1)
	_ = setup.Close()
	everyWrite(t, func(t *testing.T, inj *nthWrite, crashed func(*vfs.MemFS) []*vfs.MemFS) {
		fs := crash(due, 0, 1)
		crashed(fs)
		s, err := Open(faulty(fs, inj), "state", testOptions())
		for _, c := range crashed(fs) {
			checkSwapped(t, inj, c, at, old, backup, true)
		}
		inj.off.Store(true)
		if err == nil {
			_ = s.Close()
		}
	})
	// An image of that moment, installed elsewhere, becomes the new state.
	im := open(t, due, "state") // finishes it, and keeps the undo point of that moment
	u, _ := im.UndoPoint()
	noError(t, im.Close())
	noError(t, copyFiles(due, u.Dir, "between"))
	other := open(t, due, "other")
	_, err = other.Install("between")
	noError(t, err)
	if contentHash(t, other) != backup || other.Epoch() != 1 {
		t.Fatalf("installed: %s", dump(t, other))
	}
	noError(t, other.Close())
}

// TestReadersAcrossASwap: entries are applied while the new state is prepared,
// and whoever reads meanwhile sees one state or the other, whole, and is told
// which.
func TestReadersAcrossASwap(t *testing.T) {
	fs := vfs.NewMem()
	src := open(t, fs, "source")
	for i := range 50 {
		accepted(t, src, put(fmt.Sprint("new-", i), ""))
	}
	_, err := src.Image("image")
	noError(t, errors.Join(err, src.Close()))
	s := open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	for i := range 30 {
		accepted(t, s, put(fmt.Sprint("old-", i), ""))
	}
	accepted(t, s, stageCommands(t, fs, "image", "op")...)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// One that is newer than the view may be from after the swap.
				late, lerr := s.Latest().Pipeline("new-7")
				v := s.View()
				old, restored := 0, 0
				err := v.Pipelines("", 0, func(p *commandpb.Pipeline) bool {
					if strings.HasPrefix(p.Spec.Id, "new-") {
						restored++
					} else {
						old++
					}
					return true
				})
				sums := s.RecentSums()
				if err = errors.Join(err, lerr, v.Close()); err != nil || len(sums) == 0 {
					t.Error(err, sums)
					return
				}
				if whole := v.Epoch() == 0 && restored == 0 && old >= 30 || v.Epoch() == 1 && restored == 50 && old == 0; !whole || late != nil && v.Epoch() == 0 {
					t.Errorf("epoch %d shows %d old and %d restored pipelines, %v", v.Epoch(), old, restored, late)
					return
				}
			}
		})
	}
	ready := make(chan error, 1)
	go func() { ready <- s.Prepare(t.Context(), "op") }()
	for i := range 30 {
		accepted(t, s, put(fmt.Sprint("more-", i), ""))
	}
	// Even while it is being prepared: the swap waits for it.
	accepted(t, s, report("op", 1), swap("op"))
	if err := <-ready; err != nil && !errors.Is(err, ErrNotStaged) {
		t.Error(err)
	}
	for i := range 10 {
		accepted(t, s, offsetCommand("s", uint64(i+1)))
	}
	close(stop)
	wg.Wait()
	sound(t, s)
	s.retiring.Wait()
	if left, err := databases(fs, "state"); err != nil || len(left) != 1 {
		t.Fatalf("databases %v are left, %v", left, err)
	}
}
