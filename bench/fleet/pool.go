package fleet

import (
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// pool is the connections that all sidecars share. Connection j begins with
// endpoint j modulo their number and takes the next one when it is gone, as a
// client behind a service address does.
type pool struct {
	endpoints []string
	mu        sync.RWMutex
	conns     []*grpc.ClientConn
}

func newPool(endpoints []string, n int) (*pool, error) {
	p := &pool{endpoints: endpoints, conns: make([]*grpc.ClientConn, n)}
	for j := range p.conns {
		c, err := p.dial(j)
		if err != nil {
			p.close()
			return nil, err
		}
		p.conns[j] = c
	}
	return p, nil
}

func (p *pool) dial(j int) (*grpc.ClientConn, error) {
	nodes := manual.NewBuilderWithScheme("nodes")
	var state resolver.State
	for k := range p.endpoints {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: p.endpoints[(j+k)%len(p.endpoints)]})
	}
	nodes.InitialState(state)
	return grpc.NewClient("nodes:///fleet", grpc.WithResolvers(nodes),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{})),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.5, MaxDelay: time.Second},
			MinConnectTimeout: 2 * time.Second,
		}))
}

// conn returns the connection of sidecar i.
func (p *pool) conn(i int) *grpc.ClientConn {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.conns[i%len(p.conns)]
}

func (p *pool) sidecars(i int) sidecarpb.SidecarCoordinatorClient {
	return sidecarpb.NewSidecarCoordinatorClient(p.conn(i))
}

// cut closes every connection but those to keep and dials anew; calls under way
// fail.
func (p *pool) cut(keep func(conn int) bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for j, old := range p.conns {
		if keep(j) {
			continue
		}
		c, err := p.dial(j)
		if err != nil {
			return err
		}
		p.conns[j] = c
		_ = old.Close() // its callers are meant to notice
	}
	return nil
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		if c != nil {
			_ = c.Close()
		}
	}
}
