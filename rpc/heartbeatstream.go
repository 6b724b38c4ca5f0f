package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// sidecarStream is one stream of heartbeats, of a sidecar or of an agent that
// speaks for several. Two goroutines share it. One receives: it renews leases and
// never waits for anything but the next message. The other, that of the handler,
// answers, and only it reads much of the state or waits for a quorum. Between
// them there is the set of members about which there is something to say, each
// once, so that a client which does not read costs no more than its members.
type sidecarStream struct {
	api    *sidecarAPI
	stream sidecarpb.SidecarCoordinator_StreamHeartbeatsServer
	ended  chan error // how receiving ended; nil for the client's own end
	bell   bell       // something is pending

	// sending is when the send that is under way was begun, in Unix ns of
	// ServerConfig.Now; 0 when there is none.
	sending atomic.Int64

	// lags: this node does, and was waited for in vain in this round of answers. Of
	// the answering goroutine.
	lags bool

	// Of the receiving goroutine.
	ids   []string
	again []*streamMember

	// mu comes after that of toldSidecars.
	mu      sync.Mutex
	members []*streamMember // by number; nil = none
	pending []*streamMember
	closed  bool
}

// streamMember is one sidecar that beats on a stream.
type streamMember struct {
	stream           *sidecarStream
	number           uint32
	id, registration string
	watches          bool
	fault            string // why it cannot be introduced; "" = nothing is wrong

	// displaced: it was introduced on another stream since, where it beats now.
	displaced atomic.Bool
	// entry is what it was told, nil until it is introduced and while it is
	// refused. Guarded by toldSidecars.mu.
	entry *told

	// Guarded by stream.mu.
	due  memberDue
	news *sidecarpb.SidecarHeartbeatRequest // what it said and nobody has looked at yet
	// claim is what it said last to have applied, until that is looked at, and again
	// while this node does not have that state yet.
	claim appliedClaim
	left  bool
}

// memberDue is what there may be to say to a member.
type memberDue uint8

const (
	dueJudge     memberDue = 1 << iota // whether its heartbeats count, and all it has to run
	dueBeat                            // with dueJudge: a heartbeat waits for that
	dueChanges                         // what it has to run has changed
	dueLost                            // its lease has run out
	dueDisplaced                       // it beats on another stream
	dueNews                            // nothing: it said something
	dueCheck                           // it may be registered no more, and with that dueChanges
	dueClaim                           // nothing: what it said before can be judged now
)

func (m *streamMember) judgeAgain() { m.stream.due(m, dueJudge, nil) }
func (m *streamMember) check()      { m.stream.due(m, dueCheck, nil) }
func (m *streamMember) leaseLost()  { m.stream.due(m, dueLost, nil) }

func (m *streamMember) changed() {
	if !m.watches {
		m.stream.due(m, dueChanges, nil)
	}
}

func (m *streamMember) hasLeft() bool {
	m.stream.mu.Lock()
	defer m.stream.mu.Unlock()
	return m.left
}

func (m *streamMember) displace() {
	m.displaced.Store(true)
	m.stream.due(m, dueDisplaced, nil)
}

// StreamHeartbeats takes the heartbeats of sidecars that are introduced once and
// then known by a number. A heartbeat does what one of Heartbeat does. Answers go
// out when there is something to say: that a sidecar was introduced, or why not;
// changes of what it has to run; that its lease was lost. They are not repeated,
// for what a stream carries arrives or the stream ends, and whoever is introduced
// on the next one is told everything.
func (a *sidecarAPI) StreamHeartbeats(stream sidecarpb.SidecarCoordinator_StreamHeartbeatsServer) error {
	closeWatch, err := a.openWatch()
	if err != nil {
		return err
	}
	defer closeWatch()
	s := &sidecarStream{api: a, stream: stream, ended: make(chan error, 1), bell: newBell()}
	defer s.close()
	go func() { s.ended <- s.receive() }()
	ctx := stream.Context()
	q, ok := ctx.(*quietContext)
	if !ok { // nothing but ctx ends it
		q = &quietContext{ctx, context.Background()}
	}
	return s.answer(q)
}

// receive takes heartbeats until the client sends no more.
func (s *sidecarStream) receive() (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.api.panicked(sidecarpb.SidecarCoordinator_StreamHeartbeats_FullMethodName, p)
		}
	}()
	req := new(sidecarpb.HeartbeatStreamRequest)
	for {
		if err := s.stream.RecvMsg(req); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		take := func() error { return s.take(req) }
		if len(req.GetFull()) > 0 {
			err = aside(take) // it reads the state
		} else {
			err = take()
		}
		if err != nil {
			return err
		}
	}
}

// aside runs do on a goroutine of its own and waits for it. A stack that has grown
// is kept by whoever grew it, and the two goroutines of a stream live as long as
// that does: with 100,000 streams their stacks are most of its memory.
func aside(do func() error) (err error) {
	j := &pushJob{do: func() { err = do() }, done: make(chan struct{})}
	go j.run()
	<-j.done
	if j.panicked != nil {
		panic(j.panicked)
	}
	return err
}

// take takes one message.
func (s *sidecarStream) take(req *sidecarpb.HeartbeatStreamRequest) error {
	if s.api.health.leaderless.Load() {
		// Nobody hears of these heartbeats, and another node may well have a leader.
		return retryAfter{
			fmt.Errorf("%w: heartbeats that reach this node are heard by nobody; connect to another one", raftnode.ErrNoLeader),
			reconnectAfter(s.api.watches.Load()),
		}
	}
	if n := max(len(req.GetFull()), len(req.GetAlive()), len(req.GetLeave())); n > MaxStreamedSidecars {
		return invalid("alive", "%d sidecars in one message, the limit is %d", n, MaxStreamedSidecars)
	}
	for _, number := range req.GetLeave() {
		s.put(number, nil)
	}
	for _, f := range req.GetFull() {
		if err := s.full(f); err != nil {
			return err
		}
	}
	return s.alive(req.GetAlive())
}

// full takes a heartbeat in full.
func (s *sidecarStream) full(f *sidecarpb.StreamedHeartbeat) error {
	number, req := f.GetNumber(), f.GetHeartbeat()
	if number >= MaxStreamedSidecars {
		return invalid("full.number", "%d is too large, a stream has numbers below %d; open another stream", number, MaxStreamedSidecars)
	}
	if req == nil {
		return invalid("full.heartbeat", "is missing")
	}
	fault := ""
	if err := checkHeartbeat(req); err != nil {
		// Only this one is at fault: the stream may carry thousands of others.
		fault = Status(err).Message()
		// What is wrong with it may be its size, and it is kept as long as its number.
		req = &sidecarpb.SidecarHeartbeatRequest{}
	}
	m := s.member(number)
	same := m != nil && fault == "" && m.fault == "" && !m.displaced.Load() &&
		m.id == req.SidecarId && m.registration == req.RegistrationId && m.watches == f.Watches
	if same {
		s.due(m, dueNews, req)
		return s.alive([]uint32{number})
	}
	m = &streamMember{
		stream: s, number: number, id: req.SidecarId, registration: req.RegistrationId, watches: f.Watches, fault: fault,
	}
	if !s.put(number, m) {
		return retryAfter{
			fmt.Errorf("%w: this node already takes the heartbeats of %d sidecars on streams; connect to another node", raftnode.ErrBusy, s.api.cfg.MaxTold),
			reconnectAfter(s.api.cfg.MaxWatches),
		}
	}
	s.judge(m, req)
	return nil
}

// alive takes heartbeats that say nothing new.
func (s *sidecarStream) alive(numbers []uint32) error {
	if !s.isRead() {
		return nil
	}
	t, now := s.api.told, s.api.cfg.Now()
	s.ids, s.again = s.ids[:0], s.again[:0]
	t.mu.Lock()
	for _, number := range numbers {
		m := s.member(number)
		switch {
		case m == nil:
			t.mu.Unlock()
			return invalid("alive", "no sidecar was introduced on this stream as number %d", number)
		case m.displaced.Load(), m.fault != "":
		case m.entry == nil, m.entry.gone:
			s.again = append(s.again, m)
		default:
			m.entry.heard = now
			s.ids = append(s.ids, m.id)
		}
	}
	t.mu.Unlock()
	if len(s.ids) > 0 {
		s.api.cfg.Beats.TouchSidecars(s.ids)
	}
	for _, m := range s.again {
		s.judge(m, nil)
	}
	return nil
}

// isRead says whether the client still reads what it is told. One that does not,
// for longer than a lease, runs what it should no longer run, and is not alive in
// the sense that matters: its leases run out.
func (s *sidecarStream) isRead() bool {
	since := s.sending.Load()
	return since == 0 || s.api.cfg.Now().Sub(time.Unix(0, since)) < s.api.cfg.SidecarTTL
}

// judge lets a heartbeat of a sidecar that is not introduced, or no longer, be
// judged. It counts already when this node knows nothing against it: the
// judgement waits for a quorum, and this may be the time in which there is none.
func (s *sidecarStream) judge(m *streamMember, news *sidecarpb.SidecarHeartbeatRequest) {
	what := dueJudge | dueBeat
	if m.fault == "" && s.isRead() && s.api.rivals.find(s.stream.Context(), m.id, s.api.cfg.Now()) == "" {
		sc, err := s.api.localSidecar(m.id)
		if err == nil && beatRefusal(sc, m.id, m.registration) == "" {
			s.api.cfg.Beats.Touch(m.id, "")
			what = dueJudge
		}
	}
	s.due(m, what, news)
}

// beatRefusal says why a heartbeat for a registration of sidecar id, "" for any, does
// not count when sc is the record of the sidecar; "" when it does.
func beatRefusal(sc *commandpb.Sidecar, id, registration string) string {
	switch {
	case sc == nil:
		return unknownSidecar(id)
	case registration == "":
		return ""
	}
	return replacedRegistration(sc, registration)
}

// member returns the sidecar with a number, nil without one. Only the receiving
// goroutine changes the table, and only that calls member.
func (s *sidecarStream) member(number uint32) *streamMember {
	if int(number) >= len(s.members) {
		return nil
	}
	return s.members[number]
}

// put gives a number to m, or to nobody when that is nil, and lets go of the one
// that had it. It returns false when the node has no room for one more.
func (s *sidecarStream) put(number uint32, m *streamMember) bool {
	old := s.member(number)
	if old == nil && m == nil {
		return true
	}
	if old == nil && s.api.streamed.Add(1) > int64(s.api.cfg.MaxTold) {
		s.api.streamed.Add(-1)
		return false
	}
	s.mu.Lock()
	if s.closed {
		if old == nil {
			s.api.streamed.Add(-1)
		}
		s.mu.Unlock()
		return true // what is received after the end counts for nothing
	}
	for int(number) >= len(s.members) {
		s.members = append(s.members, nil)
	}
	s.members[number] = m
	if old != nil {
		old.left = true
	}
	s.mu.Unlock()
	if old != nil {
		s.api.told.detach(old)
		if m == nil {
			s.api.streamed.Add(-1)
		}
	}
	return true
}

// due notes that there may be something to say to m. Of what it said itself only
// the newest is kept.
func (s *sidecarStream) due(m *streamMember, what memberDue, news *sidecarpb.SidecarHeartbeatRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dueLocked(m, what, news)
}

func (s *sidecarStream) dueLocked(m *streamMember, what memberDue, news *sidecarpb.SidecarHeartbeatRequest) {
	if s.closed || m.left {
		return
	}
	if m.due == 0 {
		s.pending = append(s.pending, m)
	}
	m.due |= what
	if news != nil {
		if len(news.ServiceHealth) == 0 && m.news != nil {
			news.ServiceHealth = m.news.ServiceHealth
		}
		m.news = news
		if c := claimOf(news); c.revision > 0 {
			m.claim = c
		}
	}
	s.bell.ring()
}

// close lets go of all members; their leases go on.
func (s *sidecarStream) close() {
	s.mu.Lock()
	s.closed = true
	members := s.members
	s.pending = nil
	s.mu.Unlock()
	s.api.unheard.remove(s)
	n := int64(0)
	for _, m := range members {
		if m != nil {
			s.api.told.detach(m)
			n++
		}
	}
	s.api.streamed.Add(-n)
}
