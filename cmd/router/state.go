package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/offline"
	"conveyor.etl/router/output"
)

func newStateCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "state",
		Short: "Look into the state of a node that does not run",
		Long: `Look into the state in the data directory of a node that does not run. The commands
only read and leave no trace; a directory on which a node runs is refused.

A node that was killed has its newest entries in the log only: they are not shown,
and how many there are is said, unless --replay applies those that are known to be
committed to a copy in a scratch directory.

Exit codes: 0 done, 2 wrong use, 3 no such record or no data directory, 4 a node runs
on it, 8 a check failed.`,
	}
	cmd.AddCommand(newStateGetCommand(a), newStateDumpCommand(a), newStateCheckCommand(a))
	return cmd
}

// stateFlags are those of the commands that show a state.
type stateFlags struct {
	dir, scratch string
	replay       bool
}

func (f *stateFlags) add(cmd *cobra.Command) {
	dataDirFlag(cmd, &f.dir)
	cmd.Flags().BoolVar(&f.replay, "replay", false, "show the state with the committed entries of the log applied, on a copy")
	cmd.Flags().StringVar(&f.scratch, "scratch", "", "directory for the copy of --replay; default: that of temporary files")
	_ = cmd.MarkFlagDirname("scratch")
}

// with opens the state of the flags for show, and says on standard error what
// the state does not reflect.
func (f *stateFlags) with(a *app, show func(s *offline.State) error) error {
	d, err := offline.Open(f.dir)
	if err != nil {
		return err
	}
	var s *offline.State
	if f.replay {
		s, err = d.ReplayState(f.scratch, quietLogger(a.stderr))
	} else {
		s, err = d.OpenState()
	}
	if err != nil {
		return errors.Join(err, d.Close())
	}
	note := fmt.Sprintf("the state reflects entry %d", s.Position.Index)
	if s.Following > 0 {
		note += fmt.Sprintf("; %d entries of the log follow, %d of them known to be committed", s.Following, s.Committed)
		if !f.replay && s.Committed > 0 {
			note += " (see --replay)"
		}
	}
	if d.LogErr != nil {
		note += fmt.Sprintf("; what follows in the log is not known: %v", d.LogErr)
	}
	fmt.Fprintln(a.stderr, note)
	err = show(s)
	return errors.Join(err, s.Close(), d.Close())
}

// recordJSON is a record in documents.
type recordJSON struct {
	Table string          `json:"table"`
	Key   []string        `json:"key"`
	Value json.RawMessage `json:"value"`
}

func recordOf(r offline.Record) (recordJSON, error) {
	raw, err := output.Message(r.Value)
	return recordJSON{r.Table, r.Key, raw}, err
}

func newStateGetCommand(a *app) *cobra.Command {
	var f stateFlags
	cmd := &cobra.Command{
		Use:   "get TABLE [KEY...] --data-dir DIR",
		Short: "Show the records of a table, all or those of a key",
		Long: `Show the records of a table: all, or those whose key is KEY or begins with it. The
parts of a key are given one by one: 'get offsets orders 3' is partition 3 of the
source orders.

` + tableHelp(),
		Example: "  router state get pipelines default/orders --data-dir /var/lib/router -o yaml",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := offline.FindTable(args[0])
			if err == nil {
				err = t.CheckKey(args[1:])
			}
			if err != nil {
				return usageError{cmd, err}
			}
			return f.with(a, func(s *offline.State) error {
				w := newRecordWriter(a)
				if err := t.List(s.View, args[1:], w.write); err != nil {
					return err
				}
				if err := w.close(); err != nil {
					return err
				}
				if w.n == 0 && len(args) > 1 {
					return notFound("there is no %s in %s", strings.Join(args[1:], " "), t.Name)
				}
				return nil
			})
		},
	}
	f.add(cmd)
	return cmd
}

func newStateDumpCommand(a *app) *cobra.Command {
	var f stateFlags
	var names []string
	cmd := &cobra.Command{
		Use:   "dump --data-dir DIR",
		Short: "Print every record of the state, or of some tables",
		Long: `Print every record of the state, table by table in the order of keys; with -o json
or yaml as one list of {table, key, value}. It is written as it is read, so a state
of any size takes little memory.

` + tableHelp(),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			tables := offline.Tables()
			if len(names) > 0 {
				tables = nil
				for _, name := range names {
					t, err := offline.FindTable(name)
					if err != nil {
						return usageError{cmd, err}
					}
					tables = append(tables, t)
				}
			}
			return f.with(a, func(s *offline.State) error {
				w := newRecordWriter(a)
				for _, t := range tables {
					if err := t.List(s.View, nil, func(r offline.Record) error {
						if err := cmd.Context().Err(); err != nil {
							return err
						}
						return w.write(r)
					}); err != nil {
						return err
					}
				}
				return w.close()
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&names, "table", nil, "only this table; may be repeated")
	return cmd
}

func tableHelp() string {
	var b strings.Builder
	b.WriteString("Tables and their keys:\n")
	for _, t := range offline.Tables() {
		fmt.Fprintf(&b, "  %-14s %s\n", t.Name, strings.ToUpper(strings.Join(t.Key, " ")))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// recordWriter prints records one by one: a state may be larger than memory.
type recordWriter struct {
	w      *bufio.Writer
	format output.Format
	n      int
}

func newRecordWriter(a *app) *recordWriter {
	return &recordWriter{w: bufio.NewWriterSize(a.stdout, 64<<10), format: a.format}
}

func (w *recordWriter) write(r offline.Record) error {
	w.n++
	switch w.format {
	case output.Table:
		text, err := oneLine(r.Value)
		if err != nil {
			return err
		}
		cells := make([]string, 0, len(r.Key)+2)
		for _, c := range append([]string{r.Table}, r.Key...) {
			cells = append(cells, output.Clean(c))
		}
		_, err = fmt.Fprintln(w.w, strings.Join(append(cells, output.Clean(text)), "  "))
		return err
	case output.YAML:
		doc, err := recordOf(r)
		if err != nil {
			return err
		}
		return output.Document(w.w, w.format, []recordJSON{doc})
	}
	doc, err := recordOf(r)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	lead := ",\n  "
	if w.n == 1 {
		lead = "[\n  "
	}
	_, err = io.WriteString(w.w, lead+string(raw))
	return err
}

func (w *recordWriter) close() error {
	end := ""
	switch {
	case w.format == output.JSON && w.n == 0, w.format == output.YAML && w.n == 0:
		end = "[]\n"
	case w.format == output.JSON:
		end = "\n]\n"
	}
	if _, err := io.WriteString(w.w, end); err != nil {
		return err
	}
	return w.w.Flush()
}

// oneLine renders m as JSON without needless blanks.
func oneLine(m proto.Message) (string, error) {
	raw, err := output.Message(m)
	return string(raw), err
}

func newStateCheckCommand(a *app) *cobra.Command {
	var dir string
	var o offline.CheckOptions
	cmd := &cobra.Command{
		Use:   "check --data-dir DIR",
		Short: "Verify log, state, images and how they fit together; exit code 8 when something is wrong",
		Long: `Verify everything in a data directory: every checksum and every command of the log,
every block and invariant of the state, that log and state fit together by the
rules of a start, and every byte of the images. Exit code 8 when something failed;
a note is worth knowing and harms nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := offline.Open(dir)
			if err != nil {
				return err
			}
			o.Logger = quietLogger(a.stderr)
			r, err := offline.Check(cmd.Context(), d, o)
			if err = errors.Join(err, d.Close()); err != nil {
				return err
			}
			err = output.Print(a.stdout, a.format, r, func() *output.Grid {
				g := &output.Grid{Header: []string{"PART", "VERDICT", "DETAIL"}}
				for _, f := range r.Findings {
					g.Add(f.Part, f.Verdict, f.Detail)
				}
				return g
			})
			if err != nil {
				return err
			}
			if !r.Intact {
				return checkFailed(fmt.Errorf("%s: %s", dir, r.Summary()))
			}
			return nil
		},
	}
	dataDirFlag(cmd, &dir)
	cmd.Flags().BoolVar(&o.Replay, "replay", false, "also apply the committed log to a copy of the state and check the outcome")
	cmd.Flags().StringVar(&o.Scratch, "scratch", "", "directory for the copy of --replay; default: that of temporary files")
	_ = cmd.MarkFlagDirname("scratch")
	return cmd
}
