package raftnode

import (
	"context"
	"errors"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/snap"
)

const simMaxNodes = 5

// simNet carries messages between the nodes and loses, delays, repeats and
// reorders them as the profile says.
type simNet struct {
	sim *sim
	// cut[a][b]: nothing gets from a to b.
	cut [simMaxNodes + 1][simMaxNodes + 1]bool
	// last is when the last message of a link arrives, for links that keep order.
	last [simMaxNodes + 1][simMaxNodes + 1]int64
}

// simTransport is the Transport of one node.
type simTransport struct {
	net  *simNet
	from *simNode
}

func (t *simTransport) Send(msgs []*raftpb.Message) {
	if t.from.doomed != "" {
		return
	}
	for _, m := range msgs {
		t.net.sim.oracle.promised(t.from, m)
		t.net.post(t.from, m)
	}
}

func (t *simTransport) SetMembers([]Member) {}

// post sends m on its way. What arrives is a copy: nodes share no memory.
func (w *simNet) post(from *simNode, m *raftpb.Message) {
	s := w.sim
	to := s.nodes[m.GetTo()-1]
	if w.cut[from.id][to.id] {
		s.stats.dropped++
		if s.rng.IntN(2) == 0 {
			from.node.ReportUnreachable(to.id)
		}
		return
	}
	if !s.calm && s.rng.IntN(1000) < s.prof.lossPermille {
		s.stats.dropped++
		s.event(nil, "lost    ", describe(m))
		return
	}
	if s.sab.garbleEntries && len(m.GetEntries()) > 1 && s.rng.IntN(20) == 0 {
		m = proto.CloneOf(m)
		m.Entries[0].Data = m.Entries[1].Data
	}
	if s.sab.forgeSender && m.GetType() == raftpb.MsgAppResp && from.id == 2 && m.GetTo() != 3 {
		forged := proto.CloneOf(m)
		forged.From = new(uint64(3))
		if b, err := proto.Marshal(forged); err == nil {
			w.arrive(3, to, b, s.latency())
		}
	}
	b, err := proto.Marshal(m)
	if err != nil {
		s.violate("failure", "a message cannot be encoded: %v", err)
		return
	}
	copies := 1
	if !s.calm && s.rng.IntN(1000) < s.prof.repeatPermille {
		copies = 2
	}
	for range copies {
		at := s.now + s.latency()
		if s.prof.ordered {
			at = max(at, w.last[from.id][to.id])
			w.last[from.id][to.id] = at
		}
		w.arrive(from.id, to, b, at-s.now)
	}
}

func (w *simNet) arrive(from uint64, to *simNode, b []byte, after int64) {
	s := w.sim
	s.at(nil, after, func() {
		if to.pausedUntil > s.now {
			w.arrive(from, to, b, to.pausedUntil-s.now)
			return
		}
		if to.node == nil || w.cut[from][to.id] {
			s.stats.dropped++
			return
		}
		m := &raftpb.Message{}
		if err := proto.Unmarshal(b, m); err != nil {
			s.violate("failure", "a message cannot be decoded: %v", err)
			return
		}
		s.event(to, "deliver ", describe(m))
		if err := to.node.Step(context.Background(), []*raftpb.Message{m}); err != nil {
			if hasSnapshot(m) && errors.Is(err, snap.ErrNotFound) {
				s.event(to, "the image is gone")
				return
			}
			s.violate("failure", "n%d refuses a message of a peer: %v", to.id, err)
		}
	})
}

var errSimNet = errors.New("the connection broke")

// SendImage copies the image chunk by chunk into the peer's store, then lets
// the peer have m. Connections break in between, and after the peer has it all
// but before the sender knows.
func (t *simTransport) SendImage(_ context.Context, m *raftpb.Message, image *snap.Reader) error {
	s := t.net.sim
	to := s.nodes[m.GetTo()-1]
	if to.node == nil || to.pausedUntil > s.now || t.net.cut[t.from.id][to.id] {
		t.from.node.ReportUnreachable(to.id)
		return errSimNet
	}
	err := errSimNet
	if !s.survives(func() { err = t.copyImage(to, image) }) {
		return errSimNet
	}
	if err != nil {
		return err
	}
	s.event(to, "has received", image.Info().ID, "for", describe(m))
	t.net.post(t.from, m)
	if s.broken() {
		return errSimNet
	}
	return nil
}

// broken says whether a connection breaks just now.
func (s *sim) broken() bool { return !s.calm && s.rng.IntN(1000) < 2*s.prof.lossPermille }

func (t *simTransport) copyImage(to *simNode, image *snap.Reader) error {
	s := t.net.sim
	r, err := to.node.Images().Receive(image.Info().ID, image.Size())
	if errors.Is(err, snap.ErrExists) {
		return nil
	}
	if err != nil {
		return err
	}
	for off := r.Offset(); off < image.Size(); {
		c, err := image.ReadChunk(off, 200+s.rng.IntN(1000))
		if err != nil {
			r.Close()
			return err
		}
		if err := r.Write(c); err != nil {
			r.Close()
			return err
		}
		off += int64(len(c.Data))
		if s.broken() {
			r.Close()
			return errSimNet
		}
	}
	_, err = r.Commit()
	return err
}
