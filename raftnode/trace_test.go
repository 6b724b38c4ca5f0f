package raftnode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
)

// trace is a group of nodes that do nothing but what a script says, and an
// account of what they did.
type trace struct {
	t     *testing.T
	nodes []*harness // by id - 1
	down  map[uint64]bool
	// wire holds the messages on their way, in the order they were sent.
	wire []*raftpb.Message
	cut  map[[2]uint64]bool
	// waiting are calls without an outcome.
	waiting []*tracedCall
	brief   bool
	out     strings.Builder
}

type tracedCall struct {
	what string
	node uint64
	call *call
}

func (tr *trace) printf(format string, args ...any) { fmt.Fprintf(&tr.out, format+"\n", args...) }

// detail prints unless the script asked for brevity.
func (tr *trace) detail(format string, args ...any) {
	if !tr.brief {
		tr.printf(format, args...)
	}
}

// traceFormat shows the commands in an entry.
func traceFormat(data []byte) string {
	if len(data) == 0 {
		return ""
	}
	cmds, err := EntryCommands(data)
	if err != nil {
		return err.Error()
	}
	parts := make([]string, len(cmds))
	for i, c := range cmds {
		parts[i] = string(c)
	}
	return "[" + strings.Join(parts, " ") + "]"
}

func traceMessage(m *raftpb.Message) string {
	if m.GetType() == raftpb.MsgStorageApplyResp || m.GetType() == raftpb.MsgStorageAppendResp {
		// The entries are those of the message it answers.
		return fmt.Sprintf("%v Index:%d", m.GetType(), max(m.GetIndex(), lastOf(m.GetEntries())))
	}
	if t := m.GetType(); t == raftpb.MsgReadIndex || t == raftpb.MsgReadIndexResp {
		return raft.DescribeMessage(m, func([]byte) string { return "question" })
	}
	return raft.DescribeMessage(m, traceFormat)
}

func lastOf(ents []*raftpb.Entry) uint64 {
	if len(ents) == 0 {
		return 0
	}
	return ents[len(ents)-1].GetIndex()
}

func indent(s string) string { return "  " + strings.ReplaceAll(s, "\n", "\n  ") }

func (tr *trace) node(id uint64) *harness {
	if id == 0 || id > uint64(len(tr.nodes)) {
		tr.t.Fatalf("there is no node %d", id)
	}
	return tr.nodes[id-1]
}

// add creates a node; without voters it waits to be told of a group.
func (tr *trace) add(tune func(*Config), voters ...uint64) {
	id := uint64(len(tr.nodes) + 1)
	h := newHarness(tr.t, id, func(c *Config) {
		tune(c)
		c.Events.LeaderChanged = func(l Leadership) {
			switch {
			case l.Leading:
				tr.printf("%d leads term %d", id, l.Term)
			case l.Leader == 0:
				tr.printf("%d knows no leader in term %d", id, l.Term)
			default:
				tr.printf("%d follows %d in term %d", id, l.Leader, l.Term)
			}
		}
		c.Events.ImageInstalled = func(_ time.Duration, index uint64) { tr.printf("%d installed the image of %d", id, index) }
		c.Events.LogTruncated = func(index uint64) { tr.printf("%d truncated its log at %d", id, index) }
	}, voters...)
	tr.nodes = append(tr.nodes, h)
	tr.connect(h)
}

// connect lets images through and collects messages, after each start.
func (tr *trace) connect(h *harness) {
	h.tr.image = func(_ context.Context, m *raftpb.Message, image *snap.Reader) error {
		to := tr.node(m.GetTo())
		if tr.down[to.id] || tr.cut[[2]uint64{h.id, to.id}] {
			return errors.New("unreachable")
		}
		if err := copyImage(image, to.images); err != nil {
			return err
		}
		tr.wire = append(tr.wire, proto.CloneOf(m))
		return nil
	}
}

// collect puts what a node has just sent on the wire and prints it.
func (tr *trace) collect(h *harness) {
	for _, m := range h.tr.take() {
		tr.detail("%s", indent(traceMessage(m)))
		tr.wire = append(tr.wire, m)
	}
}

// turn runs the node's loop once.
func (tr *trace) turn(h *harness, tick bool) {
	if tr.down[h.id] {
		return
	}
	name := "turn"
	if tick {
		name = "tick"
		h.clock.advance(h.Node.cfg.TickInterval)
	}
	appends, applies := len(h.appendQ.items), len(h.applyQ.items)
	if !tick {
		tr.detail("> %d %s", h.id, name)
	}
	if err := h.loop.turn(tick); err != nil {
		tr.printf("%d stops: %v", h.id, err)
		tr.stop(h, 0)
		return
	}
	if tick && len(h.tr.out)+len(h.appendQ.items)-appends+len(h.applyQ.items)-applies > 0 {
		tr.detail("> %d %s", h.id, name)
	}
	for _, m := range h.appendQ.items[appends:] {
		tr.detail("%s", indent(traceMessage(m)))
	}
	for _, it := range h.applyQ.items[applies:] {
		tr.detail("%s", indent(traceMessage(it.msg)))
	}
	tr.collect(h)
	tr.outcomes()
}

// appendOnce runs one step of the node's appender.
func (tr *trace) appendOnce(h *harness) bool {
	if tr.down[h.id] || len(h.appendQ.items) == 0 {
		return false
	}
	locals, syncs := len(h.inbox.in.local), h.log.syncs
	tr.detail("> %d append", h.id)
	if _, err := h.appender.step(); err != nil {
		tr.printf("%d stops: %v", h.id, err)
		tr.stop(h, 0)
		return true
	}
	synced := "nothing synced"
	if n := h.log.syncs - syncs; n > 0 {
		synced = fmt.Sprintf("synced %d", n)
	}
	tr.detail("  log [%d,%d] %s (%s)", h.log.index+1, h.log.last(), raft.DescribeHardState(h.log.hs), synced)
	for _, m := range h.inbox.in.local[locals:] {
		tr.detail("%s", indent(traceMessage(m)))
	}
	tr.collect(h)
	tr.outcomes()
	return true
}

// applyOnce runs one step of the node's applier.
func (tr *trace) applyOnce(h *harness) bool {
	if tr.down[h.id] || len(h.applyQ.items) == 0 {
		return false
	}
	locals, had := len(h.inbox.in.local), len(h.sm.commands())
	tr.detail("> %d apply", h.id)
	if _, err := h.applier.step(); err != nil {
		tr.printf("%d stops: %v", h.id, err)
		tr.stop(h, 0)
		return true
	}
	tr.detail("  applied %d: %v", h.sm.Applied().Index, h.sm.commands()[had:])
	for _, m := range h.inbox.in.local[locals:] {
		tr.detail("%s", indent(traceMessage(m)))
	}
	tr.outcomes()
	return true
}

// deliver gives the messages chosen by want to their nodes, or drops them.
func (tr *trace) deliver(want func(*raftpb.Message) bool, drop bool) bool {
	var now, later []*raftpb.Message
	for _, m := range tr.wire {
		if want(m) {
			now = append(now, m)
		} else {
			later = append(later, m)
		}
	}
	tr.wire = later
	for _, m := range now {
		link := [2]uint64{m.GetFrom(), m.GetTo()}
		switch to := tr.node(m.GetTo()); {
		case drop || tr.cut[link] || tr.down[to.id]:
			tr.detail("dropped: %s", traceMessage(m))
		default:
			if err := to.Node.Step(context.Background(), []*raftpb.Message{m}); err != nil {
				tr.printf("%d refuses %s: %v", to.id, traceMessage(m), err)
			}
		}
	}
	return len(now) > 0
}

// stabilize runs nodes and network until nothing moves.
func (tr *trace) stabilize(ids []uint64) {
	among := func(id uint64) bool { return len(ids) == 0 || slices.Contains(ids, id) }
	for {
		moved := false
		for _, h := range tr.nodes {
			if tr.down[h.id] || !among(h.id) {
				continue
			}
			if h.inboxWaits() {
				tr.turn(h, false)
				moved = true
			}
			moved = tr.appendOnce(h) || moved
			moved = tr.applyOnce(h) || moved
		}
		moved = tr.deliver(func(m *raftpb.Message) bool { return among(m.GetTo()) }, false) || moved
		if !moved {
			return
		}
	}
}

// ask notes a call whose outcome is to be told when it is known.
func (tr *trace) ask(h *harness, what string) *tracedCall {
	c := &tracedCall{what: what, node: h.id, call: &call{ch: make(chan outcome, 1)}}
	tr.waiting = append(tr.waiting, c)
	return c
}

// outcomes prints what has become known.
func (tr *trace) outcomes() {
	tr.waiting = slices.DeleteFunc(tr.waiting, func(c *tracedCall) bool {
		o, ok := c.call.poll()
		if ok {
			tr.printf("%s on %d: %s", c.what, c.node, tr.outcome(c, o))
		}
		return ok
	})
}

func (tr *trace) outcome(c *tracedCall, o outcome) string {
	switch {
	case o.err == nil && strings.HasPrefix(c.what, "read"):
		return fmt.Sprintf("index %d, the state holds %v", o.res.Index, tr.node(c.node).sm.commands())
	case o.err == nil && strings.HasPrefix(c.what, "propose"):
		return fmt.Sprintf("done, entry %d, result %v", o.res.Index, o.res.Value)
	case o.err == nil:
		return "done"
	case !strings.HasPrefix(c.what, "propose"):
		return o.err.Error()
	case NotDone(o.err):
		return fmt.Sprintf("NOT DONE: %v", o.err)
	}
	return fmt.Sprintf("UNKNOWN: %v", o.err)
}

// stop ends the node as Run does and leaves what a crash of its disk would.
func (tr *trace) stop(h *harness, keep int) {
	tr.down[h.id] = true
	h.Node.resolve()
	tr.outcomes()
	h.log, h.sm = h.log.crash(keep), h.sm.crash()
}

// crash ends the node at once: nobody is told anything any more.
func (tr *trace) crash(h *harness, keep int) {
	tr.down[h.id] = true
	tr.waiting = slices.DeleteFunc(tr.waiting, func(c *tracedCall) bool { return c.node == h.id })
	h.log, h.sm = h.log.crash(keep), h.sm.crash()
	h.inbox.close()
	h.snaps.close()
}
