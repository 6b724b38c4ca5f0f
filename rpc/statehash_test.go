package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc/peerpb"
)

// lines is told every line that is written.
type lines func(line string)

func (l lines) Write(p []byte) (int, error) {
	l(string(p))
	return len(p), nil
}

// sumsOf is a state that says what the test wants.
type sumsOf struct {
	sums []router.Sums
	hash router.StateHash
	err  error
}

func (s *sumsOf) RecentSums() []router.Sums { return s.sums }

func (s *sumsOf) HashAt(_ context.Context, index uint64) (router.StateHash, error) {
	h := s.hash
	if index != 0 {
		h.Index = index
	}
	return h, s.err
}

func TestPeersTellTheirHashes(t *testing.T) {
	checkLeaks(t)
	state := &sumsOf{
		sums: []router.Sums{{Index: 128, Epoch: 2, Sums: []uint64{1, 2}}, {Index: 131, Epoch: 2, Sums: []uint64{3, 4}}},
		hash: router.StateHash{Index: 131, Epoch: 2, Hash: []byte("hash")},
	}
	gate := NewStateGate()
	type word struct {
		from     uint64
		expected router.Sums
		reason   string
	}
	var heard []word
	var agreed [2]uint64
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	b.config = func(c *PeerServerConfig) {
		c.State, c.Gate = state, gate
		c.Agreed = func(index, epoch uint64) { agreed = [2]uint64{index, epoch} }
		c.Suspect = func(_ context.Context, from uint64, expected router.Sums, reason string) (bool, string) {
			heard = append(heard, word{from, expected, reason})
			return len(expected.Sums) > 0, "so it is"
		}
	}
	b.stopServer()
	b.restartServer()
	introduce(a, b)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()

	got, err := a.transport.Sums(ctx, 2, 128, 2)
	if err != nil || agreed != [2]uint64{128, 2} || !reflect.DeepEqual(got, state.sums) {
		t.Errorf("sums: %v %v", got, err)
	}
	h, err := a.transport.HashAt(ctx, 2, 256)
	if err != nil || h.Index != 256 || h.Epoch != 2 || string(h.Hash) != "hash" {
		t.Errorf("hash: %+v %v", h, err)
	}
	for _, want := range []error{router.ErrIndexPassed, router.ErrHashBusy} {
		state.err = fmt.Errorf("%w: so it goes", want)
		if _, err := a.transport.HashAt(ctx, 2, 256); !errors.Is(err, want) {
			t.Errorf("refused with %v, got %v", want, err)
		}
	}
	expected := router.Sums{Index: 128, Epoch: 2, Sums: []uint64{1, 3}}
	agrees, message, err := a.transport.Quarantine(ctx, 2, expected, strings.Repeat("r", 2*maxReason))
	if err != nil || !agrees || message != "so it is" {
		t.Errorf("quarantine: %v %q %v", agrees, message, err)
	}
	if len(heard) != 1 || heard[0].from != 1 || !reflect.DeepEqual(heard[0].expected, expected) || len(heard[0].reason) != maxReason {
		t.Errorf("heard %+v", heard)
	}

	peers := []raftnode.Member{a.member(), b.member(), {ID: 3, Addr: "127.0.0.1:1"}}
	reports, err := FetchSums(ctx, FetchOptions{Identity: a.id, Peers: peers})
	if len(reports) != 1 || !reflect.DeepEqual(reports[2], state.sums) || err == nil || !strings.Contains(err.Error(), "node 3") {
		t.Errorf("fetched %v %v", reports, err)
	}

	// Held, the state may still be looked at: that is how the holding ends.
	gate.Hold("they differ", time.Hour)
	if _, err := a.transport.Sums(ctx, 2, 0, 0); err != nil || agreed != [2]uint64{128, 2} {
		t.Errorf("sums of a held state: %v", err)
	}
	gate.Quarantine("it is wrong")
	if got, err := a.transport.Sums(ctx, 2, 0, 0); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "it is wrong") {
		t.Errorf("sums of a wrong state: %v %v", got, err)
	}
	image := b.node.makeImage(t, 200, 1000)
	// It tries until it is told to stop: here, once an attempt has failed for the reason.
	fctx, fcancel := context.WithCancel(ctx)
	defer fcancel()
	told := slog.NewTextHandler(lines(func(line string) {
		if strings.Contains(line, "it is wrong") {
			fcancel()
		}
	}), nil)
	_, err = FetchState(fctx, FetchOptions{Identity: a.id, Peers: peers[:2], Store: a.node.images, MinIndex: 1, Logger: slog.New(told)})
	if err == nil || !strings.Contains(err.Error(), "it is wrong") {
		t.Errorf("the image %s of a wrong state was handed out: %v", image.Info().ID, err)
	}
}

// Whoever is not of this cluster, or reaches the wrong node, learns nothing.
func TestHashesAreForMembers(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	b.config = func(c *PeerServerConfig) { c.State = &sumsOf{} }
	b.stopServer()
	b.restartServer()
	introduce(a, b)
	conn, err := a.transport.connect(2)
	noError(t, err)
	defer conn.Close()
	for name, h := range map[string]*peerpb.Hello{
		"nobody":          nil,
		"another cluster": Identity{ClusterID: 1, NodeID: 1}.hello(2),
		"another target":  a.id.hello(3),
	} {
		_, err := peerpb.NewPeerClient(conn).StateHashes(t.Context(), &peerpb.StateHashesRequest{Hello: h})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("hashes for %s: %v", name, err)
		}
		_, err = peerpb.NewPeerClient(conn).Quarantine(t.Context(), &peerpb.QuarantineRequest{Hello: h})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("a quarantine by %s: %v", name, err)
		}
	}
	_, err = peerpb.NewPeerClient(conn).Quarantine(t.Context(), &peerpb.QuarantineRequest{
		Hello: a.id.hello(2), Expected: &peerpb.StateHash{Sums: make([]uint64, maxSums+1)}})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a quarantine beyond all bounds: %v", err)
	}
}

// One question of a comparison, with its connection.
func BenchmarkPeerSums(b *testing.B) {
	a, c := newStation(b, 1, nil), newStation(b, 2, nil)
	state := &sumsOf{}
	for i := range uint64(65) {
		s := router.Sums{Index: 128 * i, Sums: make([]uint64, len(router.SumTables()))}
		for j := range s.Sums {
			s.Sums[j] = i << 40 * uint64(j+1)
		}
		state.sums = append(state.sums, s)
	}
	c.config = func(pc *PeerServerConfig) { pc.State = state }
	c.stopServer()
	c.restartServer()
	introduce(a, c)
	for b.Loop() {
		if _, err := a.transport.Sums(b.Context(), 2, 0, 0); err != nil {
			b.Fatal(err)
		}
	}
}
