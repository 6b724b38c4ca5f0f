package raftnode

import (
	"context"
	crand "crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

// zeroRandom makes every election timeout the shortest one.
type zeroRandom struct{}

func (zeroRandom) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// TestTraces runs the scripts in testdata: small stories told with the real
// loop, appender and applier, one step at a time. With -rewrite the expected
// output is written anew; commit that only if you understand what changed.
//
// Commands (n is a node):
//
//	add-nodes 3 [key=value]   whole nodes of one group; keys: election-ticks,
//	                          heartbeat-ticks, batches-in-flight, tail-bytes
//	add-empty                 a node that waits to be told of a group
//	campaign n                have n stand for election (with a pre-vote)
//	propose n commands...     each command is a call of its own
//	read n                    ReadIndex
//	turn n, append n, apply n one step of n's loop, appender or applier
//	tick n [times=k] [settle] a tick of n's clock, and a turn; with settle its
//	                          disk works after each; n can be all, which also
//	                          stabilizes after each
//	deliver [to=n] [from=n] [type=t] [drop]
//	stabilize [n...]          everything, until nothing moves
//	cut a b, heal             cut the link between a and b; all links work
//	crash n [keep-unsynced=none|all|k]
//	restart n, stop n
//	transfer n to             hand leadership over
//	change n kind id [addr] [replaces=id] [disk=number] [rejoin=yes]
//	flush n, compact n index  make the state durable; truncate the log
//	images n                  build and send the images asked for
//	truncate n                let n decide whether to truncate its log
//	break-disk n, lose-images n, lose-state n, lose-all n
//	new-group, jump n time    begin anew; move n's clock
//	status, log n, state n    what there is
//	members n                 what n's state knows of members, also removed ones
//	do, quietly               the commands in the lines that follow; quietly
//	                          shows only leaders, outcomes and what is asked for
func TestTraces(t *testing.T) {
	saved := crand.Reader
	crand.Reader = zeroRandom{}
	defer func() { crand.Reader = saved }()
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		tr := &trace{t: t, down: map[uint64]bool{}, cut: map[[2]uint64]bool{}}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			tr.t = t
			for _, h := range tr.nodes {
				h.t = t
			}
			tr.out.Reset()
			tr.command(d)
			tr.outcomes()
			if tr.out.Len() == 0 {
				return "ok\n"
			}
			return tr.out.String()
		})
	})
}

// positional returns the arguments without a value.
func positional(d *datadriven.TestData) []string {
	var out []string
	for _, a := range d.CmdArgs {
		if len(a.Vals) == 0 {
			out = append(out, a.Key)
		}
	}
	return out
}

func (tr *trace) number(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		tr.t.Fatalf("%q is no number", s)
	}
	return n
}

func (tr *trace) option(d *datadriven.TestData, key string, def uint64) uint64 {
	if d.HasArg(key) {
		d.ScanArgs(tr.t, key, &def)
	}
	return def
}

// script runs the commands in the input of do and quietly.
func (tr *trace) script(d *datadriven.TestData) {
	saved := tr.brief
	tr.brief = d.Cmd == "quietly"
	defer func() { tr.brief = saved }()
	for line := range strings.Lines(d.Input) {
		cmd, args, err := datadriven.ParseLine(strings.TrimSpace(line))
		if err != nil {
			tr.t.Fatalf("%s: %v", d.Pos, err)
		}
		tr.command(&datadriven.TestData{Pos: d.Pos, Cmd: cmd, CmdArgs: args})
	}
}

func (tr *trace) command(d *datadriven.TestData) {
	if d.Cmd == "do" || d.Cmd == "quietly" {
		tr.script(d)
		return
	}
	args := positional(d)
	ids := func(from int) (out []uint64) {
		for _, a := range args[min(from, len(args)):] {
			out = append(out, tr.number(a))
		}
		return out
	}
	var h *harness
	if len(args) > 0 && d.Cmd != "add-nodes" && d.Cmd != "deliver" && d.Cmd != "stabilize" && args[0] != "all" {
		h = tr.node(tr.number(args[0]))
	}
	switch d.Cmd {
	case "add-nodes":
		tr.addNodes(d, tr.number(args[0]))
	case "add-empty":
		tr.add(tr.tune(d))
	case "campaign":
		h.campaign()
	case "propose":
		for _, cmd := range args[1:] {
			c := tr.ask(h, "propose "+cmd)
			h.ProposeFunc([]byte(cmd), func(r Result, err error) { c.call.ch <- outcome{r, err} })
		}
	case "read":
		c := tr.ask(h, "read")
		if err := h.inbox.pushRead(c.call); err != nil {
			c.call.ch <- outcome{err: err}
		}
	case "turn":
		tr.turn(h, false)
	case "append":
		tr.appendOnce(h)
	case "apply":
		tr.applyOnce(h)
	case "tick":
		for range tr.option(d, "times", 1) {
			for _, x := range tr.nodes {
				if h == nil || h == x {
					tr.turn(x, true)
				}
			}
			switch {
			case h == nil:
				tr.stabilize(nil)
			case slices.Contains(args, "settle"):
				for tr.appendOnce(h) || tr.applyOnce(h) {
				}
			}
		}
	case "deliver":
		tr.deliverSome(d, slices.Contains(args, "drop"))
	case "stabilize":
		tr.stabilize(ids(0))
	case "cut":
		a, b := tr.number(args[0]), tr.number(args[1])
		tr.cut[[2]uint64{a, b}], tr.cut[[2]uint64{b, a}] = true, true
	case "heal":
		clear(tr.cut)
	case "crash":
		tr.crashArg(d, h)
	case "stop":
		tr.stop(h, len(h.log.unsynced))
	case "restart":
		if err := h.tryOpen(); err != nil {
			tr.printf("%d does not start: %v", h.id, err)
			return
		}
		tr.connect(h)
		delete(tr.down, h.id)
	case "transfer":
		c := tr.ask(h, "transfer to "+args[1])
		to := tr.number(args[1])
		h.inbox.pushControl(c.call, func(l *loop) { l.transfer(to, c.call) })
	case "change":
		tr.change(d, h, args)
	case "flush":
		index, err := h.sm.Flush()
		tr.printf("durable up to %d (%v)", index, err)
	case "compact":
		if err := h.log.Compact(tr.number(args[1]), h.sm.Applied().ConfState); err != nil {
			tr.printf("%v", err)
		}
	case "images":
		for h.snaps.step(context.Background()) {
		}
		for h.snaps.sendStep(context.Background()) {
		}
		for _, info := range h.images.List() {
			tr.printf("image of entry %d", info.Index)
		}
	case "lose-images":
		for _, info := range h.images.List() {
			if err := h.images.Delete(info.ID); err != nil {
				tr.printf("%v", err)
			}
		}
	case "new-group":
		tr.nodes, tr.wire, tr.waiting = nil, nil, nil
		clear(tr.down)
		clear(tr.cut)
	case "jump":
		by, err := time.ParseDuration(args[1])
		if err != nil {
			tr.t.Fatal(err)
		}
		h.clock.advance(by)
	case "lose-state":
		h.sm = newMemMachine(h.fs, bootPosition(h.sm.Applied().ConfState.GetVoters()...))
	case "lose-all":
		pos := Position{ConfState: &raftpb.ConfState{}}
		h.fs = vfs.NewMem()
		h.log, h.sm = newMemLog(pos), newMemMachine(h.fs, pos)
	case "truncate":
		if _, err := h.truncator.step(h.clock.Now()); err != nil {
			tr.printf("%d stops: %v", h.id, err)
		}
	case "break-disk":
		h.log.fail = func(string) error { return fmt.Errorf("input/output error") }
	case "status":
		tr.status()
	case "members":
		for _, m := range h.sm.Applied().Members {
			tr.printf("%s", memberOf(m))
		}
	case "log":
		for _, e := range h.log.ents {
			tr.printf("%s", raft.DescribeEntry(e, traceFormat))
		}
	case "state":
		tr.printf("entry %d: %v", h.sm.Applied().Index, h.sm.commands())
	default:
		tr.t.Fatalf("%s: there is no command %q", d.Pos, d.Cmd)
	}
}

func (tr *trace) tune(d *datadriven.TestData) func(*Config) {
	return func(c *Config) {
		c.ElectionTicks = int(tr.option(d, "election-ticks", 5))
		c.HeartbeatTicks = int(tr.option(d, "heartbeat-ticks", 1))
		c.MaxBatchesInFlight = int(tr.option(d, "batches-in-flight", 1))
		c.TickInterval = 100 * time.Millisecond
		c.StallTransfer, c.StallFail = 500*time.Millisecond, 2*time.Second
		c.TailBytes = int64(tr.option(d, "tail-bytes", 1*mib))
	}
}

func (tr *trace) addNodes(d *datadriven.TestData, n uint64) {
	var voters []uint64
	for id := uint64(1); id <= n; id++ {
		voters = append(voters, id)
	}
	for range n {
		tr.add(tr.tune(d), voters...)
	}
}

func (tr *trace) deliverSome(d *datadriven.TestData, drop bool) {
	from, to := tr.option(d, "from", 0), tr.option(d, "to", 0)
	typ := ""
	if d.HasArg("type") {
		d.ScanArgs(tr.t, "type", &typ)
	}
	tr.deliver(func(m *raftpb.Message) bool {
		return (from == 0 || m.GetFrom() == from) && (to == 0 || m.GetTo() == to) && (typ == "" || m.GetType().String() == typ)
	}, drop)
}

func (tr *trace) crashArg(d *datadriven.TestData, h *harness) {
	keep := "none"
	if d.HasArg("keep-unsynced") {
		d.ScanArgs(tr.t, "keep-unsynced", &keep)
	}
	switch keep {
	case "none":
		tr.crash(h, 0)
	case "all":
		tr.crash(h, len(h.log.unsynced))
	default:
		tr.crash(h, int(tr.number(keep)))
	}
}

func (tr *trace) change(d *datadriven.TestData, h *harness, args []string) {
	kinds := map[string]ChangeKind{"add-learner": AddLearner, "promote": Promote, "remove": Remove, "update-addr": UpdateAddr}
	c := Change{Kind: kinds[args[1]], ID: tr.number(args[2]), Replaces: tr.option(d, "replaces", 0),
		Disk: tr.option(d, "disk", 0), Rejoin: d.HasArg("rejoin")}
	if len(args) > 3 {
		c.Addr = args[3]
	}
	asked := tr.ask(h, strings.Join(args[1:], " "))
	h.inbox.pushControl(asked.call, func(l *loop) { l.changeMembership(c, asked.call) })
}

func (tr *trace) status() {
	for _, h := range tr.nodes {
		if tr.down[h.id] {
			tr.printf("%d down     log [%d,%d] %s, state at %d", h.id, h.log.index+1, h.log.last(), raft.DescribeHardState(h.log.hs), h.sm.Applied().Index)
			continue
		}
		l := h.loop
		tr.printf("%d %-8s term %d, leader %d, log [%d,%d], commit %d, applied %d, durable %d; %s", h.id, roleOf(l.state), l.term, l.leader,
			h.log.index+1, h.log.last(), l.commit, h.Applied(), h.sm.Durable(), confStateOf(h.sm.Applied().ConfState))
	}
}

func memberOf(m Member) string {
	s := fmt.Sprintf("%d", m.ID)
	if m.Addr != "" {
		s += " at " + m.Addr
	}
	if m.Disk != 0 {
		s += fmt.Sprintf(", disk %d", m.Disk)
	}
	if m.Removed {
		s += ", removed"
	}
	return s
}

func confStateOf(cs *raftpb.ConfState) string {
	s := fmt.Sprintf("voters %v", cs.GetVoters())
	if o := cs.GetVotersOutgoing(); len(o) > 0 {
		s += fmt.Sprintf(" outgoing %v", o)
	}
	if l := cs.GetLearners(); len(l) > 0 {
		s += fmt.Sprintf(" learners %v", l)
	}
	return s
}
