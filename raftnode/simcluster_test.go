package raftnode

import (
	"container/heap"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"time"
)

// simProfile is what kind of world a seed lives in. Each seed draws its own
// (swarm testing): a world with every fault at once finds less than many worlds
// with some of them.
type simProfile struct {
	nodes, clients  int
	steps           int
	config          Config
	ordered         bool
	lossPermille    int
	repeatPermille  int
	latencyMax      int64
	latencyTailPct  int
	think           int64
	burst           int
	ballast         int
	readPct         int
	memberPermille  int
	flushPct        int
	slowDisk        int64
	slowApply       int64
	downMax         int64
	faultEvery      int64
	faults          [simFaults]int
	faultsWeightSum int
}

// The faults.
const (
	faultKill = iota
	faultPower
	faultPowerAll
	faultFuse
	faultStop
	faultSplit
	faultIsolate
	faultOneWay
	faultHeal
	faultSlowDisk
	faultBrokenDisk
	faultPause
	faultClockRate
	faultClockJump
	faultTransfer
	faultCampaign
	simFaults
)

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

func newSimProfile(r *rand.Rand) simProfile {
	p := simProfile{
		nodes: pick(r, 3, 3, 5), clients: 2 + r.IntN(6), steps: 2000 + r.IntN(2500),
		ordered: r.IntN(2) == 0, lossPermille: pick(r, 0, 0, 10, 50, 150), repeatPermille: pick(r, 0, 10, 100),
		latencyMax: pick[int64](r, 1_000, 5_000, 30_000), latencyTailPct: pick(r, 0, 2, 10),
		think: pick[int64](r, 10_000, 60_000, 200_000), burst: pick(r, 1, 1, 3, 12), ballast: pick(r, 1, 40, 300),
		readPct: pick(r, 0, 20, 50), memberPermille: pick(r, 0, 0, 30), flushPct: pick(r, 0, 2, 20),
		slowDisk: pick[int64](r, 50_000, 300_000, 1_500_000), slowApply: pick[int64](r, 1_000, 1_000, 30_000, 300_000), downMax: pick[int64](r, 20_000, 200_000, 1_000_000),
		faultEvery: pick[int64](r, 60_000, 200_000, 600_000),
	}
	p.config = Config{
		TickInterval: 20 * time.Millisecond, ElectionTicks: 6, HeartbeatTicks: 2,
		MaxSizePerMsg: pick[uint64](r, 1, 300, 4*kib, 1*mib), MaxInflightMsgs: pick(r, 1, 4, 256),
		MaxInflightBytes:  pick[uint64](r, 1*mib, 4*mib),
		MaxCommittedBytes: pick[uint64](r, 1, 300, 1*mib), MaxUncommittedBytes: pick[uint64](r, 600, 4*kib, 1*mib),
		MaxCommandBytes: 400, MaxBatchBytes: pick(r, 1, 200, 2*kib), MaxBatchesInFlight: pick(r, 1, 1, 2, 8),
		MaxWaiting: pick(r, 3, 1000), MaxWaitingBytes: pick[int64](r, 1*kib, 1*mib), MaxApplyBytes: pick(r, 1, 300, 1*mib),
		MaxPeerInboxBytes: 1*mib + 8*kib,
		TailBytes:         pick[int64](r, 512, 1*kib, 3*kib, 1*mib), MaxTailEntries: pick[uint64](r, 4, 8, 16, 1000),
		FollowerTailBytes: 4 * mib, PinnedTailBytes: 8 * mib,
		MaxImageSenders: pick(r, 1, 2), ImageRetry: pick(r, 10*msec, 100*msec), KeepImages: pick(r, 1, 2),
		CrowdedRounds: 1 + p.clients%2, ReadRetry: 60 * msec, ReadTimeout: 400 * msec, AmbiguousAfter: pick(r, 100*msec, 400*msec, 3000*msec),
		TransferTimeout: 100 * msec, StallTransfer: 100 * msec, StallFail: pick(r, 400*msec, 2000*msec),
	}
	if r.IntN(2) == 0 {
		p.config.FollowerTailBytes = p.config.TailBytes
		p.config.PinnedTailBytes = 2 * p.config.TailBytes
	}
	for i := range p.faults {
		if r.IntN(2) == 0 {
			p.faults[i] = 1 + r.IntN(6)
			if i == faultFuse {
				p.faults[i] *= 3 // most burn out unseen
			}
			p.faultsWeightSum += p.faults[i]
		}
	}
	return p
}

const msec = time.Millisecond

// sabotage breaks a part of the simulated world that raftnode has to rely on,
// to show that the oracle notices.
type sabotage struct {
	ackBeforeSync, forgetVotes, durableLies, installForgets, diskSwapped bool
	ghostAnswers, applyOrder, proposeTwice, lieRefused, staleReads       bool
	openWithoutSync, forgeSender, garbleEntries, neverHeal               bool
	// blind names the kinds of violation not to be noticed.
	blind []string
}

type simEvent struct {
	at, seq int64
	node    *simNode
	life    int
	run     func()
}

type simQueue []*simEvent

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].seq < q[j].seq
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(*simEvent)) }
func (q *simQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return e
}

// simStats counts what happened, to see that a run is not vacuous.
type simStats struct {
	steps, seconds, elections, crashes, fuses, installs, truncations, dropped  int
	proposed, acked, refused, ambiguous, overwritten, lost, reads, readsFailed int
}

// sim is one run of one seed: whole nodes, clients, network and faults in one
// goroutine, driven by one generator and a queue of events in virtual time.
type sim struct {
	seed   uint64
	rng    *rand.Rand
	prof   simProfile
	sab    sabotage
	trace  *simTrace
	oracle *simOracle
	stats  simStats
	boot   Position

	now     int64 // microseconds
	seq     int64
	steps   int
	queue   simQueue
	nodes   []*simNode
	net     *simNet
	clients []*simClient
	// orphans are reads whose client has left.
	orphans []*simOp
	moves   int
	// calm: no faults and no new calls any more.
	calm bool

	violation error
	kind      string
}

// simRandom makes raft draw its election timeouts from the seed too.
type simRandom struct{ r *rand.Rand }

func (s simRandom) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(s.r.Uint32())
	}
	return len(b), nil
}

// simulate runs one seed and returns the finished run; see its violation.
func simulate(seed uint64, sab sabotage, out io.Writer) *sim {
	s := &sim{seed: seed, rng: rand.New(rand.NewPCG(seed, 0x5eed)), sab: sab, trace: newSimTrace()}
	s.trace.out = out
	saved := crand.Reader
	crand.Reader = simRandom{rand.New(rand.NewPCG(seed, 0x7a57))}
	defer func() { crand.Reader = saved }()

	s.prof = newSimProfile(s.rng)
	s.event(nil, fmt.Sprintf("seed %d: %d nodes, %d clients", seed, s.prof.nodes, s.prof.clients))
	var ids []uint64
	for i := range s.prof.nodes {
		ids = append(ids, uint64(i+1))
	}
	s.boot = bootPosition(ids...)
	s.oracle = newSimOracle(s, s.boot)
	s.net = &simNet{sim: s}
	for _, id := range ids {
		s.nodes = append(s.nodes, newSimNode(s, id, s.boot))
	}
	for _, n := range s.nodes {
		s.survives(n.start)
	}
	for i := range s.prof.clients {
		c := &simClient{sim: s, id: i}
		s.clients = append(s.clients, c)
		c.next()
	}
	s.at(nil, s.prof.faultEvery, s.fault)
	for s.steps < s.prof.steps && s.violation == nil {
		s.step()
	}
	s.heal()
	s.stats.steps = s.steps
	s.stats.seconds = int(s.now / 1_000_000)
	return s
}

// between draws a time in microseconds.
func (s *sim) between(lo, hi int64) int64 {
	if hi <= lo {
		return lo
	}
	return lo + s.rng.Int64N(hi-lo)
}

func (s *sim) tickMicros() int64   { return s.prof.config.TickInterval.Microseconds() }
func (s *sim) computeDelay() int64 { return s.between(5, 200) }
func (s *sim) imageDelay() int64   { return s.between(1_000, 60_000) }

func (s *sim) applyDelay() int64 {
	if s.calm {
		return s.between(5, 1_000)
	}
	return s.between(5, s.prof.slowApply)
}

func (s *sim) latency() int64 {
	if !s.calm && s.rng.IntN(100) < s.prof.latencyTailPct {
		return s.between(s.prof.latencyMax, 10*s.prof.latencyMax)
	}
	return s.between(50, s.prof.latencyMax)
}

// at has f run after a while; with a node, only if it then still lives the same
// life (or is still down).
func (s *sim) at(n *simNode, after int64, f func()) {
	e := &simEvent{at: s.now + after, seq: s.seq, node: n, run: f}
	if n != nil {
		e.life = n.life
	}
	s.seq++
	heap.Push(&s.queue, e)
}

// step runs the next event.
func (s *sim) step() {
	for {
		e := heap.Pop(&s.queue).(*simEvent)
		s.now = max(s.now, e.at)
		if n := e.node; n != nil {
			if n.life != e.life {
				continue
			}
			if n.pausedUntil > s.now && n.node != nil {
				e.at = n.pausedUntil
				heap.Push(&s.queue, e)
				continue
			}
		}
		s.steps++
		s.survives(e.run)
		break
	}
	for _, n := range s.nodes {
		n.poll()
	}
	for _, c := range s.clients {
		c.poll()
	}
	s.orphans = slices.DeleteFunc(s.orphans, func(op *simOp) bool { return op.node.life != op.life || s.pollRead(op) })
}

// survives runs f; a crash point in it ends the node it belongs to, any other
// panic the run. It returns false after either.
func (s *sim) survives(f func()) (ok bool) {
	ok = true
	defer func() {
		switch r := recover().(type) {
		case nil:
		case simCrash:
			s.stats.fuses++
			r.node.crash("at "+r.at, true)
			ok = false
		default:
			s.violate("failure", "panic: %v\n%s", r, debug.Stack())
			ok = false
		}
		for _, n := range s.nodes {
			if n.doomed != "" {
				s.stats.fuses++
				n.crash(n.doomed, true)
				ok = false
			}
		}
	}()
	f()
	return ok
}

// violate ends the run.
func (s *sim) violate(kind, format string, args ...any) {
	if s.violation == nil && !slices.Contains(s.sab.blind, kind) {
		s.kind = kind
		s.violation = fmt.Errorf(kind+": "+format, args...)
		s.event(nil, "VIOLATION", s.violation.Error())
	}
}

// fault lets something go wrong and comes back later.
func (s *sim) fault() {
	if s.calm {
		return
	}
	s.at(nil, s.between(1, 2*s.prof.faultEvery), s.fault)
	if s.prof.faultsWeightSum == 0 {
		return
	}
	w, kind := s.rng.IntN(s.prof.faultsWeightSum), 0
	for w >= s.prof.faults[kind] {
		w -= s.prof.faults[kind]
		kind++
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	if s.rng.IntN(3) == 0 {
		// Leaders are where it hurts.
		for _, x := range s.nodes {
			if x.node != nil && x.node.Leadership().Leading {
				n = x
			}
		}
	}
	if s.faultOfNetwork(kind, n) || n.node == nil {
		return
	}
	s.faultOfNode(kind, n)
}

func (s *sim) faultOfNetwork(kind int, n *simNode) bool {
	w := s.net
	switch kind {
	case faultPowerAll:
		s.event(nil, "the power fails")
		for _, x := range s.nodes {
			x.crash("power of all", true)
		}
	case faultSplit:
		s.event(nil, "the network splits")
		var side [simMaxNodes + 1]int
		for i := range side {
			side[i] = s.rng.IntN(2)
		}
		for _, a := range s.nodes {
			for _, b := range s.nodes {
				w.cut[a.id][b.id] = side[a.id] != side[b.id]
			}
		}
	case faultIsolate:
		s.event(n, "isolated")
		for _, b := range s.nodes {
			w.cut[n.id][b.id], w.cut[b.id][n.id] = true, true
		}
	case faultOneWay:
		out := s.rng.IntN(2) == 0
		s.event(n, "cut off one way")
		for _, b := range s.nodes {
			if s.rng.IntN(3) == 0 {
				continue
			}
			if out {
				w.cut[n.id][b.id] = true
			} else {
				w.cut[b.id][n.id] = true
			}
		}
	case faultHeal:
		s.event(nil, "the network heals")
		w.cut = [simMaxNodes + 1][simMaxNodes + 1]bool{}
	default:
		return false
	}
	if kind == faultSplit || kind == faultIsolate || kind == faultOneWay {
		s.at(nil, s.between(20_000, 1_200_000), func() {
			s.event(nil, "the network heals")
			w.cut = [simMaxNodes + 1][simMaxNodes + 1]bool{}
		})
	}
	return true
}

func (s *sim) faultOfNode(kind int, n *simNode) {
	switch kind {
	case faultKill:
		n.crash("killed", false)
	case faultPower:
		n.crash("power", true)
	case faultFuse:
		n.fuse = 1 + s.rng.IntN(24)
		s.event(n, "will crash at durable step", fmt.Sprint(n.fuse))
	case faultStop:
		n.stop(false)
	case faultSlowDisk:
		n.slowUntil = s.now + s.between(50_000, 1_000_000)
		s.event(n, "the disk is slow")
	case faultBrokenDisk:
		n.diskBroken = true
		n.log.fail = func(string) error { return errors.New("input/output error") }
		s.event(n, "the disk is broken")
	case faultPause:
		n.pausedUntil = s.now + s.between(20_000, 800_000)
		s.event(n, "paused")
	case faultClockRate:
		n.rate = pick(s.rng, 30, 60, 100, 100, 150, 400)
		s.event(n, "ticks at", fmt.Sprint(n.rate), "percent")
	case faultClockJump:
		n.clock += s.between(0, 500_000)
		s.event(n, "the clock jumps")
	case faultTransfer:
		to := uint64(s.rng.IntN(len(s.nodes) + 1))
		s.event(n, "transfers leadership to", fmt.Sprint(to))
		cl := &call{ch: make(chan outcome, 1)}
		if n.node.Leadership().Leading && to != n.id {
			n.node.inbox.pushControl(cl, func(l *loop) { l.transfer(to, cl) })
		}
	case faultCampaign:
		s.event(n, "campaigns")
		n.node.inbox.pushControl(nil, func(l *loop) { _ = l.rn.Campaign() })
	}
}

// heal ends all faults and demands progress: within so many election timeouts
// there is one leader, a new command is acknowledged, and all states are equal.
func (s *sim) heal() {
	if s.violation != nil {
		return
	}
	s.event(nil, "all faults end")
	s.calm = true
	s.net.cut = [simMaxNodes + 1][simMaxNodes + 1]bool{}
	for _, n := range s.nodes[1:] {
		s.net.cut[1][n.id] = s.sab.neverHeal
	}
	for _, n := range s.nodes {
		n.fuse, n.slowUntil, n.pausedUntil, n.rate = 0, 0, 0, 100
		if n.diskBroken && n.node != nil {
			n.crash("the disk is replaced by its copy", true)
		}
		s.survives(n.start)
	}
	const timeouts = 60
	deadline := s.now + timeouts*2*int64(s.prof.config.ElectionTicks)*s.tickMicros()
	probe := &simClient{sim: s}
	var asked *simOp
	ask := int64(0)
	for s.violation == nil {
		s.step()
		if s.now > deadline {
			s.violate("liveness", "%d election timeouts after the last fault %s", timeouts, s.missing(asked))
			return
		}
		if asked != nil && s.oracle.where[asked.cmd].index != 0 && s.oracle.converged() == "" {
			break
		}
		if (asked == nil || asked.done && s.oracle.where[asked.cmd].index == 0) && s.now >= ask {
			ask = s.now + 50_000
			for _, n := range s.nodes {
				if n.node != nil && n.node.Leadership().Leading {
					probe.propose(n)
					asked = probe.op
					break
				}
			}
			if asked == nil {
				probe.op = nil
			} else if probe.op != nil {
				asked = probe.op
			}
		}
	}
	if s.violation == nil {
		s.oracle.finish()
	}
}

func (s *sim) missing(asked *simOp) string {
	switch {
	case asked == nil:
		return "there is no leader"
	case s.oracle.where[asked.cmd].index == 0:
		return "a new command has not taken effect"
	}
	return s.oracle.converged()
}
