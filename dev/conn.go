package dev

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// dial connects to whichever of the endpoints answers. Different callers try
// them in different order, so that not all hang on the same node.
func dial(endpoints []string) (*grpc.ClientConn, error) {
	nodes := manual.NewBuilderWithScheme("nodes")
	var state resolver.State
	for _, i := range rand.Perm(len(endpoints)) {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: endpoints[i]})
	}
	nodes.InitialState(state)
	return grpc.NewClient("nodes:///cluster", grpc.WithResolvers(nodes),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A connection to a node that is frozen does not break by itself.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}))
}

// stale asks for what the node called knows, without asking the leader.
func stale(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
}

// pause waits for d; it returns false when ctx is done first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
