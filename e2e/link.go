package e2e

import (
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// quickReconnect keeps a test client from waiting out gRPC's default back-off
// of many seconds after a node was down.
var quickReconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
	MinConnectTimeout: time.Second,
}

// Link is a TCP proxy that carries one node's connections to one peer.
type Link struct {
	target string
	lis    net.Listener

	mu     sync.Mutex
	open   *sync.Cond // signalled when mode changes
	mode   linkMode
	delay  time.Duration
	conns  map[net.Conn]struct{}
	closed bool
	wg     sync.WaitGroup
}

type linkMode int

const (
	linkUp     linkMode = iota
	linkCut             // connections are refused and existing ones reset
	linkSilent          // bytes are held back; nobody is told
)

func newLink(t testing.TB, target string) *Link {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &Link{target: target, lis: lis, conns: map[net.Conn]struct{}{}}
	l.open = sync.NewCond(&l.mu)
	l.wg.Add(1)
	go l.accept()
	return l
}

// Addr is where the sending node connects to.
func (l *Link) Addr() string { return l.lis.Addr().String() }

// Cut resets the connections and refuses new ones, as a host that is gone.
func (l *Link) Cut() { l.set(linkCut) }

// Silence holds all bytes back without closing anything, as a network that
// drops packets.
func (l *Link) Silence() { l.set(linkSilent) }

// Heal lets everything pass again, held bytes included.
func (l *Link) Heal() { l.set(linkUp) }

// Delay holds each chunk of bytes back for d in each direction.
func (l *Link) Delay(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

func (l *Link) set(m linkMode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = m
	if m == linkCut {
		for c := range l.conns {
			c.Close()
		}
	}
	l.open.Broadcast()
}

// Close ends the link for good and waits for its goroutines.
func (l *Link) Close() {
	l.mu.Lock()
	l.closed = true
	for c := range l.conns {
		c.Close()
	}
	l.open.Broadcast()
	l.mu.Unlock()
	l.lis.Close()
	l.wg.Wait()
}

func (l *Link) accept() {
	defer l.wg.Done()
	for {
		in, err := l.lis.Accept()
		if err != nil {
			return
		}
		l.mu.Lock()
		refused := l.closed || l.mode == linkCut
		l.mu.Unlock()
		if refused {
			in.Close()
			continue
		}
		out, err := net.DialTimeout("tcp", l.target, time.Second)
		if err != nil {
			in.Close()
			continue
		}
		l.mu.Lock()
		if l.closed || l.mode == linkCut {
			l.mu.Unlock()
			in.Close()
			out.Close()
			continue
		}
		l.conns[in], l.conns[out] = struct{}{}, struct{}{}
		l.mu.Unlock()
		l.wg.Add(2)
		go l.carry(in, out)
		go l.carry(out, in)
	}
}

func (l *Link) carry(from, to net.Conn) {
	defer l.wg.Done()
	defer func() {
		from.Close()
		to.Close()
		l.mu.Lock()
		delete(l.conns, from)
		delete(l.conns, to)
		l.mu.Unlock()
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !l.pass() {
				return
			}
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass waits until the link lets bytes through; false means it is cut.
func (l *Link) pass() bool {
	l.mu.Lock()
	d := l.delay
	for l.mode == linkSilent && !l.closed {
		l.open.Wait()
	}
	ok := !l.closed && l.mode != linkCut
	l.mu.Unlock()
	if d > 0 && ok {
		<-time.After(d)
	}
	return ok
}
