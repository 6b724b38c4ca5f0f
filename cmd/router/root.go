package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
)

// app is what every command works with: the outside world and the global
// flags. Commands take nothing from the process itself, so tests run them in
// memory.
type app struct {
	stdin   io.Reader
	stdout  io.Writer
	stderr  io.Writer
	environ []string

	servers []string      // --server: client addresses of nodes
	timeout time.Duration // --timeout: for one call; 0 = none
	stale   bool          // --stale
	format  output.Format // -o

	// showing guards shown, the progress on the terminal, nil when there is none.
	showing sync.Mutex
	shown   *output.Progress
	// waiters are those of the connections that were made.
	waiters []*waiter
}

// constructors lists the commands of the binary, in the order help shows them.
// A new command is one function and one line here.
func constructors() []func(*app) *cobra.Command {
	return []func(*app) *cobra.Command{
		newServeCommand,
		newDevCommand,
		newConfigCommand,
		newPipelineCommand,
		newSidecarCommand,
		newServiceCommand,
		newGroupCommand,
		newOffsetCommand,
		newCheckpointCommand,
		newBackupCommand,
		newClusterCommand,
		newMemberCommand,
		newOperationCommand,
		newBenchCommand,
		newWALCommand,
		newSnapCommand,
		newStateCommand,
		newSnapshotCommand,
		newVersionCommand,
	}
}

// newRootCommand returns the whole command tree, bound to a.
func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "router",
		Short: "The metadata cluster of Conveyor, and the tools to run it",
		Long: `router runs a node of Conveyor's metadata cluster (router serve) and talks to
one: pipelines, sidecars, services, groups, offsets and the cluster itself.

The exit codes are the same for every command: 'router help exit-codes'.`,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if a.timeout < 0 {
				return usageError{cmd, fmt.Errorf("--timeout %v is negative; 0 waits without end", a.timeout)}
			}
			return nil
		},
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringSliceVarP(&a.servers, "server", "s", a.defaultServers(),
		"client addresses (host:port) of one or more nodes; env CONVEYOR_ROUTER_SERVER")
	flags.DurationVar(&a.timeout, "timeout", 10*time.Second, "give up after this long; 0 waits without end")
	flags.BoolVar(&a.stale, "stale", false, "read what the node asked knows instead of the newest state; works without a leader")
	flags.VarP(&a.format, "output", "o", "output format: table, json or yaml")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(
		[]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	for _, newCommand := range constructors() {
		root.AddCommand(newCommand(a))
	}
	// Without something to run it is a topic of the help.
	root.AddCommand(&cobra.Command{Use: "exit-codes", Short: "The exit codes of every command", Long: exitCodesHelp})
	root.SetHelpCommand(newHelpCommand(root))
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return usageError{cmd, plainFlag(err)} })
	strictGroups(root)
	return root
}

// newHelpCommand is cobra's help, which answers an unknown name with the help of
// everything and exit code 0.
func newHelpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Describe a command, or a topic such as exit-codes",
		ValidArgsFunction: func(_ *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
			var out []string
			if cmd, rest, err := root.Find(args); err == nil && len(rest) == 0 {
				for _, sub := range cmd.Commands() {
					if strings.HasPrefix(sub.Name(), begun) && !sub.Hidden {
						out = append(out, sub.Name()+"\t"+sub.Short)
					}
				}
			}
			return out, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if cmd == nil || err != nil || len(rest) > 0 {
				return usageError{root, fmt.Errorf("there is no command or help topic %q", strings.Join(args, " "))}
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	}
}

// strictGroups makes a command that only groups others refuse unknown names.
// Left alone, cobra answers `router pipeline lsit` with help and exit code 0,
// and a script goes on as if it had listed something.
func strictGroups(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		strictGroups(sub)
	}
	if args := cmd.Args; args != nil {
		cmd.Args = func(cmd *cobra.Command, given []string) error {
			err := args(cmd, given)
			if err != nil && !cmd.HasSubCommands() && strings.HasPrefix(err.Error(), "unknown command ") {
				err = fmt.Errorf("%s takes no argument: %q", cmd.CommandPath(), given[0]) // cobra takes it for a command
			}
			if err != nil && strings.Contains(err.Error(), "arg(s)") {
				err = fmt.Errorf("%s was given %s; it is called as: %s", cmd.CommandPath(), count(uint32(len(given)), "argument", "arguments"), cmd.UseLine())
			}
			if err != nil {
				return usageError{cmd, err}
			}
			return nil
		}
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			err := fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
			}
			return usageError{cmd, err}
		}
		cmd.SuggestionsMinimumDistance = 2
	}
}

// plainFlag says what a flag takes where pflag passes on the words of Go's parsers.
func plainFlag(err error) error {
	text, words, cut := strings.Cut(err.Error(), ": strconv.")
	switch {
	case !cut:
		return err
	case strings.HasPrefix(words, "ParseBool"):
		return fmt.Errorf("%s: must be true or false", text)
	case strings.Contains(words, "out of range"):
		return fmt.Errorf("%s: is too large or too small", text)
	case strings.HasPrefix(words, "ParseFloat"):
		return fmt.Errorf("%s: must be a number", text)
	}
	return fmt.Errorf("%s: must be a whole number", text)
}

// getenv returns the value of an environment variable, empty when unset.
func (a *app) getenv(name string) string {
	for i := len(a.environ) - 1; i >= 0; i-- {
		if value, ok := strings.CutPrefix(a.environ[i], name+"="); ok {
			return value
		}
	}
	return ""
}

func (a *app) defaultServers() []string {
	var servers []string
	for _, s := range strings.Split(a.getenv("CONVEYOR_ROUTER_SERVER"), ",") {
		if s = strings.TrimSpace(s); s != "" {
			servers = append(servers, s)
		}
	}
	if len(servers) == 0 {
		servers = []string{"127.0.0.1:50051"}
	}
	return servers
}

// run executes one command line and returns the exit code of the process.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, environ []string) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, environ: environ}
	root := newRootCommand(a)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	for _, w := range a.waiters {
		w.close()
	}
	if err == nil {
		return exitOK
	}
	var silent silentError
	if !errors.As(err, &silent) {
		fmt.Fprintf(stderr, "Error: %s\n", explain(err))
	}
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(stderr, "See '%s --help'.\n", usage.cmd.CommandPath())
	}
	return exitCode(err)
}
