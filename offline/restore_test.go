package offline

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/server"
	"conveyor.etl/router/snap"
)

// saved returns an archive of a node that committed 40 offsets and was killed,
// with what Save said.
func saved(t *testing.T, c archive.Compression) ([]byte, *Saved) {
	t.Helper()
	cfg := cluster(t, t.TempDir(), 1)[0]
	s := start(t, cfg)
	commit(t, s, 1, 40)
	expect(t, s, 40)
	// A second start: the first run's commits are known to be committed.
	stop(t, s)
	s = start(t, cfg)
	expect(t, s, 40)
	dir := crashed(t, cfg.DataDir)
	stop(t, s)
	d, err := Open(dir)
	must(t, err)
	var out bytes.Buffer
	res, err := Save(within(t), d, &out, SaveOptions{Compression: c, Scratch: t.TempDir(), Version: "test"})
	must(t, errors.Join(err, d.Close()))
	return out.Bytes(), res
}

// Goal: from an archive to a serving cluster of three with the same content.
// Method: three restores on their own; their directories must begin identically.
func TestRestoreMakesACluster(t *testing.T) {
	raw, before := saved(t, archive.Zstd)
	base := t.TempDir()
	after := cluster(t, base, 3)
	var nodes []*server.Server
	var first *Restored
	for i := range after {
		o := RestoreOptions{Settings: testSettings(), Dir: after[i].DataDir, ClusterName: after[i].ClusterName, NodeID: uint64(i + 1), Members: []uint64{3, 1, 2}}
		res, err := Restore(within(t), bytes.NewReader(raw), o)
		must(t, err)
		if res.StateHash != before.Header.StateHash || res.ClusterID == before.Header.ClusterID {
			t.Fatalf("restored %+v of %+v", res, before)
		}
		if first == nil {
			first = res
		}
		if res.ClusterID != first.ClusterID || res.Index != first.Index || res.Term != first.Term || res.Revision != first.Revision {
			t.Fatalf("member %d begins at %+v, member 1 at %+v", i+1, res, first)
		}
		d, err := Open(after[i].DataDir)
		must(t, err)
		if r, err := Check(within(t), d, CheckOptions{Replay: true, Scratch: t.TempDir()}); err != nil || !r.Intact {
			t.Errorf("member %d: %+v, %v", i+1, r, err)
		}
		if fmt.Sprint(d.State.ConfState.GetVoters()) != "[1 2 3]" || d.State.Index != res.Index || d.Log.Start.Index != res.Index {
			t.Errorf("member %d: state at %+v, log from %+v", i+1, d.State, d.Log.Start)
		}
		must(t, d.Close())
	}
	for i := range after {
		nodes = append(nodes, start(t, after[i]))
	}
	for _, s := range nodes {
		expect(t, s, 40)
		if id := clusterID(t, s); id != first.ClusterID {
			t.Errorf("a node is of cluster %s", id)
		}
	}
	commit(t, nodes[0], 41, 45)
	for _, s := range nodes {
		expect(t, s, 45)
	}
	stop(t, nodes...)
}

// Two clusters from one backup are told apart by any of their parameters.
func TestRestoredClusterIDs(t *testing.T) {
	h := archive.Header{ClusterID: "00000000000000aa", Index: 7, Term: 2, StateHash: "abc"}
	o := RestoreOptions{ClusterName: "a", NodeID: 1, Members: []uint64{1, 2}}
	seen := map[uint64]string{restoredID(&h, &o): "the first"}
	other := o
	other.NodeID = 2
	if restoredID(&h, &other) != restoredID(&h, &o) {
		t.Error("the members of one cluster have different ids")
	}
	add := func(what string, h archive.Header, o RestoreOptions) {
		id := restoredID(&h, &o)
		if was := seen[id]; was != "" {
			t.Errorf("%s has the id of %s", what, was)
		}
		seen[id] = what
	}
	other = o
	other.ClusterName = "b"
	add("another name", h, other)
	other = o
	other.Members = []uint64{1, 2, 3}
	add("other members", h, other)
	other = o
	other.Token = "t"
	add("another token", h, other)
	h.StateHash = "abd"
	add("another content", h, o)
	h.Epoch = 1
	add("another epoch", h, o)
}

// Goal: whatever is wrong, an error and nothing left, not even the directory.
func TestRestoreRefusals(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	raw, _ := saved(t, archive.None)
	attempt := func(t *testing.T, raw []byte, change func(o *RestoreOptions), want error) {
		t.Helper()
		o := RestoreOptions{Settings: testSettings(), Dir: filepath.Join(t.TempDir(), "new", "node"), ClusterName: "c", NodeID: 1, Members: []uint64{1}}
		if change != nil {
			change(&o)
		}
		res, err := Restore(within(t), bytes.NewReader(raw), o)
		if err == nil {
			t.Fatalf("restored %+v", res)
		}
		if want != nil && !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		if _, err := os.Lstat(o.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the directory is left: %v", err)
		}
	}
	for range 30 {
		bad := bytes.Clone(raw)
		bad[rnd.Intn(len(bad))] ^= byte(1 + rnd.Intn(255))
		attempt(t, bad, nil, nil)
	}
	for range 10 {
		attempt(t, raw[:rnd.Intn(len(raw))], nil, nil)
	}
	attempt(t, append(bytes.Clone(raw), 0), nil, archive.ErrCorrupt)
	attempt(t, nil, nil, nil)
	attempt(t, raw, func(o *RestoreOptions) { o.MaxBytes = 1000 }, archive.ErrTooLarge)
	attempt(t, raw, func(o *RestoreOptions) { o.NodeID = 2 }, nil)
	attempt(t, raw, func(o *RestoreOptions) { o.Members = []uint64{1, 1} }, nil)
	attempt(t, raw, func(o *RestoreOptions) { o.ClusterName = "" }, nil)

	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		dir := filepath.Join(t.TempDir(), "node")
		_, err := Restore(ctx, bytes.NewReader(raw), RestoreOptions{Settings: testSettings(), Dir: dir, ClusterName: "c", NodeID: 1, Members: []uint64{1}})
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if _, err := os.Lstat(dir); err == nil {
			t.Error("the directory is left")
		}
	})
	t.Run("not empty", func(t *testing.T) {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "photo.jpg"), nil, 0o600))
		o := RestoreOptions{Settings: testSettings(), Dir: dir, ClusterName: "c", NodeID: 1, Members: []uint64{1}}
		if _, err := Restore(within(t), bytes.NewReader(raw), o); !errors.Is(err, ErrNotEmpty) {
			t.Error(err)
		}
		if left, _ := os.ReadDir(dir); len(left) != 1 {
			t.Errorf("left %v", left)
		}
	})
	t.Run("twice", func(t *testing.T) {
		dir := t.TempDir() // empty, and stays there on errors
		o := RestoreOptions{Settings: testSettings(), Dir: dir, ClusterName: "c", NodeID: 1, Members: []uint64{1}}
		if _, err := Restore(within(t), bytes.NewReader(raw[:len(raw)/2]), o); err == nil {
			t.Error("half an archive was taken")
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
		_, err := Restore(within(t), bytes.NewReader(raw), o)
		must(t, err)
		id, err := datadir.ReadIdentity(dir)
		must(t, err)
		if _, err := Restore(within(t), bytes.NewReader(raw), o); !errors.Is(err, ErrNotEmpty) {
			t.Error(err)
		}
		if again, err := datadir.ReadIdentity(dir); err != nil || again.ClusterID != id.ClusterID {
			t.Error("the refused restore changed the directory")
		}
	})
}

// Goal: an archive that is whole but does not hold what it says is refused, though by then
// all of the member is made. Method: one is made anew with another hash in its header, and
// without any.
func TestRestoreComparesTheContent(t *testing.T) {
	raw, before := saved(t, archive.None)
	dir := filepath.Join(t.TempDir(), "image")
	h, _, err := archive.Extract(within(t), bytes.NewReader(raw), archive.Limits{}, vfs.Default, dir)
	must(t, err)
	image, err := snap.OpenDir(vfs.Default, dir)
	must(t, err)
	defer image.Close()
	restore := func(hash string) (*Restored, string, []string, error) {
		h.StateHash = hash
		a, err := archive.NewArchive(within(t), image, h, archive.Zstd, 0)
		must(t, err)
		defer a.Close()
		var steps []string
		o := RestoreOptions{Settings: testSettings(), Dir: filepath.Join(t.TempDir(), "node"), ClusterName: "c", NodeID: 1, Members: []uint64{1}}
		o.Point = func(step string) { steps = append(steps, step) }
		res, err := Restore(within(t), a, o)
		return res, o.Dir, steps, err
	}
	_, made, steps, err := restore(strings.Repeat("0", len(h.StateHash)))
	if !errors.Is(err, ErrContent) || slices.Contains(steps, datadir.StepDecide) {
		t.Errorf("with another hash: %v, after %v", err, steps)
	}
	if _, err := os.Lstat(made); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
	res, _, _, err := restore("")
	must(t, err)
	if res.StateHash != before.Header.StateHash {
		t.Errorf("without a hash, the content has %s, want %s", res.StateHash, before.Header.StateHash)
	}
}

// Goal: a restore that dies leaves a directory in which it can be repeated, or
// which is complete. Method: the directory is copied at every step.
func TestRestoreSurvivesEveryCrash(t *testing.T) {
	raw, _ := saved(t, archive.Gzip)
	cfg := cluster(t, t.TempDir(), 1)[0]
	type crash struct{ step, dir string }
	var crashes []crash
	o := RestoreOptions{Settings: testSettings(), Dir: cfg.DataDir, ClusterName: cfg.ClusterName, NodeID: 1, Members: []uint64{1}}
	o.Point = func(step string) { crashes = append(crashes, crash{step, crashed(t, cfg.DataDir)}) }
	_, err := Restore(within(t), bytes.NewReader(raw), o)
	must(t, err)
	if len(crashes) < 10 {
		t.Fatalf("only %d steps", len(crashes))
	}
	decided := false
	for i, x := range crashes {
		decided = decided || x.step == datadir.StepDecided
		again := o
		again.Point, again.Dir = nil, x.dir
		_, err := Restore(within(t), bytes.NewReader(raw), again)
		if decided != errors.Is(err, ErrNotEmpty) || !decided && err != nil {
			t.Errorf("stopped at %d %s: repeated: %v", i, x.step, err)
		}
		s := start(t, at(cfg, x.dir))
		expect(t, s, 40)
		stop(t, s)
	}
}

func TestSaveFile(t *testing.T) {
	cfg := cluster(t, t.TempDir(), 1)[0]
	s := start(t, cfg)
	commit(t, s, 1, 3)
	if _, err := Open(cfg.DataDir); !errors.Is(err, datadir.ErrInUse) {
		t.Errorf("beside a running node: %v", err)
	}
	stop(t, s)
	d, err := Open(cfg.DataDir)
	must(t, err)
	defer d.Close()
	dir := t.TempDir()
	name := filepath.Join(dir, "b.tar.zst")
	o := SaveOptions{Compression: archive.Zstd, Scratch: t.TempDir()}
	res, err := SaveFile(within(t), d, name, o)
	must(t, err)
	st, err := os.Stat(name)
	must(t, err)
	if st.Size() != res.Bytes {
		t.Errorf("%d bytes, told %d", st.Size(), res.Bytes)
	}
	if _, err := SaveFile(within(t), d, name, o); !errors.Is(err, os.ErrExist) {
		t.Errorf("over an existing file: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := SaveFile(ctx, d, filepath.Join(dir, "c"), o); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left %v", left)
	}
	if left, _ := os.ReadDir(o.Scratch); len(left) != 0 {
		t.Errorf("left in the scratch directory: %v", left)
	}
}

func TestRoomIsDemanded(t *testing.T) {
	dir := t.TempDir()
	if err := demandRoom(dir, 1<<60); !errors.Is(err, ErrNoRoom) {
		t.Error(err)
	}
	if err := demandRoom(filepath.Join(dir, "nosuch"), 0); err == nil {
		t.Error("a directory that is not there has room")
	}
}
