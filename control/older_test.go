package control

import (
	"testing"
	"time"

	"conveyor.etl/router/router"
)

// Goal: a pipeline whose records are to go the other way round is turned in two
// steps: who is told to hand over to a sidecar that may still hand over to it hears so
// once that one has heard. Without the wait A, which beats last, hands records to B,
// and B hands them back.
func TestPipelineIsTurnedRound(t *testing.T) {
	turn := func(t *testing.T, then func(t *testing.T, r *replica, l *Liveness)) {
		r := newReplica(t, router.Options{})
		r.register("a", "here:source", "near:sink")
		r.register("b", "there:source", "far:sink")
		r.putPipeline("p", "here:source -> far:sink")
		r.inBubble(func(t *testing.T, l *Liveness) {
			r.setLeading(true)
			beat(l, 2*time.Minute, "a", "b") // whoever might hold an older table has heard
			r.expect("at first", "p", "here", "a")
			r.putPipeline("p", "there:source -> near:sink")
			beat(l, time.Second, "a", "b")
			r.expect("at once", "p", "near", "a")
			r.expect("until a has heard", "p", "there", "")
			if !r.placer.PutOff("p") || r.placer.PutOff("q") {
				t.Fatal("it does not say that it is not through")
			}
			then(t, r, l)
			r.expect("then", "p", "there", "b")
			if r.placer.PutOff("p") {
				t.Fatal("it does not say that it is through")
			}
			before, plans := r.table(), r.planned()
			beat(l, 5*time.Minute, "a", "b")
			if r.table() != before || r.planned() != plans || len(r.handovers()) > 0 {
				t.Fatalf("it does not come to rest: %d plans more\n%s\n%v", r.planned()-plans, r.table(), r.handovers())
			}
		})
	}
	t.Run("confirmed", func(t *testing.T) {
		turn(t, func(t *testing.T, r *replica, l *Liveness) {
			r.applied("a")
			beat(l, time.Second, "a", "b")
		})
	})
	t.Run("in time", func(t *testing.T) {
		turn(t, func(t *testing.T, r *replica, l *Liveness) {
			beat(l, 43*time.Second, "a", "b")
			r.expect("nearly 45 s later", "p", "there", "")
			beat(l, 2*time.Second, "a", "b")
		})
	})
}

// Goal: a sidecar that is given back what it was told to let go of has not confirmed that
// it does not hold the older table any more. a has heard of nothing since it handed over
// to b, and b is not told to hand over to a meanwhile, whatever else is planned.
func TestTurnedRoundTwice(t *testing.T) {
	r := newReplica(t, router.Options{})
	r.register("a", "here:transform", "near:sink")
	r.register("b", "there:transform", "far:sink")
	r.putPipeline("p", "here:transform -> far:sink")
	r.inBubble(func(t *testing.T, l *Liveness) {
		r.setLeading(true)
		beat(l, 2*time.Minute, "a", "b")
		r.putPipeline("p", "there:transform -> near:sink")
		beat(l, time.Second, "a", "b")
		r.putPipeline("p", "there:transform -> here:transform -> near:sink")
		beat(l, time.Second, "a", "b")
		r.register("z", "other:sink")
		beat(l, time.Second, "a", "b", "z")
		r.expect("until a has heard", "p", "there", "")
		if q, _ := r.placer.Scores(); q.Quality.Placed+q.Quality.Pending != 3 || q.Quality.Pending == 0 {
			t.Fatalf("of three stages %d are placed and %d pending", q.Quality.Placed, q.Quality.Pending)
		}
		beat(l, time.Minute, "a", "b", "z")
		r.expect("then", "p", "there", "b")
	})
}
