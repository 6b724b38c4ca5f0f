package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/server"
	"conveyor.etl/router/wal"
)

func newWALCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "wal",
		Short: "Look into the log of a node, also of one that does not run",
		Long: `Look into the log of a node. The commands only read: they change and repair
nothing, and the node may run meanwhile.`,
	}
	cmd.AddCommand(newWALDumpCommand(a), newWALVerifyCommand(a))
	return cmd
}

func newWALDumpCommand(a *app) *cobra.Command {
	var from, to uint64
	var raw bool
	cmd := &cobra.Command{
		Use:   "dump DATA-DIR",
		Short: "Print every record of the log, damaged parts as far as they can be read",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o := wal.DumpOptions{From: from, To: to, EntryFormatter: server.EntryText}
			if raw {
				o.EntryFormatter = nil
			}
			dir, err := logDir(args[0])
			if err != nil {
				return err
			}
			return wal.Dump(a.stdout, dir, o)
		},
	}
	cmd.Flags().Uint64Var(&from, "from", 0, "first index to print")
	cmd.Flags().Uint64Var(&to, "to", 0, "last index to print; 0: all")
	cmd.Flags().BoolVar(&raw, "raw", false, "print sizes and first bytes instead of commands")
	return cmd
}

func newWALVerifyCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify DATA-DIR",
		Short: "Check every checksum of the log; exit code 8 when a node would refuse to start from it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := logDir(args[0])
			if err != nil {
				return err
			}
			report, err := wal.Verify(dir)
			if err != nil && !errors.Is(err, wal.ErrCorrupt) && !errors.Is(err, wal.ErrNewerFormat) {
				return err
			}
			printErr := output.Print(a.stdout, a.format, report, func() *output.Grid {
				g := &output.Grid{Header: []string{"SEGMENT", "BYTES", "INTACT", "RECORDS", "ENTRIES", "FIRST", "LAST"}}
				for _, s := range report.Segments {
					g.Add(filepath.Base(s.File), s.Size, s.Readable, s.Records, s.Entries, s.FirstEntry, s.LastEntry)
				}
				return g
			})
			if err != nil {
				return checkFailed(err)
			}
			if printErr == nil && a.format == output.Table {
				fmt.Fprintf(a.stdout, "\nnode %d: entries %d to %d are intact\n", report.Identity.NodeID, report.FirstIndex, report.LastIndex)
				if report.Unfinished != "" {
					fmt.Fprintf(a.stdout, "an unfinished write at the end, never acknowledged; the next start cuts it: %s\n", report.Unfinished)
				}
			}
			return printErr
		},
	}
}

// logDir accepts a data directory as well as the log inside it. Anything else is
// a mistake of the caller: taken for a log without segments it would be called
// damaged, and its owner advised to give the node's data up.
func logDir(dir string) (string, error) {
	for _, d := range []string{filepath.Join(dir, "wal"), dir} {
		segments, err := filepath.Glob(filepath.Join(d, "*.wal"))
		if err == nil && len(segments) > 0 {
			return d, nil
		}
	}
	return "", notFound("%s holds no log; give the directory that the node's --data-dir names, or the wal directory in it", dir)
}
