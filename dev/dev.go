package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// readyWithin bounds the wait for a first leader and for all stages to have a
// place. It is generous: a slow disk shall not make the demonstration fail.
const readyWithin = 60 * time.Second

// Run runs a cluster until ctx is done, then stops it in order and returns. It
// returns earlier, with an error, when the cluster cannot be brought up.
func Run(ctx context.Context, o Options) error {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return err
	}
	_, _, terminal := o.Size()
	ev := newEvents(nil)
	if !terminal {
		ev.line = func(e event) { printLine(o.Out, e.at, e.text) }
	}
	ob, err := newObserver(&o, ev)
	if err != nil {
		return err
	}
	defer ob.close()

	// Two lives: clients (sidecars, observer, picture) end before the nodes do,
	// so that they do not report the stop as a failure.
	clients, endClients := context.WithCancel(ctx)
	defer endClients()
	nodes, err := startNodes(&o, ev)
	if err != nil {
		return err
	}
	defer nodes.Stop()
	ob.pid = nodes.pid
	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	var running sync.WaitGroup
	running.Go(func() { ob.run(clients) })
	sidecars := demoSidecars(&o, ev)
	registered := make(chan struct{}, len(sidecars))
	for _, s := range sidecars {
		running.Go(func() {
			if err := s.run(clients, o.endpoints(), func() { registered <- struct{}{} }); err != nil {
				fail(err)
			}
		})
	}
	pic := &picture{o: &o, nodes: nodes.nodes, sidecars: sidecars, observer: ob, events: ev}
	if terminal {
		running.Go(func() { show(clients, pic) })
	}
	running.Go(func() { silencer(clients, &o, sidecars) })
	running.Go(func() {
		if err := bringUp(clients, &o, ob, registered, len(sidecars)); err != nil {
			if clients.Err() == nil {
				fail(err)
			}
			return
		}
		if !terminal {
			fmt.Fprintf(o.Out, "ready %s\n", strings.Join(o.endpoints(), " "))
			s := ob.scene()
			for _, h := range pic.hints(&s) {
				printLine(o.Out, time.Now(), strings.TrimRight("try: "+pad(h[0], 40)+h[1], " "))
			}
		}
		o.Started(o.endpoints())
	})

	err = nil
	select {
	case err = <-failed:
	case err = <-nodes.Failed():
	case <-ctx.Done():
	}
	endClients()
	running.Wait()
	if terminal {
		fmt.Fprint(o.Out, "\r\nStopping the nodes.\r\n")
	} else {
		ev.add("stopping the nodes")
	}
	nodes.Stop()
	if err == nil && !terminal {
		ev.add("all nodes have stopped; their data stays in %s", o.DataDir)
	}
	return err
}

func printLine(w io.Writer, at time.Time, text string) {
	fmt.Fprintf(w, "%s %s\n", at.Format("15:04:05.000"), text)
}

// bringUp applies the pipelines and waits until everything runs.
func bringUp(ctx context.Context, o *Options, ob *observer, registered <-chan struct{}, sidecars int) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	admin := adminpb.NewRouterAdminClient(ob.any)
	for _, p := range o.Pipelines {
		for {
			reply, err := admin.CreatePipeline(ctx, &adminpb.CreatePipelineRequest{Config: p}, grpc.WaitForReady(true))
			if err == nil && reply.GetSuccess() {
				break
			}
			if err == nil {
				return fmt.Errorf("pipeline %s was refused: %s %s", p.GetId(), reply.GetError(), strings.Join(reply.GetViolations(), "; "))
			}
			if !pause(ctx, 200*time.Millisecond) {
				return notUp(ctx, fmt.Errorf("pipeline %s could not be applied: %w", p.GetId(), err))
			}
		}
	}
	for range sidecars {
		select {
		case <-registered:
		case <-ctx.Done():
			return notUp(ctx, errors.New("not all demo sidecars could register"))
		}
	}
	for {
		if s := ob.scene(); s.leader != 0 && s.placed(o.Pipelines) {
			return nil
		}
		if !pause(ctx, 50*time.Millisecond) {
			return notUp(ctx, errors.New("not all stages were assigned"))
		}
	}
}

func notUp(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("the cluster was not up within %v: %w; the logs of the nodes say more", readyWithin, err)
	}
	return err
}

// silencer cuts off the first sidecar that runs transforms, and reconnects it.
func silencer(ctx context.Context, o *Options, sidecars []*sidecar) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.Silence:
		}
		for _, s := range sidecars {
			if strings.Contains(s.id, "work") || len(sidecars) == 1 {
				s.silence()
				break
			}
		}
	}
}

// show redraws the picture when something happened, and a few times a second
// for what only counts.
func show(ctx context.Context, p *picture) {
	fmt.Fprint(p.o.Out, "\x1b[?25l\x1b[2J")
	defer fmt.Fprint(p.o.Out, "\x1b[?25h")
	for {
		columns, rows, _ := p.o.Size()
		fmt.Fprint(p.o.Out, p.draw(columns, rows, time.Now()))
		wait := time.NewTimer(300 * time.Millisecond)
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-wait.C:
		case <-p.events.changed:
			wait.Stop()
			if !pause(ctx, 50*time.Millisecond) { // many events, one drawing
				return
			}
		}
	}
}
