package e2e

import (
	"context"
	bin "encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// The durable steps, by what makes a node take them. TestCrashPoints compares
// the union with the points the binary knows, so none is forgotten.
var (
	// At the first start, on an empty data directory.
	firstStartPoints = []string{
		"identity:before", "identity:after", "wal/create:staged", "wal/create:renamed",
		"state:begin:before", "state:begin:after", "state:created:before", "state:created:after",
		"initialized:before", "initialized:after",
	}
	// Under load, with a log that is truncated all the time.
	runningPoints = []string{
		"entries:before", "entries:after", "hardstate:before", "hardstate:after",
		"wal/append:before", "wal/append:synced", "apply:before", "apply:after",
		"flush:before", "flush:after",
		"wal/compact:before", "wal/compact:state", "wal/compact:record",
		"wal/segment:remove", "wal/segment:removed",
		"raft:before",
	}
	// At a start after a write that was cut short.
	tornPoints = []string{"wal/repair:before", "wal/repair:truncated"}
	// When the log of the others begins later than that of this node ends.
	laggingPoints = []string{
		"receive:publish:before", "receive:publish:after", "receive:discard:before", "receive:discard:after",
		"install:before", "state:copy:before", "state:copy:after",
		"state:switch:before", "state:switch:after", "state:remove:before", "state:remove:after", "install:after",
		"wal/install:before", "wal/install:record", "wal/install:synced",
		"image:delete:before", "image:delete:after", "image:remove:before", "image:remove:after",
	}
	// When its state was found to be wrong; see TestDivergedNodeDiesRebuilding.
	rebuildPoints = []string{"rebuild:install", "rebuild:installed", "rebuild:done"}
	// When this node leads and a follower is that far behind.
	leadingPoints = []string{
		"image:manifest:before", "image:manifest:after", "image:publish:before", "image:publish:after",
	}
)

// TestCrashPoints ends one node of three at every durable step in turn, under
// load, and starts it again. Goal: whatever the step, the node recovers by
// itself, no acknowledged write is missing and all replicas have one state.
// Method: a binary that kills itself at a given point (package crashpoint); for
// each point a history of its own, checked with porcupine after final reads on
// every node, and the state hashes.
func TestCrashPoints(t *testing.T) {
	seed := newSeed(t)
	c := &crashTest{t: t, rng: rand.New(rand.NewPCG(seed, 3)), seed: seed}
	c.Cluster = LayOut(t, Options{Binary: crashBinary(t), Args: smallLog()})
	c.victim = c.Nodes[2]
	c.compareWithBinary()
	c.others = c.Nodes[:2]
	for _, n := range c.others {
		n.Start()
	}
	c.WaitServing(c.others...)

	for _, p := range firstStartPoints {
		c.firstStart(p)
	}
	c.victim.Start()
	c.WaitServing(c.victim)
	for _, p := range runningPoints {
		c.under(p, c.running)
	}
	for _, p := range tornPoints {
		c.under(p, c.torn)
	}
	for _, p := range laggingPoints {
		c.under(p, c.lagging)
	}
	for _, p := range leadingPoints {
		c.under(p, c.leading)
	}
}

type crashTest struct {
	*Cluster
	t      *testing.T
	rng    *rand.Rand
	seed   uint64
	victim *Node
	others []*Node
}

func (c *crashTest) compareWithBinary() {
	c.t.Helper()
	cmd := exec.Command(crashBinary(c.t), "serve", "--node-id", "1", "--data-dir", c.t.TempDir())
	cmd.Env = append(os.Environ(), "CONVEYOR_CRASH_AT=?")
	out, _ := cmd.CombinedOutput()
	_, list, found := strings.Cut(string(out), "none of the points: ")
	if !found {
		c.t.Fatalf("the binary was built without the tag crashpoints: %s", out)
	}
	known := strings.Fields(list)
	tested := slices.Concat(firstStartPoints, runningPoints, tornPoints, laggingPoints, leadingPoints, recoverPoints, rebuildPoints,
		joinPoints, rejoinPoints, removedPoints, comeBackPoints, exchangePoints, retiringPoints[1:2])
	slices.Sort(known)
	slices.Sort(tested)
	if !slices.Equal(known, tested) {
		c.t.Fatalf("the binary knows the points\n%v\nthe test the points\n%v", known, tested)
	}
}

// under lets the victim die at point, by way of meet, while clients call, and
// judges afterwards.
func (c *crashTest) under(point string, meet func(point string)) {
	c.t.Helper()
	begin := time.Now()
	prefix := fmt.Sprintf("%s/", strings.ReplaceAll(point, ":", "-"))
	load := StartLoad(c.Cluster, LoadOptions{Seed: c.seed, Prefix: prefix, Clients: 6, Keys: 4})
	filler := NewFiller(c.t, prefix+"fill", 32<<10)
	filler.Run(c.Cluster)
	meet(point)
	c.victim.Start()
	c.WaitServing(c.Nodes...)
	filler.Stop()
	load.Stop()
	load.FinalReads(c.Cluster, 4)
	load.Pipelines.Check(c.t, "pipelines", PipelineModel())
	load.Offsets.Check(c.t, "offsets", OffsetModel())
	filler.Check(c.Nodes...)
	c.WaitSameState()
	if c.t.Failed() {
		c.t.Fatalf("after dying at %s", point)
	}
	c.t.Logf("%-24s %6v pipelines: %v; offsets: %v", point, time.Since(begin).Round(10*time.Millisecond), load.Pipelines, load.Offsets)
}

// died waits until the victim has ended at the point, for at most bound or
// until it serves; false means it lives.
func (c *crashTest) died(point string, bound time.Duration) bool {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), bound)
	defer cancel()
	if !c.victim.exitsWithin(ctx) {
		return false
	}
	// Other goroutines may have logged between the last words and the death.
	log := c.victim.Log()
	last, _, _ := strings.Cut(log[max(0, strings.LastIndex(log, "crash point ")):], "\n")
	if last != "crash point "+point || c.victim.exitErr == nil || c.victim.exitErr.Error() != "signal: killed" {
		c.t.Fatalf("the node ended elsewhere than at %s: %v\n%s", point, c.victim.exitErr, log)
	}
	return true
}

func (c *crashTest) mustDie(point string) {
	c.t.Helper()
	if !c.died(point, 30*time.Second) {
		c.t.Fatalf("the node never came to %s", point)
	}
}

// firstStart dies in a first start, sees a second one complete what was begun,
// and forgets the node: it has taken no part in the cluster yet.
func (c *crashTest) firstStart(point string) {
	c.t.Helper()
	c.victim.Start("CONVEYOR_CRASH_AT=" + point)
	c.mustDie(point)
	c.victim.Start("CONVEYOR_CRASH_AT=raft:before")
	c.mustDie("raft:before")
	if err := os.RemoveAll(c.victim.DataDir); err != nil {
		c.t.Fatal(err)
	}
}

func (c *crashTest) running(point string) {
	c.t.Helper()
	c.victim.Kill()
	n := 1
	switch step, _, _ := strings.Cut(point, ":"); step {
	case "entries", "hardstate", "apply", "wal/append":
		n += c.rng.IntN(60)
	case "flush", "wal/compact", "wal/segment":
		n += c.rng.IntN(2)
	}
	c.victim.Start(fmt.Sprintf("CONVEYOR_CRASH_AT=%s:%d", point, n))
	c.mustDie(point)
}

// torn leaves the beginning of a write at the end of the log, as a process that
// is killed inside of a large write does.
func (c *crashTest) torn(point string) {
	c.t.Helper()
	c.victim.Kill()
	tearLog(c.t, c.victim)
	c.victim.Start("CONVEYOR_CRASH_AT=" + point)
	c.mustDie(point)
}

// lagging leaves the victim behind the log of the others. Some points come only
// when more than the images that are kept have gathered.
func (c *crashTest) lagging(point string) {
	c.t.Helper()
	fill := NewFiller(c.t, "lag", 512<<10)
	for range 6 {
		c.victim.Kill()
		fill.Fill(lagBytes, 8, c.others...)
		c.victim.Start("CONVEYOR_CRASH_AT=" + point)
		if c.died(point, 3*time.Second) {
			return
		}
	}
	c.t.Fatalf("the node never came to %s", point)
}

func (c *crashTest) leading(point string) {
	c.t.Helper()
	fill := NewFiller(c.t, "lag", 512<<10)
	c.victim.Kill()
	c.victim.Start("CONVEYOR_CRASH_AT=" + point)
	for range 6 {
		c.WaitServing(c.Nodes...)
		c.makeLeader(c.victim)
		late := c.others[0]
		late.Kill()
		fill.Fill(lagBytes, 8, c.victim, c.others[1])
		late.Start()
		if c.died(point, 3*time.Second) {
			return
		}
	}
	c.t.Fatalf("the node never came to %s", point)
}

// makeLeader moves the leadership to n.
func (c *Cluster) makeLeader(n *Node) {
	c.t.Helper()
	eventually(c.t, 30*time.Second, fmt.Sprintf("node %d leads", n.ID), func(ctx context.Context) error {
		st, err := n.Admin().GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
		if err == nil && st.LeaderId == n.ID {
			return nil
		}
		r, err := n.Cluster().TransferLeader(ctx, &clusterpb.TransferLeaderRequest{NodeId: n.ID})
		if err == nil && r.LeaderId != n.ID {
			err = fmt.Errorf("node %d leads", r.LeaderId)
		}
		return err
	})
}

// logEnd returns the newest segment of the log of a stopped node and the end of
// its last whole record.
func logEnd(t testing.TB, n *Node) (file string, end int64) {
	t.Helper()
	var report struct {
		Segments []struct {
			File     string `json:"file"`
			Readable int64  `json:"readable"`
		} `json:"segments"`
	}
	out, err := exec.Command(binaryOf(n), "wal", "verify", n.DataDir, "-o", "json").Output()
	if err != nil {
		t.Fatalf("wal verify: %v\n%s", err, out)
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("wal verify: %v\n%s", err, out)
	}
	last := report.Segments[len(report.Segments)-1]
	return last.File, last.Readable
}

// tearLog appends a record of 100 bytes of which only the first ten were written.
func tearLog(t testing.TB, n *Node) {
	t.Helper()
	file, end := logEnd(t, n)
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(append(bin.LittleEndian.AppendUint64(nil, 100), "unfinished"...), end); err != nil {
		t.Fatal(err)
	}
}
