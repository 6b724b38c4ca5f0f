package offline

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conveyor.etl/router/config"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/server"
)

// lostQuorum runs three nodes, commits 50 offsets, and returns copies of their
// directories as a crash leaves them: state on disk old, everything in the log.
func lostQuorum(t *testing.T) ([]config.Config, []string) {
	t.Helper()
	c := cluster(t, t.TempDir(), 3)
	nodes := []*server.Server{start(t, c[0]), start(t, c[1]), start(t, c[2])}
	commit(t, nodes[0], 1, 50)
	for _, s := range nodes {
		expect(t, s, 50) // a linearizable read: the node has applied all
	}
	var dirs []string
	for i := range c {
		dirs = append(dirs, crashed(t, c[i].DataDir))
	}
	stop(t, nodes...)
	return c, dirs
}

// Goal: the one survivor of three goes on with everything that was
// acknowledged, and the old members cannot disturb it.
func TestRecoverTheLastSurvivor(t *testing.T) {
	c, dirs := lostQuorum(t)
	o := RecoverOptions{Settings: testSettings(), Dir: dirs[1]}
	p, err := PlanRecovery(o)
	must(t, err)
	if got := p.Chosen(); got.LastIndex < 51 || got.StateIndex >= got.LastIndex || got.CommitIndex > got.LastIndex {
		t.Errorf("the plan sees %+v", got)
	}
	if fmt.Sprint(p.Voters, p.Lost, p.Members) != "[1 2 3] [1 3] [2]" || p.Complete || p.Index != p.Chosen().LastIndex+1 || p.Term <= p.Chosen().Term {
		t.Errorf("the plan is %+v", p)
	}
	res, err := Recover(o, p)
	must(t, err)
	if res.ClusterID == p.OldClusterID || res.Index != p.Index || res.Term != p.Term || res.Resumed {
		t.Errorf("recovered: %+v", res)
	}
	s := start(t, at(c[1], dirs[1]))
	defer stop(t, s)
	expect(t, s, 50)
	if id := clusterID(t, s); id != res.ClusterID {
		t.Errorf("the node is of cluster %s, the recovery made %s", id, res.ClusterID)
	}
	commit(t, s, 51, 60)
	expect(t, s, 60)
	// The lost come back: they are a majority of the old cluster and must not
	// reach into the new one, nor it into theirs.
	old := []*server.Server{start(t, at(c[0], dirs[0])), start(t, at(c[2], dirs[2]))}
	defer stop(t, old...)
	commit(t, old[0], 51, 51)
	expect(t, old[1], 51)
	expect(t, s, 60)
	commit(t, s, 61, 61)
	expect(t, s, 61)
}

// The plan names the copy that holds the most, and when nothing acknowledged
// can be missing.
func TestPlanComparesCopies(t *testing.T) {
	c := cluster(t, t.TempDir(), 3)
	nodes := []*server.Server{start(t, c[0]), start(t, c[1]), start(t, c[2])}
	commit(t, nodes[0], 1, 5)
	for _, s := range nodes {
		expect(t, s, 5)
	}
	old := crashed(t, c[2].DataDir)
	commit(t, nodes[0], 6, 20)
	expect(t, nodes[1], 20)
	newer := []string{crashed(t, c[0].DataDir), crashed(t, c[1].DataDir)}
	stop(t, nodes...)

	o := RecoverOptions{Settings: testSettings(), Dir: old, Peers: newer[:1]}
	p, err := PlanRecovery(o)
	must(t, err)
	if p.IsBest() || p.Best != 1 || !p.Complete || fmt.Sprint(p.Lost) != "[2]" {
		t.Fatalf("the plan is %+v", p)
	}
	if _, err := Recover(o, p); !errors.Is(err, ErrNotBest) || !strings.Contains(err.Error(), newer[0]) {
		t.Fatalf("recovering the worse copy: %v", err)
	}
	if p, err = PlanRecovery(RecoverOptions{Dir: newer[1], Peers: []string{old}}); err != nil || !p.IsBest() || !p.Complete {
		t.Fatalf("%+v, %v", p, err)
	}
	o.Force = true
	_, err = Recover(o, nil)
	must(t, err)
	s := start(t, at(c[2], old))
	expect(t, s, 5)
	stop(t, s)

	if _, err := PlanRecovery(RecoverOptions{Dir: newer[0], Peers: []string{old}}); !errors.Is(err, datadir.ErrForeign) {
		t.Errorf("comparing with a directory of another cluster: %v", err)
	}
	if _, err := PlanRecovery(RecoverOptions{Dir: newer[0], Peers: []string{newer[0]}}); err == nil || !strings.Contains(err.Error(), "both of node 1") {
		t.Errorf("comparing with itself: %v", err)
	}
}

// Further members get directories that make one cluster with the survivor.
func TestRecoverWithFurtherMembers(t *testing.T) {
	_, dirs := lostQuorum(t)
	base := t.TempDir()
	o := RecoverOptions{Settings: testSettings(), Dir: dirs[0], Also: []NewMember{{4, filepath.Join(base, "four")}, {5, filepath.Join(base, "five")}}}
	res, err := Recover(o, nil)
	must(t, err)
	if fmt.Sprint(res.Members) != "[1 4 5]" {
		t.Fatalf("%+v", res)
	}
	after := cluster(t, base, 5)
	peers := []config.Peer{after[0].Peers[0], after[3].Peers[3], after[4].Peers[4]}
	var nodes []*server.Server
	for _, n := range []struct {
		id  int
		dir string
	}{{1, dirs[0]}, {4, o.Also[0].Dir}, {5, o.Also[1].Dir}} {
		cfg := at(after[n.id-1], n.dir)
		cfg.Peers = peers
		nodes = append(nodes, start(t, cfg))
	}
	defer stop(t, nodes...)
	for _, s := range nodes {
		expect(t, s, 50)
	}
	commit(t, nodes[2], 51, 55)
	expect(t, nodes[0], 55)
}

// Goal: whenever a recovery dies, the directory is the old one or the new one,
// a node starts from it, and repeating the recovery ends it. Method: the
// directory is copied at every step.
func TestRecoverSurvivesEveryCrash(t *testing.T) {
	c, dirs := lostQuorum(t)
	dir := dirs[0]
	type crash struct{ step, dir string }
	var crashes []crash
	o := RecoverOptions{Settings: testSettings(), Dir: dir}
	seen := map[string]int{}
	o.Point = func(step string) {
		if seen[step]++; seen[step] > 2 {
			return // the moves are alike, and datadir tests each
		}
		crashes = append(crashes, crash{fmt.Sprint(step, seen[step]), crashed(t, dir)})
	}
	res, err := Recover(o, nil)
	must(t, err)
	if len(crashes) < 9 {
		t.Fatalf("only %d steps", len(crashes))
	}
	decided := false
	for _, x := range crashes {
		decided = decided || strings.HasPrefix(x.step, datadir.StepDecided)
		t.Run(x.step, func(t *testing.T) {
			again := x.dir + "-again"
			must(t, os.CopyFS(again, os.DirFS(x.dir)))
			// A plain start finds one of the two. The old one has no quorum, so
			// it is asked for its identity only.
			s := start(t, at(c[0], x.dir))
			id, err := datadir.ReadIdentity(x.dir)
			must(t, err)
			if isNew := fmt.Sprintf("%016x", id.ClusterID) == res.ClusterID; isNew != decided {
				t.Errorf("the node found the new content: %t", isNew)
			}
			if decided {
				expect(t, s, 50)
			}
			stop(t, s)
			r, err := Recover(RecoverOptions{Settings: testSettings(), Dir: again}, nil)
			must(t, err)
			if r.Resumed != decided {
				t.Errorf("resumed: %t", r.Resumed)
			}
			s = start(t, at(c[0], again))
			expect(t, s, 50)
			stop(t, s)
		})
		if strings.HasPrefix(x.step, datadir.StepMoved) {
			break // done: a repetition is a new recovery, tested below
		}
	}
}

func TestRecoverRefusals(t *testing.T) {
	c, dirs := lostQuorum(t)
	must := func(err error) { must(t, err) }
	t.Run("a node runs", func(t *testing.T) {
		s := start(t, at(c[0], dirs[0]))
		defer stop(t, s)
		if _, err := PlanRecovery(RecoverOptions{Dir: dirs[0]}); !errors.Is(err, datadir.ErrInUse) {
			t.Errorf("plan: %v", err)
		}
		if _, err := Recover(RecoverOptions{Dir: dirs[0]}, nil); !errors.Is(err, datadir.ErrInUse) {
			t.Errorf("recover: %v", err)
		}
		if _, err := PlanRecovery(RecoverOptions{Dir: dirs[1], Peers: dirs[:1]}); !errors.Is(err, datadir.ErrInUse) {
			t.Errorf("compare: %v", err)
		}
	})
	t.Run("no data directory", func(t *testing.T) {
		dir := t.TempDir()
		if _, err := Recover(RecoverOptions{Dir: dir}, nil); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v", err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("left %v", left)
		}
	})
	t.Run("the plan is old", func(t *testing.T) {
		p, err := PlanRecovery(RecoverOptions{Dir: dirs[1]})
		must(err)
		p.Index--
		if _, err := Recover(RecoverOptions{Settings: testSettings(), Dir: dirs[1]}, p); !errors.Is(err, ErrPlanChanged) {
			t.Errorf("%v", err)
		}
	})
	t.Run("a state known to be wrong", func(t *testing.T) {
		must(datadir.WriteQuarantine(dirs[1], &datadir.Quarantine{Reason: "it differs", Index: 7}))
		_, err := PlanRecovery(RecoverOptions{Dir: dirs[1]})
		if err == nil || !strings.Contains(err.Error(), "it differs") || !strings.Contains(err.Error(), datadir.QuarantineName) {
			t.Errorf("plan: %v", err)
		}
		// As one of several it is only named.
		p, err := PlanRecovery(RecoverOptions{Dir: dirs[0], Peers: dirs[1:2]})
		if err != nil || !strings.Contains(p.Copies[1].Problem, "it differs") || !p.IsBest() {
			t.Errorf("compare: %+v, %v", p, err)
		}
		if r := check(t, dirs[1]); r.Intact {
			t.Errorf("check: %+v", r.Findings)
		}
		must(datadir.RemoveQuarantine(dirs[1]))
	})
	t.Run("a damaged log", func(t *testing.T) {
		segments, err := filepath.Glob(filepath.Join(dirs[2], "wal", "*.wal"))
		must(err)
		slices.Sort(segments)
		raw, err := os.ReadFile(segments[0])
		must(err)
		for i := range 64 { // more than the padding of a record, which nothing covers
			raw[1000+i] ^= 0xff
		}
		must(os.WriteFile(segments[0], raw, 0o600))
		if p, err := PlanRecovery(RecoverOptions{Dir: dirs[2]}); err == nil {
			t.Errorf("planned %+v", p)
		}
		// Up to the damage it can be had, when that is asked for.
		half := crashed(t, dirs[2])
		o := RecoverOptions{Settings: testSettings(), Dir: half, DamagedLog: true}
		if p, err := PlanRecovery(o); err != nil || p.Complete || p.Chosen().Damage == "" || p.Chosen().LastIndex >= 51 {
			t.Errorf("the damaged log: %+v, %v", p, err)
		}
		_, err = Recover(o, nil)
		must(err)
		if r := check(t, half); !r.Intact {
			t.Errorf("recovered from a damaged log: %+v", r.Findings)
		}
		s := start(t, at(c[2], half))
		commit(t, s, 1, 50)
		expect(t, s, 50)
		stop(t, s)
		// As one of several it is only named.
		p, err := PlanRecovery(RecoverOptions{Dir: dirs[1], Peers: dirs[2:]})
		if err != nil || p.Copies[1].Problem == "" || !p.IsBest() || p.Complete {
			t.Errorf("%+v, %v", p, err)
		}
	})
	t.Run("twice without purging", func(t *testing.T) {
		o := RecoverOptions{Settings: testSettings(), Dir: dirs[1]}
		_, err := Recover(o, nil)
		must(err)
		if _, err := Recover(o, nil); !errors.Is(err, datadir.ErrBeforeKept) {
			t.Errorf("%v", err)
		}
		removed, err := Purge(dirs[1])
		if err != nil || !removed {
			t.Errorf("purge: %t, %v", removed, err)
		}
		if removed, err = Purge(dirs[1]); err != nil || removed {
			t.Errorf("purge again: %t, %v", removed, err)
		}
		_, err = Recover(o, nil)
		must(err)
		s := start(t, at(c[1], dirs[1]))
		expect(t, s, 50)
		stop(t, s)
	})
	t.Run("the directory of a further member is in use", func(t *testing.T) {
		taken := t.TempDir()
		must(os.WriteFile(filepath.Join(taken, "photo.jpg"), nil, 0o600))
		o := RecoverOptions{Settings: testSettings(), Dir: dirs[0], Also: []NewMember{{7, taken}}}
		if _, err := Recover(o, nil); !errors.Is(err, ErrNotEmpty) {
			t.Errorf("%v", err)
		}
		if left, _ := os.ReadDir(taken); len(left) != 1 {
			t.Errorf("left %v", left)
		}
		if left, _ := filepath.Glob(filepath.Join(dirs[0], ".*")); len(left) > 0 {
			t.Errorf("left %v", left)
		}
	})
	t.Run("the second of two further members cannot be made", func(t *testing.T) {
		free, taken := t.TempDir(), t.TempDir()
		must(os.WriteFile(filepath.Join(taken, "photo.jpg"), nil, 0o600))
		o := RecoverOptions{Settings: testSettings(), Dir: dirs[0], Also: []NewMember{{7, free}, {8, taken}}}
		if _, err := Recover(o, nil); !errors.Is(err, ErrNotEmpty) {
			t.Errorf("%v", err)
		}
		if left, _ := os.ReadDir(free); len(left) != 0 {
			t.Errorf("left %v", left)
		}
		id, err := datadir.ReadIdentity(dirs[0])
		if kept, kerr := datadir.Kept(dirs[0]); err != nil || kerr != nil || kept || fmt.Sprint(id.Members) != "[1 2 3]" {
			t.Errorf("the directory was changed: %+v, %t, %v, %v", id, kept, err, kerr)
		}
	})
	t.Run("members that cannot be", func(t *testing.T) {
		for _, also := range [][]NewMember{{{1, "x"}}, {{0, "x"}}, make([]NewMember, 20)} {
			if _, err := PlanRecovery(RecoverOptions{Dir: dirs[0], Also: also}); err == nil {
				t.Errorf("%v was taken", also)
			}
		}
	})
}
