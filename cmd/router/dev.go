package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"conveyor.etl/router/dev"
	"conveyor.etl/router/examples"
	"conveyor.etl/router/manifest"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

func newDevCommand(a *app) *cobra.Command {
	var o dev.Options
	var files []string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run a whole cluster on this machine, with demo sidecars, and watch it",
		Long: `Run a cluster of three nodes on this machine, with real disks, the example
pipelines, and demo sidecars that register, send heartbeats and receive their
assignments as real ones do. On a terminal a live picture shows it, with commands
to try; otherwise plain lines are printed, one of which begins with "ready" and
lists the client addresses.

Nodes are child processes. Kill one with kill -9 and watch another one take over;
it is started again after --respawn. Freeze one with kill -STOP, which is told when it
has not answered for some seconds, and let it go on with kill -CONT. SIGUSR1 to this process cuts one demo sidecar
off, or reconnects it. Ctrl-C stops everything; the data stays for the next run.`,
		Example: "  router dev\n  router dev --fresh --nodes 5 --respawn 0",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.Binary, err = os.Executable(); err != nil {
				return err
			}
			o.Command = os.Args[0]
			if o.Pipelines, err = devPipelines(files); err != nil {
				return err
			}
			o.Out = a.stdout
			o.Color = a.getenv("NO_COLOR") == ""
			if f, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) && a.getenv("TERM") != "dumb" {
				o.Size = func() (int, int, bool) {
					columns, rows, err := term.GetSize(int(f.Fd()))
					if err != nil || columns <= 0 || rows <= 0 {
						return 80, 24, true
					}
					return columns, rows, true
				}
			}
			silence := make(chan os.Signal, 1)
			signal.Notify(silence, syscall.SIGUSR1)
			defer signal.Stop(silence)
			asked := make(chan struct{})
			ended := make(chan struct{})
			defer close(ended)
			go func() {
				for {
					select {
					case <-silence:
					case <-ended:
						return
					}
					select {
					case asked <- struct{}{}:
					case <-ended:
						return
					}
				}
			}()
			o.Silence = asked
			if o.Nodes < 1 {
				return usageError{cmd, fmt.Errorf("--nodes %d: there must be one at least", o.Nodes)}
			}
			o.EnsureDefaults()
			if err := o.Validate(); err != nil {
				return usageError{cmd, err}
			}
			return dev.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.DataDir, "data-dir", "data/dev", "directory for the nodes' data and logs, kept between runs")
	f.BoolVar(&o.Fresh, "fresh", false, "begin with empty nodes")
	f.IntVar(&o.Nodes, "nodes", 3, "number of nodes")
	f.IntVar(&o.BasePort, "base-port", 7100, "node i serves clients on this port + i, other nodes on + 100 + i")
	f.DurationVar(&o.Respawn, "respawn", 10*time.Second, "how long a node that died stays down; 0 = until the next run")
	f.StringArrayVarP(&files, "filename", "f", nil, "pipelines to run instead of the examples: file or folder; repeatable")
	return cmd
}

// devPipelines reads the given files, or else the examples built in.
func devPipelines(files []string) ([]*adminpb.PipelineConfig, error) {
	if len(files) == 0 {
		dir, err := os.MkdirTemp("", "router-examples-")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		err = fs.WalkDir(examples.Files, ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			raw, err := examples.Files.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, path), raw, 0o600)
		})
		if err != nil {
			return nil, fmt.Errorf("unpack the examples: %w", err)
		}
		files = []string{dir}
	}
	// Files that cannot be understood are arguments that cannot be.
	set, err := manifest.Load(files, nil)
	if err != nil {
		return nil, codedError{exitUsage, err}
	}
	if len(set.Pipelines) == 0 {
		return nil, codedError{exitUsage, errors.New("the files declare no pipeline")}
	}
	var out []*adminpb.PipelineConfig
	for _, p := range set.Pipelines {
		out = append(out, p.Config)
	}
	return out, nil
}
