package raftnode

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// simCommand is the id of the command and some ballast.
func simCommand(id uint64, ballast int) []byte {
	b := make([]byte, 8+ballast)
	binary.LittleEndian.PutUint64(b, id)
	return b
}

func decodeSimCommand(b []byte) (uint64, error) {
	if len(b) < 8 {
		return 0, fmt.Errorf("a command of %d bytes", len(b))
	}
	return binary.LittleEndian.Uint64(b), nil
}

// simOp is one call of a client.
type simOp struct {
	node  *simNode
	life  int
	cmd   uint64
	read  *call // a read, else a command
	floor uint64
	done  bool
}

// simClient has at most one call outstanding, thinks for a while, and picks a
// node for the next, following a hint to the leader more often than not.
type simClient struct {
	sim  *sim
	id   int
	hint uint64
	op   *simOp
	// waiting: the next act is on its way.
	waiting bool
}

// next has the client act again after a while.
func (c *simClient) next() {
	if !c.waiting {
		c.waiting = true
		think := c.sim.prof.think
		if c.hint == 0 {
			think = max(think, 40_000) // nobody to ask: no use in hurrying
		}
		c.sim.at(nil, c.sim.between(think/10, think), c.act)
	}
}

func (c *simClient) act() {
	s := c.sim
	c.waiting = false
	if s.calm || c.op != nil {
		return
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	if c.hint != 0 && s.rng.IntN(4) > 0 {
		n = s.nodes[c.hint-1]
	}
	if n.node == nil || n.pausedUntil > s.now {
		c.hint = 0
		c.next()
		return
	}
	switch {
	case s.rng.IntN(100) < s.prof.readPct:
		c.read(n)
	case s.rng.IntN(1000) < s.prof.memberPermille:
		c.moveMember(n)
	default:
		for range 1 + s.rng.IntN(s.prof.burst) {
			if c.propose(n); c.op == nil {
				break // refused at once
			}
		}
	}
	if c.op == nil {
		c.next()
		return
	}
	// Nobody waits for ever.
	op := c.op
	s.at(nil, 700_000, func() {
		if c.op == op {
			c.leave()
		}
	})
}

// leave gives the call up; its outcome still counts when it comes.
func (c *simClient) leave() {
	if c.op != nil && c.op.read != nil && !c.op.done {
		c.sim.orphans = append(c.sim.orphans, c.op)
	}
	c.op = nil
	c.hint = 0
	c.next()
}

func (c *simClient) nodeDied(n *simNode) {
	if c.op != nil && c.op.node == n && !c.op.done {
		c.op = nil
		c.hint = 0
		c.next()
	}
}

// propose asks n to replicate a new command.
func (c *simClient) propose(n *simNode) {
	s := c.sim
	op := &simOp{node: n, life: n.life, cmd: s.oracle.newCommand(), floor: s.oracle.known}
	c.op = op
	s.stats.proposed++
	n.pending++
	data := simCommand(op.cmd, s.rng.IntN(s.prof.ballast))
	n.node.ProposeFunc(data, func(r Result, err error) {
		if op.done {
			s.violate("answers", "command %d was answered twice", op.cmd)
		}
		op.done = true
		n.pending--
		s.settled(n, op, r, err)
		if c.op == op {
			c.op = nil
			c.hint = 0
			var nl *NotLeaderError
			if err == nil {
				c.hint = n.id
			} else if errors.As(err, &nl) {
				c.hint = nl.Leader
			}
			c.next()
		}
	})
	for i := range data {
		data[i] = 0xff // it is the caller's again
	}
	if s.sab.proposeTwice && s.rng.IntN(10) == 0 && n.node != nil {
		n.node.ProposeFunc(simCommand(op.cmd, 0), func(Result, error) {})
	}
}

// settled takes the outcome of a command to the oracle.
func (s *sim) settled(n *simNode, op *simOp, r Result, err error) {
	if s.sab.lieRefused && err != nil {
		err = ErrBusy
	}
	switch {
	case err == nil:
		s.stats.acked++
		s.oracle.acknowledged(n, op, r)
		s.event(n, "acked", fmt.Sprint(op.cmd), "at", fmt.Sprint(r.Index))
	case NotDone(err):
		s.stats.refused++
		if errors.Is(err, ErrOverwritten) {
			s.stats.overwritten++
			s.event(n, "overwritten", fmt.Sprint(op.cmd))
		}
		s.oracle.refuse(n, op.cmd, err)
	case errors.Is(err, ErrAmbiguous):
		s.stats.ambiguous++
		s.event(n, "unknown", fmt.Sprint(op.cmd), err.Error())
	default:
		s.violate("answers", "command %d ends with an error that says nothing: %v", op.cmd, err)
	}
}

// read asks n for an index to read at. (ReadIndex without a goroutine to wait.)
func (c *simClient) read(n *simNode) {
	s := c.sim
	op := &simOp{node: n, life: n.life, read: &call{ch: make(chan outcome, 1)}, floor: s.oracle.known}
	c.op = op
	s.stats.reads++
	if s.sab.staleReads {
		op.read.ch <- outcome{res: Result{Index: n.node.Applied()}}
		return
	}
	if err := n.node.inbox.pushRead(op.read); err != nil {
		c.op = nil
	}
}

// poll looks whether the read has been answered.
func (c *simClient) poll() {
	if op := c.op; op != nil && op.read != nil && c.sim.pollRead(op) {
		c.op = nil
		c.next()
	}
}

func (s *sim) pollRead(op *simOp) bool {
	o, ok := op.read.poll()
	if !ok {
		return false
	}
	op.done = true
	if o.err != nil {
		s.stats.readsFailed++
		s.event(op.node, "read refused:", o.err.Error())
		return true
	}
	s.oracle.hasRead(op, o.res.Index)
	return true
}

// moveMember has a leader replicate another address for a member: a membership
// change that leaves the quorums alone.
func (c *simClient) moveMember(n *simNode) {
	s := c.sim
	s.moves++
	cl := &call{ch: make(chan outcome, 1)}
	change := Change{Kind: UpdateAddr, ID: 1 + uint64(s.rng.IntN(len(s.nodes))), Addr: fmt.Sprintf("moved-%d:1", s.moves)}
	if n.node.Leadership().Leading {
		s.event(n, "membership change", change.Addr)
		n.node.inbox.pushControl(cl, func(l *loop) { l.changeMembership(change, cl) })
	}
}
