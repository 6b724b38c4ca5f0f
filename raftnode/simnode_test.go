package raftnode

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// simDisk is what a crash leaves of a node.
type simDisk struct {
	log     *memLog
	machine *simMachine
	files   *vfs.MemFS
}

// simNode is one whole node: its disk, which survives, and the Node with its
// workers, which do not.
type simNode struct {
	sim *sim
	id  uint64
	// life counts the starts; events of an earlier life are void.
	life int

	log     *simLog
	machine *simMachine
	files   *vfs.MemFS
	fs      vfs.FS

	node    *Node // nil while down
	workers []*simWorker

	// fuse counts down crash points, zero is none; frozen is the disk as it
	// was when the fuse burnt down.
	fuse   int
	frozen *simDisk
	// doomed says where the node has died in the middle of a step.
	doomed string
	// diskBroken: the log has been told to fail.
	diskBroken bool

	slowUntil, pausedUntil int64
	// clock is how far the node's clock is ahead, rate how many times its
	// ticks come as often as they should, in percent.
	clock int64
	rate  int

	// pending counts the commands this life owes an answer.
	pending int
	// What the oracle has already looked at.
	seenCommit, seenTerm uint64
	ghosts               []*raftpb.Message
}

// simWorker is a goroutine of Run, one step at a time: woken through the same
// channel, it goes on until it has nothing left to do.
type simWorker struct {
	name  string
	wake  chan struct{}
	step  func() (bool, error)
	delay func() int64
	busy  bool
}

// simClock is the clock of one node.
type simClock struct{ n *simNode }

func (c simClock) Now() time.Time {
	return time.UnixMicro(1_700_000_000_000_000 + c.n.sim.now + c.n.clock)
}

func (c simClock) Ticker(time.Duration) (<-chan time.Time, func()) {
	panic("the simulation gives the ticks itself")
}

func newSimNode(s *sim, id uint64, boot Position) *simNode {
	n := &simNode{sim: s, id: id, files: vfs.NewCrashableMem(), rate: 100}
	n.log = &simLog{newMemLog(boot), n}
	n.machine = newSimMachine(n, boot)
	return n
}

// start opens the node's disk and runs it, as a new process would.
func (n *simNode) start() {
	s := n.sim
	if n.node != nil || s.violation != nil {
		return
	}
	n.life++
	n.diskBroken = false
	n.seenCommit, n.seenTerm, n.pending = 0, 0, 0
	n.log.node, n.machine.node = n, n
	s.oracle.restored(n, &n.machine.mem, "its own disk")
	n.fs = errorfs.Wrap(n.files, errorfs.InjectorFunc(n.fileOp))
	clock := simClock{n}
	images, err := snap.OpenStore(n.fs, "images", snap.Options{Now: clock.Now, MaxPartials: 4, Inline: true})
	if n.doomed != "" {
		return
	}
	if err != nil {
		s.violate("start", "n%d cannot open its images: %v", n.id, err)
		return
	}
	cfg := s.prof.config
	cfg.ID, cfg.Clock, cfg.Incarnation = n.id, clock, n.id<<48|uint64(n.life)<<24
	cfg.Events = EventListener{
		ProposalsLost: func(int) { s.stats.lost++ },
		ImageBuilt: func(_ time.Duration, _ uint64, _ int64, err error) {
			if err != nil && n.doomed == "" {
				s.violate("image", "n%d cannot build an image: %v", n.id, err)
			}
		},
	}
	node, err := New(cfg, n.machine, n.log, wal.Recovered{}, images, &simTransport{s.net, n})
	if n.doomed != "" {
		return
	}
	if err != nil {
		s.violate("start", "n%d cannot start from its own disk: %v", n.id, err)
		return
	}
	n.node = node
	n.workers = []*simWorker{
		{name: "turn", wake: node.inbox.wake, step: func() (bool, error) { return false, node.loop.turn(false) }, delay: s.computeDelay},
		{name: "append", wake: node.appendQ.wake, step: node.appender.step, delay: n.diskDelay},
		{name: "apply", wake: node.applyQ.wake, step: node.applier.step, delay: s.applyDelay},
		{name: "truncate", wake: node.truncator.wake, step: func() (bool, error) { return node.truncator.step(clock.Now()) }, delay: n.diskDelay},
		{name: "images", wake: node.snaps.wake, step: func() (bool, error) { return node.snaps.step(context.Background()), nil }, delay: n.diskDelay},
	}
	for range cfg.MaxImageSenders {
		n.workers = append(n.workers, &simWorker{
			name: "send-image", wake: node.snaps.sendWake,
			step: func() (bool, error) { return node.snaps.sendStep(context.Background()), nil }, delay: s.imageDelay,
		})
	}
	if len(n.ghosts) > 0 {
		node.inbox.pushLocal(n.ghosts)
		n.ghosts = nil
	}
	s.event(n, "start")
	s.at(n, s.between(0, s.tickMicros()), n.tick)
}

// tick gives the node's loop a tick and asks for the next one.
func (n *simNode) tick() {
	s := n.sim
	// The channel of a real ticker holds one tick; what else was missed in a
	// stall is gone.
	n.run("tick", func() error { return n.node.loop.turn(true) })
	if n.node != nil {
		s.at(n, max(1, s.tickMicros()*100/int64(n.rate)), n.tick)
	}
}

// poll wakes the workers that have been signalled.
func (n *simNode) poll() {
	if n.node == nil {
		return
	}
	for _, w := range n.workers {
		if w.busy || len(w.wake) == 0 {
			continue
		}
		<-w.wake
		w.busy = true
		n.schedule(w)
	}
}

func (n *simNode) schedule(w *simWorker) {
	n.sim.at(n, w.delay(), func() {
		more := false
		if n.run(w.name, func() (err error) {
			more, err = w.step()
			return err
		}); n.node == nil {
			return
		}
		if more {
			n.schedule(w)
		} else {
			w.busy = false
		}
	})
}

// run does one step of a worker and looks at what it led to.
func (n *simNode) run(name string, step func() error) {
	s := n.sim
	err := step()
	if n.doomed != "" {
		return
	}
	if err != nil {
		if n.diskBroken || errors.Is(err, ErrDiskStalled) {
			s.event(n, name, "ends the node:", err.Error())
			n.stop(true)
			return
		}
		s.violate("failure", "n%d gave up at %s: %v", n.id, name, err)
		return
	}
	s.oracle.observe(n)
	s.event(n, name)
}

func (n *simNode) diskDelay() int64 {
	d := n.sim.between(100, 3000)
	if n.slowUntil > n.sim.now {
		d += n.sim.between(5_000, n.sim.prof.slowDisk)
	}
	return d
}

// freeze sets aside what a crash now would leave.
func (n *simNode) freeze(power bool) {
	s := n.sim
	d := &simDisk{}
	if keep := len(n.log.unsynced); power {
		d.log = n.log.crash(s.rng.IntN(keep + 1))
	} else {
		d.log = n.log.crash(keep)
		if s.sab.openWithoutSync {
			d.log.durable = n.log.durable.clone()
		}
	}
	d.machine = n.machine.crash()
	// All or nothing of what was not synced: anything in between would depend
	// on the order of a map in the file system.
	pct := 100
	if power {
		pct = 100 * s.rng.IntN(2)
	}
	d.files = n.files.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: pct, RNG: s.rng})
	n.frozen = d
}

// crash ends the node at once. With power, what was not synced may be lost.
func (n *simNode) crash(why string, power bool) {
	s := n.sim
	n.fuse, n.doomed = 0, ""
	if n.node == nil && n.frozen == nil {
		return
	}
	s.stats.crashes++
	s.event(n, "crash:", why)
	if s.sab.ghostAnswers && n.node != nil {
		n.ghosts = append(n.ghosts, n.node.inbox.in.local...)
		for _, m := range n.node.appendQ.items {
			for _, r := range m.GetResponses() {
				if r.GetTo() == n.id {
					n.ghosts = append(n.ghosts, r)
				}
			}
		}
	}
	if n.frozen == nil {
		n.freeze(power)
	}
	n.log, n.machine, n.files = &simLog{n.frozen.log, n}, n.frozen.machine, n.frozen.files
	n.frozen = nil
	if s.sab.installForgets {
		n.files = vfs.NewCrashableMem()
	}
	if s.sab.diskSwapped && n.id == 1 && power {
		fresh := newSimNode(s, n.id, s.boot)
		n.log, n.machine, n.files = fresh.log, fresh.machine, fresh.files
	}
	n.node, n.workers = nil, nil
	for _, c := range s.clients {
		c.nodeDied(n)
	}
	n.life++
	down := s.between(1_000, s.prof.downMax)
	if s.calm {
		down = 1_000
	}
	if !s.calm && s.prof.faults[faultFuse] > 0 && s.rng.IntN(4) == 0 {
		n.fuse = 1 + s.rng.IntN(8) // may hit while it starts
	}
	s.at(n, down, n.start)
}

// stop ends the node as Run does: everyone who waits gets an answer, while the
// storage workers may still finish what they had begun.
func (n *simNode) stop(failed bool) {
	s := n.sim
	if n.node == nil {
		return
	}
	n.node.resolve()
	s.event(n, "stop")
	if n.pending != 0 {
		s.violate("answers", "n%d stopped and left %d commands without an answer", n.id, n.pending)
	}
	if !failed {
		for range s.rng.IntN(3) {
			if _, err := n.node.appender.step(); err != nil && !n.diskBroken {
				s.violate("failure", "n%d gave up while stopping: %v", n.id, err)
			}
		}
		for range s.rng.IntN(3) {
			if _, err := n.node.applier.step(); err != nil && !n.diskBroken {
				s.violate("failure", "n%d gave up while stopping: %v", n.id, err)
			}
		}
	}
	n.crash(fmt.Sprintf("stopped, failed %t", failed), failed)
}

// lastTermOf returns the term of entry i in the log as raft has it: what is
// stored, overlaid with what waits to be stored. ok is false when raft's log
// ends before i; compacted entries have term zero.
func (n *simNode) lastTermOf(i uint64) (term uint64, ok bool) {
	items := n.node.appendQ.items
	for k := len(items) - 1; k >= 0; k-- {
		m := items[k]
		if ents := m.GetEntries(); len(ents) > 0 {
			lo, hi := ents[0].GetIndex(), ents[len(ents)-1].GetIndex()
			if i > hi {
				return 0, false
			}
			if i >= lo {
				return ents[i-lo].GetTerm(), true
			}
		}
		if hasSnapshot(m) {
			meta := m.GetSnapshot().GetMetadata()
			switch {
			case i > meta.GetIndex():
				return 0, false
			case i == meta.GetIndex():
				return meta.GetTerm(), true
			}
			return 0, true
		}
	}
	if i > n.log.last() {
		return 0, false
	}
	if i < n.log.index {
		return 0, true
	}
	term, err := n.log.Term(i)
	return term, err == nil
}

// lastIndex is the end of the log as raft has it.
func (n *simNode) lastIndex() uint64 {
	items := n.node.appendQ.items
	for k := len(items) - 1; k >= 0; k-- {
		if ents := items[k].GetEntries(); len(ents) > 0 {
			return ents[len(ents)-1].GetIndex()
		}
		if hasSnapshot(items[k]) {
			return items[k].GetSnapshot().GetMetadata().GetIndex()
		}
	}
	return n.log.last()
}

// holds reports whether the entry is safe on the node's disk, in the log or in
// what came before the log.
func (n *simNode) holds(index, term uint64) bool {
	d := &n.log.durable
	switch {
	case index <= d.index:
		return true
	case index > d.last():
		return false
	}
	return d.ents[index-d.index-1].GetTerm() == term
}
