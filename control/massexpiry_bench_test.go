package control

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// BenchmarkMassExpiry measures how long it takes, with no limit to how many may go
// at once, from the end of 10,000 leases until the last of their expiries is
// applied to a state. Each is an entry of its own here; a log gathers them.
func BenchmarkMassExpiry(b *testing.B) {
	const fleet = 10_000
	for b.Loop() {
		b.StopTimer()
		fsm, err := router.Open(vfs.NewMem(), "state", router.Options{Bootstrap: router.Position{Index: 1, Term: 1}})
		if err != nil {
			b.Fatal(err)
		}
		r := &replica{fsm: fsm}
		r.enter()
		for i := range fleet {
			res, err := r.apply(&commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{
				Sidecar: newModel().putSidecar(fmt.Sprintf("sidecar-%06d", i), "orders:source"),
			}}})
			if err != nil || res.GetRejection() != nil {
				b.Fatal(err, res)
			}
		}
		gone := make(chan struct{})
		left := fleet
		var mu sync.Mutex
		l, err := NewLiveness(LivenessConfig{
			Node: r, State: r, Submit: r, MassFraction: 1,
			SuspectAfter: time.Second, ExpireAfter: 3 * time.Second,
			Transitioned: func(i TransitionInfo) {
				mu.Lock()
				defer mu.Unlock()
				if i.To == "expired" {
					if left--; left == 0 {
						close(gone)
					}
				}
			},
		})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		var loop sync.WaitGroup
		loop.Go(func() { l.Run(ctx) })
		r.setLeading(true)
		due := time.NewTimer(3 * time.Second)
		<-due.C
		b.StartTimer()
		<-gone
		b.StopTimer()
		cancel()
		loop.Wait()
		if err := fsm.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
