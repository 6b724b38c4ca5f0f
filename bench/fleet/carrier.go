package fleet

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// How heartbeats travel.
const (
	BeatsUnary  = "unary"  // one call each, as the sidecars in the field do
	BeatsStream = "stream" // over streams, each of one sidecar or of an agent's
	BeatsMixed  = "mixed"  // every other stream's sidecars by calls instead
)

// BeatKinds lists what Config.Beats may say.
var BeatKinds = []string{BeatsUnary, BeatsStream, BeatsMixed}

// carrier is one heartbeat stream and the sidecars that share it, as those of one
// machine share its agent.
type carrier struct {
	f       *Fleet
	index   int
	members []int // indexes of sidecars, by their number on the stream

	mu      sync.Mutex
	running bool
	stream  sidecarpb.SidecarCoordinator_StreamHeartbeatsClient // nil while there is none
	said    []said                                              // by number, on this stream
}

// said is what a member of a stream has said on it.
type said struct {
	introduced      bool
	revision, epoch uint64
}

// carriersOf spreads the sidecars over streams; by sidecar the carrier is nil when
// it beats by calls.
func carriersOf(f *Fleet) (all []*carrier, by []*carrier) {
	by = make([]*carrier, f.c.Sidecars)
	if f.c.Beats == BeatsUnary {
		return nil, by
	}
	conns := f.c.Connections
	groups := (f.c.Sidecars + conns - 1) / conns // of sidecars on one connection, the largest
	for chunk := 0; chunk*f.c.PerStream < groups; chunk++ {
		if f.c.Beats == BeatsMixed && chunk%2 == 1 {
			continue
		}
		for conn := range conns {
			k := &carrier{f: f, index: len(all)}
			for n := range f.c.PerStream {
				if i := (chunk*f.c.PerStream+n)*conns + conn; i < f.c.Sidecars {
					k.members = append(k.members, i)
					by[i] = k
				}
			}
			if len(k.members) > 0 {
				k.said = make([]said, len(k.members))
				all = append(all, k)
			}
		}
	}
	return all, by
}

// startBeating begins the heartbeats of sidecar i. Not those of all at once, as
// they do not start at once.
func (f *Fleet) startBeating(i int) {
	if k := f.carriedBy[i]; k != nil {
		k.start()
		return
	}
	f.wheel.add(i, rand.N(f.every()))
}

// stopBeating lets go of what a stream holds of sidecar i, which is down.
func (f *Fleet) stopBeating(i int) {
	if k := f.carriedBy[i]; k != nil {
		k.leave(i)
	}
}

// start opens the stream unless there is one, and beats for whoever is up.
func (k *carrier) start() {
	k.mu.Lock()
	running := k.running
	k.running = true
	k.mu.Unlock()
	if !running {
		k.f.running.Go(k.run)
		return
	}
	k.beat()
}

// run keeps a stream open until the fleet ends.
func (k *carrier) run() {
	f := k.f
	for wait := 50 * time.Millisecond; f.ctx.Err() == nil; {
		answered, err := k.follow()
		if f.ctx.Err() != nil {
			return
		}
		f.tally.beatStreamEnded(err)
		if answered {
			wait = 50 * time.Millisecond
		}
		d := wait + rand.N(wait)
		if asked, ok := retryDelay(err); ok {
			d = asked
		}
		if !pause(f.ctx, d) {
			return
		}
		wait = min(2*wait, 2*time.Second)
	}
}

// follow opens a stream and does what its answers say, to its end. It says
// whether there was any.
func (k *carrier) follow() (answered bool, err error) {
	ctx, cancel := context.WithCancel(k.f.ctx)
	defer cancel()
	stream, err := k.f.pool.sidecars(k.members[0]).StreamHeartbeats(ctx, grpc.WaitForReady(true))
	if err != nil {
		return false, err
	}
	k.mu.Lock()
	k.stream = stream
	clear(k.said)
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		k.stream = nil
		k.mu.Unlock()
	}()
	k.beat()
	for {
		resp, err := stream.Recv()
		if err != nil {
			return answered, err
		}
		answered = true
		for _, a := range resp.GetAnswers() {
			if int(a.GetNumber()) >= len(k.members) {
				k.f.tally.fault("an answer to number %d of a stream of %d", a.GetNumber(), len(k.members))
				continue
			}
			k.f.answered(k.members[a.GetNumber()], a.GetResponse())
		}
	}
}

// answered does what an answer on a stream says to sidecar i.
func (f *Fleet) answered(i int, r *sidecarpb.HeartbeatResponse) {
	s := &f.sidecars[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.up {
		return
	}
	f.tally.answered(r.GetAcknowledged(), r.GetReason())
	if r.GetAcknowledged() {
		f.obey(i, r)
	}
}

// beat sends one heartbeat of each member that is up, as one message.
func (k *carrier) beat() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.stream == nil || k.f.ctx.Err() != nil {
		return
	}
	req := &sidecarpb.HeartbeatStreamRequest{}
	for n, i := range k.members {
		s := &k.f.sidecars[i]
		s.mu.Lock()
		up, now := s.up, said{introduced: true}
		watches := s.view != nil
		if watches && s.view.synced {
			now.revision, now.epoch = s.view.revision, s.view.epoch
		}
		s.mu.Unlock()
		switch {
		case !up:
		case k.said[n] == now:
			req.Alive = append(req.Alive, uint32(n))
		default:
			k.said[n] = now
			req.Full = append(req.Full, &sidecarpb.StreamedHeartbeat{
				Number: uint32(n), Watches: watches,
				Heartbeat: &sidecarpb.SidecarHeartbeatRequest{
					SidecarId: sidecarID(i), AppliedRevision: now.revision, AppliedEpoch: now.epoch,
				},
			})
		}
	}
	if n := len(req.Alive) + len(req.Full); n > 0 && k.stream.Send(req) == nil { // why not is what Recv says
		k.f.tally.streamed(n)
	}
	k.f.wheel.add(len(k.f.sidecars)+k.index, k.f.varied())
}

// leave takes sidecar i off the stream.
func (k *carrier) leave(i int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for n, m := range k.members {
		if m == i && k.said[n].introduced {
			k.said[n] = said{}
			if k.stream != nil {
				_ = k.stream.Send(&sidecarpb.HeartbeatStreamRequest{Leave: []uint32{uint32(n)}}) // Recv says why
			}
		}
	}
}

// varied is every, a tenth more or less: on a stream that is up to the client.
func (f *Fleet) varied() time.Duration {
	d := f.every()
	return min(d-d/10+rand.N(d/5+1), wheelSpan)
}

// checkBeats returns what is wrong with how heartbeats are to travel.
func (c *Config) checkBeats() (faults []error) {
	known := false
	for _, k := range BeatKinds {
		known = known || k == c.Beats
	}
	if !known {
		faults = append(faults, fmt.Errorf("fleet: unknown kind of heartbeats %q, known are %v", c.Beats, BeatKinds))
	}
	if c.PerStream < 1 || c.PerStream > maxPerStream {
		faults = append(faults, fmt.Errorf("fleet: %d sidecars on a heartbeat stream; from 1 to %d are possible", c.PerStream, maxPerStream))
	}
	return faults
}

// streams is how many heartbeat streams there will be.
func (c *Config) streams() int {
	n := (c.Sidecars + max(1, c.PerStream) - 1) / max(1, c.PerStream)
	switch c.Beats {
	case BeatsStream:
		return n
	case BeatsMixed:
		return n/2 + 1
	}
	return 0
}
