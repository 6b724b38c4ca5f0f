package rpc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/rpc/peerpb"
)

// TestDigestsTravelWhole: a digest of many frames comes as one, an empty one as
// well, and a refusal comes back with its reason.
func TestDigestsTravelWhole(t *testing.T) {
	checkLeaks(t)
	a, b := newStation(t, 1, nil), newStation(t, 2, nil)
	var took []*peerpb.LeaseDigest
	var refuse error
	b.config = func(c *PeerServerConfig) {
		c.Leases = func(d *peerpb.LeaseDigest) error {
			took = append(took, d)
			return refuse
		}
	}
	b.stopServer()
	b.restartServer()
	introduce(a, b)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	d := &peerpb.LeaseDigest{Term: 3, Epoch: 1, Revision: 77}
	for i := range 2*silencesPerFrame + 5 {
		d.Sidecars = append(d.Sidecars, &peerpb.LeaseSilence{Id: fmt.Sprint("s", i), SilentMs: uint64(i)})
	}
	for i := range silencesPerFrame + 7 {
		d.Services = append(d.Services, &peerpb.LeaseSilence{Id: fmt.Sprint("v", i), SilentMs: uint64(i)})
	}
	empty := &peerpb.LeaseDigest{Term: 4}
	for _, d := range []*peerpb.LeaseDigest{d, empty} {
		if err := a.transport.ShareLeases(ctx, 2, d); err != nil {
			t.Fatal(err)
		}
		got := took[len(took)-1]
		got.Hello = nil
		if !proto.Equal(got, d) {
			t.Fatalf("a digest of %d and %d silences came as one of %d and %d", len(d.Sidecars), len(d.Services), len(got.Sidecars), len(got.Services))
		}
	}
	refuse = errors.New("another leads")
	if err := a.transport.ShareLeases(ctx, 2, empty); err == nil || !strings.Contains(err.Error(), "another leads") {
		t.Fatalf("a refusal came as %v", err)
	}
	if err := b.transport.ShareLeases(ctx, 1, empty); err == nil || !strings.Contains(err.Error(), "keeps none") {
		t.Fatalf("a node that keeps none answered %v", err)
	}
}
