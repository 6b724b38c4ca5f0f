package fleet

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// beatTimeout bounds one heartbeat. The sidecars in the field wait for ever; a
// worker that did would be missing for everybody else's.
const beatTimeout = 10 * time.Second

// dueChunk bounds how many heartbeats a worker takes at a time.
const dueChunk = 16

// startBeats turns the wheel and starts the workers.
func (f *Fleet) startBeats() {
	f.running.Go(f.turn)
	for range f.c.Workers {
		f.running.Go(func() {
			for {
				select {
				case <-f.ctx.Done():
					return
				case chunk := <-f.due:
					for _, i := range chunk {
						if k := int(i) - len(f.sidecars); k >= 0 {
							f.carriers[k].beat()
						} else {
							f.beat(int(i))
						}
					}
				}
			}
		})
	}
}

// turn hands out what is due. While all workers are busy it waits, and what is
// due meanwhile is late: the tally shows by how much.
func (f *Fleet) turn() {
	start := time.Now()
	tick := time.NewTicker(wheelTick)
	defer tick.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-tick.C:
		}
		since := time.Since(start)
		due := f.wheel.advance(since, nil)
		for len(due) > 0 {
			n := min(dueChunk, len(due))
			select {
			case f.due <- due[:n:n]:
			case <-f.ctx.Done():
				return
			}
			due = due[n:]
		}
		f.tally.late(time.Since(start) - since)
	}
}

// beat sends one heartbeat and does what the answer says.
func (f *Fleet) beat(i int) {
	s := &f.sidecars[i]
	s.mu.Lock()
	up, life := s.up, s.life
	req := &sidecarpb.SidecarHeartbeatRequest{SidecarId: sidecarID(i)}
	if s.view != nil && s.view.synced {
		req.AppliedRevision, req.AppliedEpoch = s.view.revision, s.view.epoch
	}
	s.mu.Unlock()
	if !up || f.ctx.Err() != nil {
		return
	}
	f.wheel.add(i, f.every()) // whatever comes of it, the next is due then
	began := time.Now()
	ctx, cancel := context.WithTimeout(f.ctx, beatTimeout)
	reply, err := f.pool.sidecars(i).Heartbeat(ctx, req, grpc.WaitForReady(true))
	cancel()
	if f.ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.up || s.life != life {
		return // it was stopped meanwhile; nobody is there to hear the answer
	}
	f.tally.beat(time.Since(began), err, reply.GetAcknowledged())
	if err != nil || !reply.GetAcknowledged() {
		return
	}
	f.obey(i, reply)
}

// obey does what an answer to a heartbeat of sidecar i says. The caller holds its
// mu.
func (f *Fleet) obey(i int, reply *sidecarpb.HeartbeatResponse) {
	s := &f.sidecars[i]
	if f.c.Heartbeat == 0 && reply.GetHeartbeatIntervalMs() > 0 {
		f.interval.Store(int64(time.Duration(reply.GetHeartbeatIntervalMs()) * time.Millisecond))
	}
	if s.view != nil {
		return // the watch tells it
	}
	for _, cmd := range reply.GetCommands() {
		switch c := cmd.GetCommand().(type) {
		case *sidecarpb.SidecarCommand_Assign:
			f.tally.assigned()
			if err := s.hold(c.Assign); err != nil {
				f.tally.fault("%s was told what cannot be read: %v", sidecarID(i), err)
			}
		case *sidecarpb.SidecarCommand_Revoke:
			delete(s.held, c.Revoke.GetPipelineId())
		}
	}
}
