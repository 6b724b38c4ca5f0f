package offline

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/config"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// stopped returns the settings of a node that committed 30 offsets, was started
// again, killed, and has one image.
func stopped(t *testing.T) config.Config {
	t.Helper()
	cfg := cluster(t, t.TempDir(), 1)[0]
	s := start(t, cfg)
	commit(t, s, 1, 30)
	stop(t, s)
	s = start(t, cfg)
	commit(t, s, 31, 40)
	expect(t, s, 40)
	dir := crashed(t, cfg.DataDir)
	stop(t, s)
	cfg.DataDir = dir
	makeImage(t, dir)
	return cfg
}

// makeImage puts an image of the replayed state into dir and returns its
// directory.
func makeImage(t *testing.T, dir string) string {
	t.Helper()
	d, err := Open(dir)
	must(t, err)
	st, err := d.ReplayState(t.TempDir(), nil)
	must(t, err)
	images, err := snap.OpenStore(vfs.Default, filepath.Join(dir, datadir.ImagesName), snap.Options{})
	must(t, err)
	info, err := images.Create(within(t), func(dir string) (snap.Meta, error) {
		pos, err := st.fsm.Image(dir)
		return snap.Meta{Index: pos.Index, Term: pos.Term, ConfState: st.Position.ConfState}, err
	})
	must(t, err)
	must(t, errors.Join(st.Close(), d.Close()))
	return images.Dir(info.ID)
}

// fingerprint covers names, modes, times and contents below dir.
func fingerprint(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(h, path, info.Mode(), info.ModTime().UnixNano(), info.Size())
		if e.Type().IsRegular() {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			h.Write(raw)
		}
		return nil
	}))
	return fmt.Sprintf("%x", h.Sum(nil))
}

func check(t *testing.T, dir string) *Report {
	t.Helper()
	d, err := Open(dir)
	must(t, err)
	r, err := Check(within(t), d, CheckOptions{Replay: true, Scratch: t.TempDir()})
	must(t, errors.Join(err, d.Close()))
	return r
}

// Goal: looking leaves no trace at all. Method: names, contents and times of all
// files before and after everything that only looks.
func TestLookingLeavesNoTrace(t *testing.T) {
	dir := stopped(t).DataDir
	before := fingerprint(t, dir)
	if r := check(t, dir); !r.Intact {
		t.Errorf("%+v", r)
	}
	d, err := Open(dir)
	must(t, err)
	s, err := d.OpenState()
	must(t, err)
	if s.Following == 0 || s.Committed == 0 || s.Committed > s.Following {
		t.Errorf("behind the state lie %d entries, %d committed", s.Following, s.Committed)
	}
	must(t, errors.Join(s.Close(), d.Close()))
	images, err := ListImages(dir)
	must(t, err)
	if len(images) != 1 {
		t.Fatalf("%d images", len(images))
	}
	if im, gone := CheckImage(images[0]); gone || im.Err != nil {
		t.Errorf("%+v", im)
	}
	_, err = PlanRecovery(RecoverOptions{Dir: dir})
	must(t, err)
	if after := fingerprint(t, dir); after != before {
		t.Error("something was changed")
	}
}

// Every table shows what was written; a key selects.
func TestStateTables(t *testing.T) {
	dir := stopped(t).DataDir
	d, err := Open(dir)
	must(t, err)
	defer d.Close()
	s, err := d.ReplayState(t.TempDir(), nil)
	must(t, err)
	defer s.Close()
	offsets, err := FindTable("offsets")
	must(t, err)
	list := func(table Table, key ...string) (out []string) {
		must(t, table.List(s.View, key, func(r Record) error {
			out = append(out, strings.Join(r.Key, "/"))
			return nil
		}))
		return out
	}
	if got := list(offsets); len(got) < 30 || got[0] != "s/1" || !slices.Contains(got, "s/30") {
		t.Errorf("offsets %v", got)
	}
	if got := list(offsets, "s", "7"); fmt.Sprint(got) != "[s/7]" {
		t.Errorf("one offset %v", got)
	}
	if got := list(offsets, "other"); len(got) != 0 {
		t.Errorf("of another source %v", got)
	}
	for _, table := range Tables() {
		if table.Name != "offsets" && len(list(table)) != 0 {
			t.Errorf("%s is not empty", table.Name)
		}
		if len(list(table, "x")) != 0 {
			t.Errorf("%s has x", table.Name)
		}
	}
	stop := errors.New("stop")
	n := 0
	if err := offsets.List(s.View, nil, func(Record) error { n++; return stop }); !errors.Is(err, stop) || n != 1 {
		t.Errorf("stopped after %d: %v", n, err)
	}
}

// Composite keys, and records of every kind.
func TestStateTablesOfAllKinds(t *testing.T) {
	dir := t.TempDir()
	fsm, _, err := openState(dir, nil)
	must(t, err)
	defer fsm.Close()
	spec := &commandpb.PipelineSpec{Id: "ns/p", Name: "p"}
	for i, c := range []*commandpb.Command{
		{Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: &commandpb.CommitSourceOffset{SourceId: "a", Partition: 2, Offset: 1}}},
		{Op: &commandpb.Command_AdvanceWatermark{AdvanceWatermark: &commandpb.AdvanceWatermark{SourceId: "b", Partition: 1, Position: 3}}},
		{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: spec}}},
		{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: &commandpb.Sidecar{SidecarId: "ns/pod", Endpoint: "h:1"}}}},
		{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{ServiceId: "v", CheckpointId: "c"}}},
	} {
		c.TimeMs = 1
		raw, err := c.MarshalVT()
		must(t, err)
		res, err := fsm.Apply([]router.Entry{{Index: uint64(i + 2), Term: 1, Commands: [][]byte{raw}, Local: true}})
		must(t, err)
		if rej := res[0][0].GetRejection(); rej != nil {
			t.Logf("command %d: %v", i, rej)
		}
	}
	v := fsm.View()
	defer v.Close()
	var got []string
	for _, table := range Tables() {
		must(t, table.List(v, nil, func(r Record) error {
			got = append(got, r.Table+" "+strings.Join(r.Key, "|"))
			return nil
		}))
	}
	for _, want := range []string{"sidecars ns/pod", "offsets a|2", "watermarks b|1", "checkpoints v"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q is missing in %q", want, got)
		}
	}
	if _, err := FindTable("nosuch"); err == nil {
		t.Error("found a table that is not")
	}
}

// failed returns the parts of a report that failed.
func failed(r *Report) string {
	var parts []string
	for _, f := range r.Findings {
		if f.Verdict == VerdictFailed && !slices.Contains(parts, f.Part) {
			parts = append(parts, f.Part)
		}
	}
	return strings.Join(parts, " ")
}

// Goal: damage is found and named, whatever it hit, and the rest is still
// checked. Method: one kind of damage at a time, on a copy.
func TestCheckFindsDamage(t *testing.T) {
	origin := stopped(t).DataDir
	flip := func(t *testing.T, pattern string, from, n int) {
		t.Helper()
		names, err := filepath.Glob(pattern)
		must(t, err)
		if len(names) == 0 {
			t.Fatalf("no %s", pattern)
		}
		raw, err := os.ReadFile(names[0])
		must(t, err)
		for i := from; i < min(from+n, len(raw)); i++ {
			raw[i] ^= 0xff
		}
		must(t, os.WriteFile(names[0], raw, 0o600))
	}
	for _, c := range []struct {
		name string
		hurt func(t *testing.T, dir string)
		want string // the parts that fail
	}{
		{"nothing", func(*testing.T, string) {}, ""},
		{"a table of the state", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "state", "db-*", "*.sst"), 10, 20) }, "state"},
		{"the log", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "wal", "*.wal"), 700, 64) }, "log"},
		{"an image", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "images", "*", "*.sst"), 30, 1) }, "images"},
		{"the manifest of an image", func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "images", "*", "MANIFEST"), 80, 1) }, "images"},
		{"an image cut short", func(t *testing.T, dir string) {
			names, err := filepath.Glob(filepath.Join(dir, "images", "*", "*.sst"))
			must(t, err)
			must(t, os.Truncate(names[0], 10))
		}, "images"},
		{"the state is gone", func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, "state"))) }, "state"},
		{"CURRENT is gone", func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "state", "CURRENT"))) }, "state"},
		{"the log is gone", func(t *testing.T, dir string) { must(t, os.RemoveAll(filepath.Join(dir, "wal"))) }, "log"},
		{"the log of another cluster", func(t *testing.T, dir string) {
			id, err := datadir.ReadIdentity(dir)
			must(t, err)
			id.ClusterID++
			must(t, datadir.WriteIdentity(dir, id))
		}, "log"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := crashed(t, origin)
			c.hurt(t, dir)
			r := check(t, dir)
			got := failed(r)
			// A damaged table is found by the replay as well, if it reads it.
			if got = strings.TrimSuffix(got, " replay"); got != c.want || r.Intact != (c.want == "") {
				t.Errorf("failed: %q, want %q: %+v", got, c.want, r.Findings)
			}
			if c.want != "" && !strings.Contains(r.Summary(), c.want) {
				t.Errorf("summary %q", r.Summary())
			}
		})
	}
}

// A state that ends before its log begins is rebuilt from an image when one
// lies between, and found unfit when none does.
func TestStateBehindItsLog(t *testing.T) {
	cfg := stopped(t)
	dir := cfg.DataDir
	id, err := datadir.ReadIdentity(dir)
	must(t, err)
	// An older state under a log that was truncated: somebody put it back.
	d, err := Open(dir)
	must(t, err)
	middle, last := d.State.Index+2, d.Log.LastIndex
	must(t, d.Close())
	l, _, err := wal.Open(filepath.Join(dir, "wal"), wal.Identity{ClusterID: id.ClusterID, NodeID: id.NodeID}, wal.Start{}, wal.Options{SegmentBytes: segment})
	must(t, err)
	must(t, l.Compact(middle, groupOf(1, 1, []raftnode.Member{{ID: 1}}).ConfState))
	must(t, l.Close())

	r := check(t, dir)
	if !r.Intact {
		t.Errorf("with an image: %+v", r.Findings)
	}
	p, err := PlanRecovery(RecoverOptions{Dir: dir})
	must(t, err)
	if p.Chosen().FromImage == "" || p.Chosen().LastIndex != last {
		t.Errorf("the plan %+v", p.Chosen())
	}
	without := crashed(t, dir)
	must(t, os.RemoveAll(filepath.Join(without, "images")))
	if r := check(t, without); failed(r) != "fit replay" {
		t.Errorf("without an image: %+v", r.Findings)
	}
	if _, err := PlanRecovery(RecoverOptions{Dir: without}); !errors.Is(err, raftnode.ErrStateBehindLog) {
		t.Errorf("without an image: %v", err)
	}
	_, err = Recover(RecoverOptions{Settings: testSettings(), Dir: dir}, p)
	must(t, err)
	s := start(t, cfg)
	expect(t, s, 40)
	stop(t, s)
}
