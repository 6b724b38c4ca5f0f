package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// ErrClosed: the client was closed. Nothing was sent.
var ErrClosed = errors.New("client: closed")

// Client calls the nodes of one cluster. It implements
// grpc.ClientConnInterface, so generated stubs work on it. Its methods are safe
// for concurrent use.
type Client struct {
	o         Options
	endpoints []string
	prefix    string // of request ids, unique to this client
	sequence  atomic.Uint64

	mu      sync.Mutex
	conns   []*grpc.ClientConn // by endpoint, nil until first used
	current int                // endpoint that calls go to
	closed  bool
}

var _ grpc.ClientConnInterface = (*Client)(nil)

// Dial returns a client of the cluster whose nodes are reached at endpoints
// (host:port). It does not connect yet; the first call does. The first endpoint
// is tried first, so spread clients by giving them different orders.
func Dial(endpoints []string, o Options) (*Client, error) {
	o.ensureDefaults()
	if err := o.validate(endpoints); err != nil {
		return nil, err
	}
	var random [12]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, fmt.Errorf("client: random request ids: %w", err)
	}
	return &Client{
		o:         o,
		endpoints: append([]string(nil), endpoints...),
		prefix:    hex.EncodeToString(random[:]) + "-",
		conns:     make([]*grpc.ClientConn, len(endpoints)),
	}, nil
}

// Close closes all connections; calls in progress fail.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	var errs []error
	for i, conn := range c.conns {
		if conn != nil {
			errs = append(errs, conn.Close())
			c.conns[i] = nil
		}
	}
	return errors.Join(errs...)
}

// Endpoint returns the endpoint that the next call goes to first.
func (c *Client) Endpoint() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endpoints[c.current]
}

// Sidecars returns the stub of SidecarCoordinator.
func (c *Client) Sidecars() sidecarpb.SidecarCoordinatorClient {
	return sidecarpb.NewSidecarCoordinatorClient(c)
}

// Registry returns the stub of ServiceRegistry.
func (c *Client) Registry() registrypb.ServiceRegistryClient {
	return registrypb.NewServiceRegistryClient(c)
}

// Admin returns the stub of RouterAdmin.
func (c *Client) Admin() adminpb.RouterAdminClient { return adminpb.NewRouterAdminClient(c) }

// Checkpoints returns the stub of CheckpointService.
func (c *Client) Checkpoints() checkpointpb.CheckpointServiceClient {
	return checkpointpb.NewCheckpointServiceClient(c)
}

// Commits returns the stub of Commits. Batches carry their own request ids.
func (c *Client) Commits() clusterpb.CommitsClient { return clusterpb.NewCommitsClient(c) }

// Cluster returns the stub of Cluster.
func (c *Client) Cluster() clusterpb.ClusterClient { return clusterpb.NewClusterClient(c) }

// NewRequestID returns an id that no other call of any client uses.
func (c *Client) NewRequestID() string {
	return c.prefix + strconv.FormatUint(c.sequence.Add(1), 36)
}

// pick returns the connection to call on and its position. It prefers one whose
// last attempt to connect did not fail.
func (c *Client) pick() (*grpc.ClientConn, int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, 0, ErrClosed
	}
	for n := range c.endpoints {
		i := (c.current + n) % len(c.endpoints)
		if c.conns[i] != nil && c.conns[i].GetState() == connectivity.TransientFailure {
			continue
		}
		conn, err := c.connLocked(i)
		if err == nil {
			c.current = i
		}
		return conn, i, err
	}
	// All are down; the one whose turn it is may come back first.
	conn, err := c.connLocked(c.current)
	return conn, c.current, err
}

func (c *Client) connLocked(i int) (*grpc.ClientConn, error) {
	if c.conns[i] != nil {
		return c.conns[i], nil
	}
	options := append([]grpc.DialOption{
		grpc.WithTransportCredentials(c.o.Credentials),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: c.o.AttemptTimeout,
		}),
		// Finds a machine that vanished while only streams are open.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 3 * time.Second}),
		// The client repeats calls itself, on other nodes and with request ids.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
	}, c.o.DialOptions...)
	conn, err := grpc.NewClient("passthrough:///"+c.endpoints[i], options...)
	if err != nil {
		return nil, fmt.Errorf("client: connect to %s: %w", c.endpoints[i], err)
	}
	c.conns[i] = conn
	return conn, nil
}

// failed moves on from endpoint i, unless somebody has done so already.
func (c *Client) failed(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == i {
		c.current = (i + 1) % len(c.endpoints)
	}
}

// Invoke implements grpc.ClientConnInterface: it makes a unary call, repeated as
// the package comment says.
func (c *Client) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.o.Timeout)
		defer cancel()
	}
	kind := kindOf(method)
	if kind == mutation {
		ctx = c.withRequestID(ctx)
	}
	pause := c.o.BackoffMin
	// unknown: an earlier attempt may still take effect.
	unknown := false
	// said is the last failure that a node has told. That another one could not
	// be connected to as well is less worth knowing.
	var said error
	for attempt := 1; ; attempt++ {
		conn, i, err := c.pick()
		if err != nil {
			return err
		}
		err = c.attempt(ctx, conn, method, args, reply, opts)
		if err == nil {
			return nil
		}
		v := judge(err, kind)
		if st, ok := status.FromError(err); !ok || !notConnected(st) {
			said = err
		} else if said != nil {
			err = said
		}
		if unknown {
			err = stillUnknown(err)
		} else {
			unknown = kind == mutation && OutcomeOf(err) == Unknown
		}
		if v.elsewhere {
			c.failed(i)
		}
		if !v.repeat || ctx.Err() != nil {
			return err
		}
		// The other nodes are tried at once; only when all have failed, or
		// the cluster asks for it, is there reason to wait.
		wait := v.wait
		if attempt%len(c.endpoints) == 0 {
			wait = max(wait, jitter(pause))
			pause = min(2*pause, c.o.BackoffMax)
		}
		if !sleep(ctx, wait) {
			return err
		}
	}
}

// attempt makes one call on one node.
func (c *Client) attempt(ctx context.Context, conn *grpc.ClientConn, method string, args, reply any, opts []grpc.CallOption) error {
	if len(c.endpoints) > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.o.AttemptTimeout)
		defer cancel()
	}
	return conn.Invoke(ctx, method, args, reply, opts...)
}

// withRequestID adds a request id unless the caller has set one.
func (c *Client) withRequestID(ctx context.Context) context.Context {
	if md, ok := metadata.FromOutgoingContext(ctx); ok && len(md.Get(metadataRequestID)) > 0 {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, metadataRequestID, c.NewRequestID())
}

// NewStream implements grpc.ClientConnInterface: it opens a stream on the first
// node that can be reached.
func (c *Client) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	for attempt := 1; ; attempt++ {
		conn, i, err := c.pick()
		if err != nil {
			return nil, err
		}
		s, err := conn.NewStream(ctx, desc, method, opts...)
		if err == nil {
			return &stream{ClientStream: s, failed: func() { c.failed(i) }}, nil
		}
		v := judge(err, read)
		if v.elsewhere {
			c.failed(i)
		}
		if !v.repeat || attempt == len(c.endpoints) || ctx.Err() != nil {
			return nil, err
		}
	}
}

// stream notes when its node ends it, so that the next stream goes elsewhere.
type stream struct {
	grpc.ClientStream
	failed func()
}

// RecvMsg implements grpc.ClientStream.
func (s *stream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err != nil && judge(err, read).elsewhere {
		s.failed()
	}
	return err
}
