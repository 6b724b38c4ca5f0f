package control

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// spent is how much processor time this process has had.
func spent(b testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Skip(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// bigFleet registers sidecars and applies pipelines as bench/fleet does: pipeline
// k is served by the sidecars i with i modulo pipelines = k, half of which offer all
// three of its services and the others two, and every sidecar offers a source
// and a sink besides for one pipeline that all of them run.
func bigFleet(b testing.TB, o router.Options, sidecars, pipelines, parallelism int) *replica {
	b.Helper()
	o.Bootstrap = router.Position{Index: 1, Term: 1}
	fsm, err := router.Open(vfs.NewMem(), "state", o)
	if err != nil {
		b.Fatal(err)
	}
	r := &replica{fsm: fsm}
	r.enter()
	for i := range sidecars {
		s := &commandpb.Sidecar{SidecarId: fmt.Sprintf("fleet/pod-%06d", i), Endpoint: fmt.Sprintf("10.1.%d.%d:50053", i>>8&255, i&255)}
		add := func(name string, t commandpb.ServiceType) {
			s.Services = append(s.Services, &commandpb.LocalService{Name: name, Type: t, Endpoint: fmt.Sprintf("127.0.0.1:%d", 50100+len(s.Services))})
		}
		add(fmt.Sprintf("source-%d", i%pipelines), commandpb.ServiceType_SERVICE_TYPE_SOURCE)
		add(fmt.Sprintf("transform-%d", i%pipelines), commandpb.ServiceType_SERVICE_TYPE_TRANSFORM)
		if i/pipelines%2 == 0 {
			add(fmt.Sprintf("sink-%d", i%pipelines), commandpb.ServiceType_SERVICE_TYPE_SINK)
		}
		add("wide-source", commandpb.ServiceType_SERVICE_TYPE_SOURCE)
		add("wide-sink", commandpb.ServiceType_SERVICE_TYPE_SINK)
		r.must(b, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{Sidecar: s}}})
	}
	for k := range pipelines {
		r.chain(b, fmt.Sprintf("fleet/pipeline-%06d", k), "", parallelism, fmt.Sprintf("source-%d", k), fmt.Sprintf("transform-%d", k), fmt.Sprintf("sink-%d", k))
	}
	return r
}

func (r *replica) must(b testing.TB, cmd *commandpb.Command) {
	b.Helper()
	if res, err := r.apply(cmd); err != nil || res.GetRejection() != nil {
		b.Fatal(err, res)
	}
}

// chain applies a pipeline of one stage per service, sources first and a sink
// last.
func (r *replica) chain(b testing.TB, id, form string, parallelism int, services ...string) {
	b.Helper()
	p := &commandpb.PipelineSpec{Id: id, Name: id, Enabled: true}
	for k, name := range services {
		st := &commandpb.Stage{
			Id: fmt.Sprintf("stage-%d%s", k, form), Name: name, Type: commandpb.StageType_STAGE_TYPE_TRANSFORM, Parallelism: uint32(parallelism),
			Selector: &commandpb.ServiceSelector{ServiceName: name},
		}
		if k == 0 {
			st.Type = commandpb.StageType_STAGE_TYPE_SOURCE
		} else {
			if k == len(services)-1 {
				st.Type = commandpb.StageType_STAGE_TYPE_SINK
			}
			p.Edges = append(p.Edges, &commandpb.Edge{FromStage: p.Stages[k-1].Id, ToStage: st.Id})
		}
		p.Stages = append(p.Stages, st)
	}
	r.must(b, &commandpb.Command{Op: &commandpb.Command_PutPipeline{PutPipeline: &commandpb.PutPipeline{Spec: p}}})
}

// turn lets sidecar i be found in another condition.
func (r *replica) turn(b testing.TB, i int, to commandpb.SidecarState) {
	b.Helper()
	r.must(b, &commandpb.Command{Op: &commandpb.Command_TransitionSidecar{TransitionSidecar: &commandpb.TransitionSidecar{
		SidecarId: fmt.Sprintf("fleet/pod-%06d", i), State: to,
	}}})
}

// watched is a Placer without its loop, a step at a time.
type watched struct {
	*Placer
	m     *mirror
	sub   *router.Subscription
	waits *waits
	infos []PlanInfo
}

func watching(b testing.TB, r *replica) *watched {
	v := r.View()
	defer v.Close()
	m, err := newMirror(v)
	if err != nil {
		b.Fatal(err)
	}
	sub, err := r.Hub().Subscribe(m.revision, placementTables()...)
	if err != nil {
		b.Fatal(err)
	}
	w := &watched{m: m, sub: sub, waits: newWaits(m)}
	w.Placer = NewPlacer(PlacerConfig{Node: r, State: r, Submit: r, Quiet: time.Microsecond, Planned: func(i PlanInfo) { w.infos = append(w.infos, i) }})
	w.term, w.budget = 1, newBudget(1, time.Now())
	w.scores.reset()
	return w
}

// step takes over what has happened and plans until nothing is left to do.
func (w *watched) step(b testing.TB) (changes int) {
	b.Helper()
	w.infos = w.infos[:0]
	if _, err := w.plan(context.Background(), w.m, w.sub, w.waits); err != nil {
		b.Fatal(err)
	}
	for _, i := range w.infos {
		changes += i.Changes
		if i.Stale > 0 {
			b.Fatalf("%d stale", i.Stale)
		}
	}
	return changes
}

// BenchmarkWidePipeline makes, changes and removes one pipeline that all sidecars
// of a fleet run, besides 1,000 small ones, from the change in the state until
// all assignments are in the state: reading the changes, planning, encoding and
// applying. The log is left out.
func BenchmarkWidePipeline(b *testing.B) {
	for _, n := range []int{1000, 4000, 10_000} {
		b.Run(fmt.Sprintf("sidecars=%d", n), func(b *testing.B) {
			r := bigFleet(b, router.Options{}, n, min(1000, n/4), 1)
			defer r.fsm.Close()
			w := watching(b, r)
			w.step(b)
			figures := make(map[string]time.Duration)
			round := 0
			measure := func(what string, do func(), want int) {
				do()
				before := spent(b)
				if got := w.step(b); got < want {
					b.Fatalf("%s: %d changes", what, got)
				}
				figures[what] += spent(b) - before
				before = spent(b)
				w.step(b)
				figures["after-"+what] += spent(b) - before
			}
			for b.Loop() {
				round++
				put := func(form string) func() {
					return func() { r.chain(b, "fleet/wide", form, n, "wide-source", "wide-sink") }
				}
				measure("creation", put("a"), n)
				measure("change", put("b"), n)
				for _, to := range [...]commandpb.SidecarState{commandpb.SidecarState_SIDECAR_STATE_EXPIRED, commandpb.SidecarState_SIDECAR_STATE_ALIVE} {
					measure(strings.ToLower(to.String()[len("SIDECAR_STATE_"):]), func() { r.turn(b, 7, to) }, 1)
				}
				measure("deletion", func() {
					r.must(b, &commandpb.Command{Op: &commandpb.Command_DeletePipeline{DeletePipeline: &commandpb.DeletePipeline{PipelineId: "fleet/wide"}}})
				}, 0)
			}
			for what, d := range figures {
				b.ReportMetric(float64(d.Microseconds())/1000/float64(round), what+"-cpu-ms")
			}
		})
	}
}

// BenchmarkMassReassignment lets 10,000 of 100,000 sidecars expire, with no limit to
// how many may go at once, and measures from the first expiry in the state until
// all they ran has been given to others in the state. Leases, whose end
// BenchmarkMassExpiry measures, and the log are left out.
func BenchmarkMassReassignment(b *testing.B) {
	const fleet, lost, pipelines = 100_000, 10_000, 10_000
	r := bigFleet(b, router.Options{}, fleet, pipelines, 8)
	defer r.fsm.Close()
	w := watching(b, r)
	w.step(b)
	var expire, plan, after time.Duration
	changes, round := 0, 0
	turn := func(to commandpb.SidecarState) {
		for i := range lost {
			r.turn(b, i*fleet/lost+round%4, to)
		}
	}
	for b.Loop() {
		start := spent(b)
		turn(commandpb.SidecarState_SIDECAR_STATE_EXPIRED)
		expired := spent(b)
		changes += w.step(b)
		planned := spent(b)
		expire += expired - start
		plan += planned - expired
		w.step(b)
		after += spent(b) - planned
		b.StopTimer()
		turn(commandpb.SidecarState_SIDECAR_STATE_ALIVE)
		w.step(b)
		round++
		b.StartTimer()
	}
	per := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(round) }
	b.ReportMetric(per(expire), "expire-cpu-ms")
	b.ReportMetric(per(plan), "plan-and-apply-cpu-ms")
	b.ReportMetric(per(after), "again-cpu-ms")
	b.ReportMetric(float64(changes)/float64(round), "changes")
}
