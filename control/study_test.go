package control

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/placement"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// studied is a replica outside of any bubble and a Study of it.
func studied(t *testing.T, c StudyConfig) (*replica, *Study) {
	t.Helper()
	r := newReplica(t, router.Options{})
	c.State = r
	s := NewStudy(c)
	t.Cleanup(func() {
		s.Close()
		if err := r.fsm.Close(); err != nil {
			t.Error(err)
		}
	})
	return r, s
}

// carryOut makes the assignments what a plan says they should be.
func (r *replica) carryOut() {
	r.t.Helper()
	v := r.View()
	in, err := ReadInput(v)
	if err := errors.Join(err, v.Close()); err != nil {
		r.t.Fatal(err)
	}
	r.do(&commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{Changes: Plan(in)}}})
}

func (r *replica) hash() string {
	r.t.Helper()
	v := r.View()
	defer v.Close()
	h, err := v.Hash()
	if err != nil {
		r.t.Fatal(err)
	}
	return fmt.Sprintf("%x at %d", h, v.Revision())
}

// Goal: what a Study says is of the newest state, which it reads once; and it
// changes nothing.
func TestStudyFollows(t *testing.T) {
	r, s := studied(t, StudyConfig{})
	ctx := t.Context()
	explain := func(want string) {
		t.Helper()
		stages, at, err := s.Explain(ctx, "p", placement.Query{Candidates: 5, NextHops: 5})
		if err != nil {
			t.Fatal(err)
		}
		if at.Revision != r.fsm.Revision() {
			t.Errorf("the answer is of revision %d, the state of %d", at.Revision, r.fsm.Revision())
		}
		got := ""
		for _, st := range stages {
			got += fmt.Sprintf("%s on %v of %d, %q;", st.Stage, st.Sidecars, st.Offering, st.Pending)
		}
		if got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	explain("")
	r.register("a", "orders:source")
	r.putPipeline("p", "orders:source -> lake:sink")
	explain(`orders on [] of 1, "held back until stage \"lake\" downstream is served: records would be lost there";` +
		`lake on [] of 0, "no sidecar offers sink service \"lake\"";`)
	r.register("b", "lake:sink")
	explain(`orders on [] of 1, "about to be assigned";lake on [] of 1, "about to be assigned";`)
	r.carryOut()
	explain(`orders on [a] of 1, "";lake on [b] of 1, "";`)
	r.do(&commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: "b"}}})
	r.carryOut()
	r.do(&commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: "p"}}})
	explain("")
	// What is not about the placement has to be passed over.
	r.do(&commandpb.Command{Op: &commandpb.Command_RegisterService{RegisterService: &commandpb.RegisterService{Service: &commandpb.Service{
		ServiceId: "x", Name: "x", RegistrationId: "1", Endpoint: &commandpb.Endpoint{Host: "h", Port: 1}}}}})
	explain("")
	if n := s.reads.Load(); n != 1 {
		t.Errorf("the state was read %d times", n)
	}
}

// Goal: trying a pipeline or a loss says what comes of it and leaves the state, and
// what is said next, as they were.
func TestStudyOnlyTries(t *testing.T) {
	r, s := studied(t, StudyConfig{})
	ctx := t.Context()
	r.register("a", "orders:source", "lake:sink")
	r.register("b", "orders:source", "lake:sink")
	r.putPipeline("p", "orders:source -> lake:sink")
	r.carryOut()
	before := r.hash()
	first, _, err := s.Explain(ctx, "p", placement.Query{Candidates: 5})
	if err != nil {
		t.Fatal(err)
	}
	o, _, err := s.Try(ctx, []*commandpb.PipelineSpec{parsePipeline(t, "q", "orders:source -> clean:transform -> lake:sink")}, 10)
	if err != nil {
		t.Fatal(err)
	}
	if o.Waits != 3 || o.After.Moves != 0 || o.After.Pending != 3 || o.Before.Pending != 0 {
		t.Errorf("declaring q: %+v", o)
	}
	on := first[0].Sidecars[0]
	o, _, err = s.WhatIf(ctx, func(s *placement.Sidecar) bool { return s.ID == on }, 10)
	if err != nil {
		t.Fatal(err)
	}
	if o.After.Moves != 2 || o.After.Least != 2 || o.Waits != 0 || o.UnderWay != 0 {
		t.Errorf("losing %s: %+v", on, o)
	}
	o, _, err = s.WhatIf(ctx, func(*placement.Sidecar) bool { return true }, 10)
	if err != nil {
		t.Fatal(err)
	}
	if o.Waits != 2 || o.Waiting[1].Reason != `every sidecar that offers sink service "lake" has expired: a, b` {
		t.Errorf("losing all: %+v", o)
	}
	again, _, err := s.Explain(ctx, "p", placement.Query{Candidates: 5})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(first, again) {
		t.Errorf("explained before %+v\nand after %+v", first, again)
	}
	if now := r.hash(); now != before {
		t.Errorf("the state was %s and is %s", before, now)
	}
	if n := s.reads.Load(); n != 1 {
		t.Errorf("the state was read %d times", n)
	}
}

// Goal: a fault of the planner ends one question and no node.
func TestStudySurvivesAPanic(t *testing.T) {
	r, s := studied(t, StudyConfig{})
	r.register("a", "orders:source")
	_, _, err := ask(t.Context(), s, func(*placement.Engine) int { panic("planner") })
	if err == nil {
		t.Fatal("a panic was an answer")
	}
	if _, _, err := s.Explain(t.Context(), "p", placement.Query{}); err != nil {
		t.Fatal(err)
	}
}

// Goal: whoever asks waits for no longer than they want, too many are refused at
// once, and a closed Study answers nobody.
func TestStudyTurns(t *testing.T) {
	r, s := studied(t, StudyConfig{Waiting: 2})
	r.register("a", "orders:source")
	s.turn <- struct{}{} // a long answer
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 2)
	for range 2 {
		go func() {
			_, _, err := s.Explain(ctx, "p", placement.Query{})
			left <- err
		}()
	}
	for s.waiting.Load() < 2 {
		select {
		case err := <-left:
			t.Fatal(err)
		default:
		}
	}
	if _, _, err := s.Explain(t.Context(), "p", placement.Query{}); !errors.Is(err, raftnode.ErrBusy) {
		t.Fatalf("one too many: %v", err)
	}
	cancel()
	for range 2 {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	<-s.turn
	if _, _, err := s.Explain(t.Context(), "p", placement.Query{}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, _, err := s.Explain(t.Context(), "p", placement.Query{}); !errors.Is(err, raftnode.ErrStopping) {
		t.Fatalf("after Close: %v", err)
	}
	if s.mirror != nil || r.fsm.Hub().Subscribers() != 0 {
		t.Fatal("a closed Study keeps what it read")
	}
}

// Goal: nothing is kept for long when nobody asks.
func TestStudyRests(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.inBubble(func(t *testing.T, _ *Liveness) {
		s := NewStudy(StudyConfig{State: r})
		defer s.Close()
		explain := func() {
			t.Helper()
			if _, _, err := s.Explain(t.Context(), "p", placement.Query{}); err != nil {
				t.Fatal(err)
			}
		}
		explain()
		pass(50 * time.Second)
		explain()
		pass(50 * time.Second)
		synctest.Wait()
		kept := func() bool {
			s.turn <- struct{}{}
			defer func() { <-s.turn }()
			return s.mirror != nil
		}
		if n := s.reads.Load(); n != 1 || !kept() {
			t.Fatalf("the state was read %d times within a minute of each other", n)
		}
		pass(11 * time.Second)
		synctest.Wait()
		if kept() || r.Hub().Subscribers() != 0 {
			t.Fatal("what was read is kept after a minute")
		}
		explain()
		if n := s.reads.Load(); n != 2 {
			t.Fatalf("the state was read %d times", n)
		}
	})
}

// Goal: work is bounded to a share of the time, but for a burst.
func TestPace(t *testing.T) {
	p := pace{burst: 5 * time.Second, share: 0.25}
	now := time.Unix(1000, 0)
	step := func(work time.Duration) time.Duration {
		wait := p.wait(now)
		now = now.Add(wait + work)
		p.worked(now, work)
		return wait
	}
	if w := step(4 * time.Second); w != 0 {
		t.Fatalf("the first work waits %v", w)
	}
	if w := step(4 * time.Second); w != 0 {
		t.Fatalf("work within the burst waits %v", w)
	}
	start, worked := now, time.Duration(0)
	for range 100 {
		step(time.Second)
		worked += time.Second
	}
	if share := worked.Seconds() / now.Sub(start).Seconds(); share > 0.28 || share < 0.22 {
		t.Fatalf("it works %.2f of the time", share)
	}
	now = now.Add(time.Hour)
	if w := p.wait(now); w != 0 || p.left(now) != 0 {
		t.Fatalf("after an hour it still waits %v", w)
	}
}

// TestScoresDuringHandover: a stage that waits for its sidecar of before is not counted
// among those that run, of all pipelines as of its own, until it does.
func TestScoresDuringHandover(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source")
	r.register("k", "lake:sink")
	r.putPipeline("p", "orders:source*2 -> lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		all := []string{"a", "b", "c", "k"}
		check := func(what string, asked, placed, pending int) {
			t.Helper()
			synctest.Wait()
			s, _ := r.placer.Scores()
			v := r.View()
			q, _, err := PipelineQuality(v, "p")
			if err := errors.Join(err, v.Close()); err != nil {
				t.Fatal(err)
			}
			for name, q := range map[string]placement.Quality{"all": s.Quality, "p": q} {
				if q.Asked != asked || q.Placed != placed || q.Pending != pending {
					t.Errorf("%s: of %s %d of %d instances run, %d stages wait; want %d of %d, %d", what, name, q.Placed, q.Asked, q.Pending, placed, asked, pending)
				}
			}
		}
		r.setLeading(true)
		beat(l, time.Second, all...)
		r.register("b", "orders:source")
		beat(l, 5*time.Second, all...)
		check("at first", 3, 3, 0)
		r.register("c", "orders:source")
		beat(l, 5*time.Second, all...)
		r.drain("a", 0, false)
		beat(l, 5*time.Second, all...)
		check("one of two instances is handed over", 3, 2, 0)
		r.applied("a")
		beat(l, 5*time.Second, all...)
		check("it was", 3, 3, 0)
		r.putPipeline("p", "orders:source -> lake:sink")
		beat(l, 5*time.Second, all...)
		r.applied("b")
		r.applied("c")
		beat(l, 5*time.Second, all...)
		check("one instance", 2, 2, 0)
		on := r.runs("p", "orders")
		r.drain(on, 0, false)
		beat(l, 5*time.Second, all...)
		check("the only instance is handed over", 2, 1, 1)
		r.putPipeline("q", "lake:sink")
		beat(l, 5*time.Second, all...)
		if s, _ := r.placer.Scores(); s.Quality.Placed != 2 || s.Quality.Pending != 1 {
			t.Errorf("after another plan meanwhile: %+v", s.Quality)
		}
		r.applied(on)
		beat(l, 5*time.Second, all...)
		if s, _ := r.placer.Scores(); s.Quality.Placed != 3 || s.Quality.Pending != 0 {
			t.Errorf("in the end: %+v\n%s", s.Quality, r.table())
		}
	})
}

// Goal: the figures of plans are there while a node leads, and only then; the load
// is measured in the end, however fast plans follow each other.
func TestScores(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "orders:source", "lake:sink")
	r.register("b", "lake:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		if _, ok := r.placer.Scores(); ok {
			t.Fatal("a node that does not lead has figures")
		}
		r.setLeading(true)
		beat(l, time.Second, "a", "b")
		r.putPipeline("p", "orders:source -> lake:sink")
		beat(l, time.Second, "a", "b")
		check := func(moves, least int, total uint64, highest float64, placed int) {
			t.Helper()
			s, ok := r.placer.Scores()
			if !ok || s.Last.Moves != moves || s.Last.Least != least || s.Moves != total || s.Quality.Highest != highest || s.Quality.Placed != placed ||
				s.Quality.MaxOverMean() != 1 {
				t.Errorf("known %v: %+v", ok, s)
			}
			if m, ok := r.placer.Moved("p"); !ok || m != s.Last {
				t.Errorf("p: known %v, %+v, the last plan %+v", ok, m, s.Last)
			}
		}
		check(2, 2, 2, 2, 2)
		r.register("c", "orders:source") // first, or a plan may fall in between
		r.do(&commandpb.Command{Op: &commandpb.Command_DeregisterSidecar{DeregisterSidecar: &commandpb.DeregisterSidecar{SidecarId: "a"}}})
		beat(l, time.Second, "b", "c")
		check(2, 2, 4, 1, 2)
		v := r.View()
		defer v.Close()
		q, ok, err := PipelineQuality(v, "p")
		want := placement.Quality{Asked: 2, Placed: 2, Edges: 1, Highest: 1, Mean: 1, Bound: 1, Together: 1}
		if err != nil || !ok || q != want {
			t.Errorf("p: %+v %v %v", q, ok, err)
		}
		if _, ok, err := PipelineQuality(v, "none"); ok || err != nil {
			t.Errorf("there is no such pipeline: %v %v", ok, err)
		}
		r.do(&commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: "p"}}})
		beat(l, time.Second, "b", "c")
		if _, ok := r.placer.Moved("p"); ok {
			t.Error("the moves of a pipeline that is gone are kept")
		}
		if s, _ := r.placer.Scores(); s.Quality.Highest != 0 {
			t.Errorf("nothing runs: %+v", s)
		}
		r.setLeading(false)
		synctest.Wait()
		if _, ok := r.placer.Scores(); ok {
			t.Error("a node that leads no more has figures")
		}
	})
}
