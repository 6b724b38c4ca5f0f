package dev

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// Options say what cluster to run; EnsureDefaults fills zeros.
type Options struct {
	// Binary is the router executable that serves the nodes.
	Binary string
	// DataDir keeps the nodes' data and logs, between runs too.
	DataDir string
	// Fresh removes what an earlier run left in DataDir.
	Fresh bool
	Nodes int
	// BasePort: node i serves clients on BasePort+i and peers on
	// BasePort+100+i, on loopback.
	BasePort int
	// Respawn is how long a node that died stays down; 0 leaves it down.
	Respawn   time.Duration
	Pipelines []*adminpb.PipelineConfig
	// Leases are what the nodes expect of sidecars; short ones by default, so
	// that what happens after a loss can be watched.
	Leases Leases

	// Out is where the picture or the lines go.
	Out io.Writer
	// Size returns the columns and rows of the terminal Out is, and false when
	// it is none: then plain lines are printed.
	Size func() (columns, rows int, terminal bool)
	// Color allows colours on a terminal.
	Color bool
	// Silence receives requests to stop and start the heartbeats of one demo
	// sidecar; may be nil.
	Silence <-chan struct{}
	// Command is how a user calls the binary, for hints.
	Command string
	// Started is called once everything runs, with the client endpoints; may
	// be nil.
	Started func(endpoints []string)
}

// Leases say how often sidecars are to send heartbeats, and after which silence
// they are suspect and expired. Zeros are filled with those of the demonstration.
type Leases struct{ HeartbeatEvery, SuspectAfter, ExpireAfter time.Duration }

func (l *Leases) ensureDefaults() {
	for _, d := range []struct {
		to *time.Duration
		is time.Duration
	}{{&l.HeartbeatEvery, 2 * time.Second}, {&l.SuspectAfter, 6 * time.Second}, {&l.ExpireAfter, 10 * time.Second}} {
		if *d.to == 0 {
			*d.to = d.is
		}
	}
}

// EnsureDefaults fills what is zero.
func (o *Options) EnsureDefaults() {
	if o.Nodes == 0 {
		o.Nodes = 3
	}
	if o.BasePort == 0 {
		o.BasePort = 7100
	}
	if o.DataDir == "" {
		o.DataDir = "data/dev"
	}
	if o.Size == nil {
		o.Size = func() (int, int, bool) { return 0, 0, false }
	}
	if o.Command == "" {
		o.Command = "router"
	}
	o.Leases.ensureDefaults()
	if o.Started == nil {
		o.Started = func([]string) {}
	}
}

// Validate returns every fault of o, joined.
func (o *Options) Validate() error {
	var errs []error
	if o.Nodes < 1 || o.Nodes > 9 {
		errs = append(errs, fmt.Errorf("%d nodes; from 1 to 9 are possible, and 3 or 5 make sense", o.Nodes))
	}
	if o.BasePort < 1 || o.BasePort+100+o.Nodes > 65535 {
		errs = append(errs, fmt.Errorf("base port %d leaves no room for ports up to base+%d; choose one from 1 to %d", o.BasePort, 100+o.Nodes, 65535-100-o.Nodes))
	}
	if o.Respawn < 0 {
		errs = append(errs, fmt.Errorf("respawn %v is negative", o.Respawn))
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	// A clear word now is better than three nodes that fail one by one.
	for i := 1; i <= o.Nodes; i++ {
		for _, addr := range []string{o.clientAddr(i), o.peerAddr(i)} {
			l, err := net.Listen("tcp", addr)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s is in use: another program, or another `router dev`, listens there; choose other ports with --base-port", addr))
				continue
			}
			_ = l.Close() // it was only asked whether the port is free
		}
	}
	return errors.Join(errs...)
}

func (o *Options) clientAddr(node int) string {
	return fmt.Sprintf("127.0.0.1:%d", o.BasePort+node)
}

func (o *Options) peerAddr(node int) string {
	return fmt.Sprintf("127.0.0.1:%d", o.BasePort+100+node)
}

func (o *Options) endpoints() []string {
	var out []string
	for i := 1; i <= o.Nodes; i++ {
		out = append(out, o.clientAddr(i))
	}
	return out
}
