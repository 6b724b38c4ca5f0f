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

// observeEvery is how often the cluster is asked how it is.
const observeEvery = 400 * time.Millisecond

// epochKey is the header in which a reply carries the restore epoch.
const epochKey = "conveyor-epoch"

// scene is what was seen of the cluster last.
type scene struct {
	nodes     map[int]*adminpb.GetClusterStatusResponse // by id; nil = did not answer
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

	mu  sync.Mutex
	now scene
}

func newObserver(o *Options, ev *events) (*observer, error) {
	ob := &observer{o: o, events: ev, conns: make(map[int]*grpc.ClientConn)}
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
	ctx, cancel := context.WithTimeout(stale(ctx), observeEvery)
	defer cancel()
	var mu sync.Mutex
	next := scene{nodes: make(map[int]*adminpb.GetClusterStatusResponse)}
	var asked sync.WaitGroup
	for id, conn := range ob.conns {
		asked.Go(func() {
			st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
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
	old := ob.scene()
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
