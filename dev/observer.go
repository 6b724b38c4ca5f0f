package dev

import (
	"context"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

const (
	// observeEvery is how often the cluster is asked how it is, and how long each
	// question waits for its answer.
	observeEvery = 400 * time.Millisecond
	// missedLooks is after how many questions without an answer it is said that a node
	// gives none: four seconds, for on a busy machine one may come late.
	missedLooks = 5
)

// epochKey is the header in which a reply carries the restore epoch.
const epochKey = "conveyor-epoch"

// scene is what was seen of the cluster last.
type scene struct {
	nodes     map[int]*adminpb.GetClusterStatusResponse // by id; nil = did not answer
	frozen    map[int]bool                              // those that run and have not answered for long
	leader    uint64
	term      uint64
	revision  uint64
	pipelines []*adminpb.PipelineConfig
	statuses  []*adminpb.PipelineStatus
	sidecars  []*clusterpb.SidecarInfo
	seen      bool // an answer was had at least once
}

// observer looks at the cluster from outside, as any client could.
type observer struct {
	o      *Options
	events *events
	conns  map[int]*grpc.ClientConn // one per node, to know each by itself
	any    *grpc.ClientConn
	// pid returns the process of a node, 0 when it is down; nil = nobody knows.
	pid func(node int) int
	// heard is what is known of the answers of each node; of the goroutine of look.
	heard map[int]*heard

	mu  sync.Mutex
	now scene
}

// heard is whether a process has answered, and how often in a row it has not since.
type heard struct {
	pid      int
	answered bool
	missed   int
}

func newObserver(o *Options, ev *events) (*observer, error) {
	ob := &observer{o: o, events: ev, conns: make(map[int]*grpc.ClientConn), heard: make(map[int]*heard)}
	var err error
	if ob.any, err = dial(o.endpoints()); err != nil {
		return nil, err
	}
	for i := 1; i <= o.Nodes; i++ {
		if ob.conns[i], err = dial([]string{o.clientAddr(i)}); err != nil {
			ob.close()
			return nil, err
		}
	}
	return ob, nil
}

func (ob *observer) close() {
	_ = ob.any.Close()
	for _, c := range ob.conns {
		_ = c.Close()
	}
}

func (ob *observer) scene() scene {
	ob.mu.Lock()
	defer ob.mu.Unlock()
	return ob.now
}

// run looks until ctx is done.
func (ob *observer) run(ctx context.Context) {
	var feed sync.WaitGroup
	defer feed.Wait()
	feed.Go(func() { ob.follow(ctx) })
	for {
		ob.look(ctx)
		if !pause(ctx, observeEvery) {
			return
		}
	}
}

func (ob *observer) look(ctx context.Context) {
	asking, cancel := context.WithTimeout(stale(ctx), observeEvery)
	defer cancel()
	var mu sync.Mutex
	next := scene{nodes: make(map[int]*adminpb.GetClusterStatusResponse)}
	var asked sync.WaitGroup
	for id, conn := range ob.conns {
		asked.Go(func() {
			st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(asking, &adminpb.GetClusterStatusRequest{})
			if err != nil {
				return
			}
			mu.Lock()
			next.nodes[id] = st
			mu.Unlock()
		})
	}
	asked.Wait()
	// Each node says who leads as far as it knows; the newest term is right,
	// and in it a leader that answers itself.
	newest := 0
	for id, st := range next.nodes {
		if st.GetTerm() > next.term || (st.GetTerm() == next.term && st.GetLeaderId() != 0) {
			next.term, next.leader = st.GetTerm(), st.GetLeaderId()
		}
		if st.GetRevision() >= next.revision {
			next.revision, newest = st.GetRevision(), id
		}
	}
	if next.nodes[int(next.leader)] == nil {
		next.leader = 0 // nobody who could say so leads
	}
	if ctx.Err() == nil {
		next.frozen = ob.silent(next.nodes)
	}
	old := ob.scene()
	// A node that does not answer has used up the time for the first question.
	ctx, cancel = context.WithTimeout(stale(ctx), observeEvery)
	defer cancel()
	if newest != 0 {
		admin := adminpb.NewRouterAdminClient(ob.conns[newest])
		if list, err := admin.ListPipelines(ctx, &adminpb.ListPipelinesRequest{IncludeDisabled: true}); err == nil {
			next.pipelines, next.statuses, next.seen = list.GetPipelines(), list.GetStatuses(), true
		}
		if list, err := clusterpb.NewClusterClient(ob.conns[newest]).ListSidecars(ctx, &clusterpb.ListSidecarsRequest{}); err == nil {
			next.sidecars = list.GetSidecars()
		}
	}
	if !next.seen {
		next.pipelines, next.statuses, next.sidecars, next.seen = old.pipelines, old.statuses, old.sidecars, old.seen
	}
	if next.leader != old.leader || (next.leader != 0 && next.term != old.term) {
		switch {
		case next.leader != 0:
			ob.events.add("node %d leads, term %d", next.leader, next.term)
		case old.leader != 0:
			if len(next.nodes) == 0 {
				ob.events.add("no node answers")
				break
			}
			ob.events.add("no node leads: writes wait, %d of %d nodes answer", len(next.nodes), ob.o.Nodes)
		}
	}
	ob.mu.Lock()
	ob.now = next
	ob.mu.Unlock()
}

// silent says which nodes run and have not answered for long, and tells when that begins
// and ends. Nothing is said of one that has yet to answer: it starts.
func (ob *observer) silent(answers map[int]*adminpb.GetClusterStatusResponse) map[int]bool {
	if ob.pid == nil {
		return nil
	}
	out := make(map[int]bool)
	for id := range ob.conns {
		pid, h := ob.pid(id), ob.heard[id]
		if h == nil || h.pid != pid {
			h = &heard{pid: pid} // that the one before has ended is said already
			ob.heard[id] = h
		}
		if answers[id] != nil {
			if h.missed >= missedLooks {
				ob.events.add("node %d answers again", id)
			}
			h.answered, h.missed = true, 0
			continue
		}
		if pid == 0 || !h.answered {
			continue
		}
		if h.missed++; h.missed == missedLooks {
			if stopped(pid) {
				ob.events.add("node %d does not answer: its process is stopped; kill -CONT %d lets it go on", id, pid)
			} else {
				ob.events.add("node %d does not answer, though its process runs, pid %d", id, pid)
			}
		}
		out[id] = h.missed >= missedLooks
	}
	return out
}

// placed says whether every stage of these pipelines runs somewhere, of those that are
// enabled. Others may be left from a run before, and nobody be there to run them.
func (s *scene) placed(wanted []*adminpb.PipelineConfig) bool {
	for _, w := range wanted {
		i := slices.IndexFunc(s.pipelines, func(p *adminpb.PipelineConfig) bool { return p.GetId() == w.GetId() })
		if i < 0 {
			return false
		}
		p := s.pipelines[i]
		if !p.GetEnabled() {
			continue
		}
		if i >= len(s.statuses) || len(s.statuses[i].GetPlacements()) < len(p.GetStages()) {
			return false
		}
		if slices.ContainsFunc(s.statuses[i].GetPlacements(), func(pl *adminpb.StagePlacement) bool { return len(pl.GetSidecarIds()) == 0 }) {
			return false
		}
	}
	return true
}

// follow turns the changes of the cluster into events.
func (ob *observer) follow(ctx context.Context) {
	from, epoch := uint64(0), ""
	for ctx.Err() == nil {
		stream, err := clusterpb.NewClusterClient(ob.any).WatchChanges(ctx, &clusterpb.WatchChangesRequest{
			FromRevision: from, Tables: []string{"pipelines", "sidecars", "assignments"},
		}, grpc.WaitForReady(true))
		got := false
		if err == nil {
			// A restore ends the watch, and the changes it makes are in no watch.
			head, _ := stream.Header()
			if now := head.Get(epochKey); len(now) == 1 && now[0] != epoch {
				if epoch != "" {
					ob.events.add("the state was replaced by a restore; restore epoch %s", now[0])
				}
				epoch = now[0]
			}
		}
		for err == nil {
			var ev *clusterpb.ChangeEvent
			if ev, err = stream.Recv(); err == nil && ev.GetSummary() != "" {
				ob.events.add("%s", ev.GetSummary())
				from, got = ev.GetRevision(), true
			}
		}
		if !got {
			from = 0 // the place it wanted to resume from may be gone
		}
		if !pause(ctx, 300*time.Millisecond) {
			return
		}
	}
}
