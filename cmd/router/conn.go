package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

const (
	// slowCall bounds a call that reads the whole state, unless --timeout was
	// given.
	slowCall = 10 * time.Minute
	// connectTime is how long a node may take to be connected to before the
	// next one is tried.
	connectTime = 3 * time.Second
	// nextNode is how long a node has to answer before the next one of --server
	// is asked as well.
	nextNode = 500 * time.Millisecond
)

// clients are the services of the cluster as commands call them.
type clients struct {
	Admin      adminpb.RouterAdminClient
	Registry   registrypb.ServiceRegistryClient
	Checkpoint checkpointpb.CheckpointServiceClient
	Cluster    clusterpb.ClusterClient
}

// call runs one command's conversation with the cluster: it connects to a node
// of --server that answers, bounds the whole by --timeout and closes the
// connections. What may be repeated is, on the other nodes too.
func (a *app) call(cmd *cobra.Command, talk func(ctx context.Context, c *clients) error) error {
	ctx, cancel := a.quick(cmd.Context())
	defer cancel()
	c, err := a.connect(ctx, cmd, a.servers)
	if err != nil {
		return err
	}
	defer c.Close()
	if a.stale {
		ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
	}
	err = talk(ctx, &clients{
		Admin:      c.Admin(),
		Registry:   c.Registry(),
		Checkpoint: c.Checkpoints(),
		Cluster:    c.Cluster(),
	})
	if _, ok := status.FromError(err); ok && err != nil && readOnly(cmd) {
		return readError{err}
	}
	return err
}

// readOnly tells the commands that change nothing by their verbs.
func readOnly(cmd *cobra.Command) bool {
	switch cmd.Name() {
	case "get", "list", "members", "status", "assignments", "check", "wait", "plan", "explain", "what-if":
		return true
	}
	return false
}

// quick bounds a call that is answered at once.
func (a *app) quick(ctx context.Context) (context.Context, context.CancelFunc) {
	if a.timeout <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, a.timeout)
}

// cluster returns a client of nodes for a command whose calls take longer than
// --timeout.
func (a *app) cluster(cmd *cobra.Command, nodes []string) (*client.Client, error) {
	ctx, cancel := a.quick(cmd.Context())
	defer cancel()
	return a.connect(ctx, cmd, nodes)
}

// connect returns a client of nodes that fails over between them, and calls one
// first that has just answered: what has an effect is not tried on a second node
// when a connection fails, since it might be done twice. Calls take as long as
// their context allows. ctx bounds the search for a node that answers.
func (a *app) connect(ctx context.Context, cmd *cobra.Command, given []string) (*client.Client, error) {
	nodes, err := nodeAddresses(given)
	if err != nil {
		return nil, usageError{cmd, err}
	}
	if nodes, err = a.reach(ctx, nodes); err != nil {
		return nil, err
	}
	w := &waiter{a: a}
	c, err := client.Dial(nodes, client.Options{
		Timeout: slowCall, AttemptTimeout: slowCall,
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
				MinConnectTimeout: connectTime,
			}),
			grpc.WithChainUnaryInterceptor(w.unary), grpc.WithChainStreamInterceptor(w.stream),
		},
	})
	if err != nil {
		return nil, usageError{cmd, err}
	}
	a.waiters = append(a.waiters, w)
	return c, nil
}

// nodeAddresses checks the values of --server.
func nodeAddresses(given []string) ([]string, error) {
	var out []string
	for _, text := range given {
		node := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(text), "http://"), "/")
		host, port, err := net.SplitHostPort(node)
		switch {
		case err != nil && strings.Contains(err.Error(), "missing port"):
			return nil, fmt.Errorf("--server %q has no port: give the client address of a node as host:port, such as %s:50051", text, strings.Trim(node, "[]"))
		case err != nil:
			return nil, fmt.Errorf("--server %q is not host:port", text)
		case host == "" || port == "":
			return nil, fmt.Errorf("--server %q is not host:port", text)
		}
		out = append(out, node)
	}
	if len(out) == 0 {
		return nil, errors.New("no node is given; name at least one by --server host:port")
	}
	return out, nil
}

// reach finds a node that answers and returns nodes with it in front. They are
// asked in their order, the next one when one fails or is slow. When all have
// failed, or ctx is done, the error says of each why.
func (a *app) reach(ctx context.Context, nodes []string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := time.Now()
	notice := time.NewTimer(noticeAfter)
	defer notice.Stop()
	next := time.NewTimer(0)
	defer next.Stop()
	type answer struct {
		node int
		err  error
	}
	answers := make(chan answer, len(nodes))
	problems := make([]string, len(nodes))
	asked, failed := 0, 0
	ask := func() {
		i := asked
		asked++
		problems[i] = "no answer"
		go func() { answers <- answer{i, probe(ctx, nodes[i])} }()
		next.Reset(nextNode)
	}
	for {
		var more <-chan time.Time
		if asked < len(nodes) {
			more = next.C
		}
		select {
		case <-more:
			ask()
		case got := <-answers:
			if got.err == nil {
				first := append([]string{nodes[got.node]}, nodes[:got.node]...)
				return append(first, nodes[got.node+1:]...), nil
			}
			if ctx.Err() == nil {
				problems[got.node] = plain(got.err)
				failed++
			}
			if failed == len(nodes) {
				return nil, unreachable(nodes, problems, "")
			}
			if asked < len(nodes) && asked == failed {
				ask()
			}
		case <-notice.C:
			a.notice("waiting for %s to answer%s", strings.Join(nodes[:asked], ", "), remaining(ctx))
		case <-ctx.Done():
			unit := 100 * time.Millisecond
			if time.Since(begun) < 10*unit {
				unit = time.Millisecond // "within 0s" says nothing
			}
			return nil, unreachable(nodes, problems, fmt.Sprintf(" within %v", time.Since(begun).Round(unit)))
		}
	}
}

// unreachable is the error of a command that found no node to talk to.
func unreachable(nodes, problems []string, within string) error {
	var of []string
	for i, node := range nodes {
		problem := problems[i]
		if problem == "" {
			problem = "not asked"
		}
		if strings.HasPrefix(problem, node) {
			of = append(of, problem)
		} else {
			of = append(of, node+": "+problem)
		}
	}
	return codedError{exitUnavailable, fmt.Errorf("no node could be reached%s: %s\nNothing was done. Check that the nodes given by --server run, "+
		"and that these are their client addresses (--listen-addr, port 50051 by default)", within, strings.Join(of, "; "))}
}

// probe asks a node for a sign of life.
func probe(ctx context.Context, node string) error {
	conn, err := grpc.NewClient(passthrough+node, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableServiceConfig())
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = healthgrpc.NewHealthClient(conn).Check(ctx, &healthgrpc.HealthCheckRequest{})
	if status.Code(err) == codes.Unimplemented {
		return errors.New("it does not serve clients; is that the peer address (--raft-addr) of a node?")
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		if st, _ := status.FromError(err); rpc.ReasonOf(st) == "" {
			return err // made up by gRPC: no node has said it
		}
	}
	return nil
}

// notice writes a line to stderr without breaking into a progress that is shown.
func (a *app) notice(format string, args ...any) {
	line := output.Clean(fmt.Sprintf(format, args...))
	a.showing.Lock()
	defer a.showing.Unlock()
	if a.shown != nil {
		a.shown.Say(line)
		return
	}
	fmt.Fprintln(a.stderr, line)
}

// remaining says when a wait that ctx bounds ends.
func remaining(ctx context.Context) string {
	deadline, ok := ctx.Deadline()
	if !ok {
		return ""
	}
	return fmt.Sprintf("; giving up in %v", max(time.Until(deadline).Round(time.Second), time.Second))
}
