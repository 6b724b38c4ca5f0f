package router

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// TestScripts runs the scripts in testdata. Each line of `apply` is a Command
// in text form; all lines of one `apply` are one entry. Printed are the
// results and the changes subscribers see. `dump` prints the state, `restart`
// closes and reopens it, `replay` applies the whole log again to an empty
// state and compares the hashes. `image` makes an image, `stage` applies the
// commands that stage it for the operation named, `prepare` prepares that
// restore, and `undo` prints the undo point.
func TestScripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		fs := vfs.NewMem()
		s := open(t, fs, "state")
		sub, err := s.Hub().Subscribe(0)
		noError(t, err)
		var log []Entry
		defer func() { noError(t, s.Close()) }()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			var out strings.Builder
			switch d.Cmd {
			case "apply":
				e := Entry{Index: s.Applied().Index + 1, Term: 1, Local: true}
				for _, l := range strings.Split(strings.TrimSpace(d.Input), "\n") {
					e.Commands = append(e.Commands, marshal(t, command(t, l)))
				}
				log = append(log, e)
				results, err := s.Apply([]Entry{e})
				noError(t, err)
				for _, r := range results[0] {
					out.WriteString(result(r))
				}
				changes, _, err := sub.take()
				if errors.Is(err, ErrResync) {
					fmt.Fprintf(&out, "resync at %d\n", s.Revision())
					sub, err = s.Hub().Subscribe(s.Revision())
				}
				noError(t, err)
				for _, c := range changes {
					fmt.Fprintf(&out, "%d %s %q: %s => %s\n", c.Revision, c.Table, c.Key, text(c.Prev), text(c.Next))
				}
			case "dump":
				return dump(t, s)
			case "image":
				_, err := s.Image("image")
				noError(t, err)
				return "ok\n"
			case "stage":
				cmds := stageCommands(t, fs, "image", strings.TrimSpace(d.Input))
				for _, c := range cmds {
					log = append(log, Entry{Index: s.Applied().Index + 1, Term: 1, Commands: [][]byte{marshal(t, c)}})
					accepted(t, s, c)
				}
				return fmt.Sprintf("%d commands\n", len(cmds))
			case "prepare":
				if err := s.Prepare(t.Context(), strings.TrimSpace(d.Input)); err != nil {
					return err.Error() + "\n"
				}
				return "ok\n"
			case "undo":
				u, ok := s.UndoPoint()
				return fmt.Sprintf("%v epoch %d revision %d index %d\n", ok, u.Epoch, u.Revision, u.Index)
			case "validate":
				spec := &commandpb.Command{}
				spec = command(t, "put_pipeline { spec {"+d.Input+"} }")
				for _, f := range ValidatePipeline(spec.GetPutPipeline().Spec) {
					fmt.Fprintln(&out, f)
				}
				if out.Len() == 0 {
					return "valid\n"
				}
			case "restart":
				before := hash(t, s)
				noError(t, s.Close())
				s = open(t, fs, "state")
				if hash(t, s) != before {
					t.Fatal("the state changed with the restart")
				}
				sub, err = s.Hub().Subscribe(s.Revision())
				noError(t, err)
				return "ok\n"
			case "replay":
				other := openMem(t)
				_, err := other.Apply(log)
				noError(t, err)
				if a, b := dump(t, s), dump(t, other); a != b {
					t.Fatalf("the replayed state differs:\n%s\nfrom:\n%s", b, a)
				}
				if hash(t, s) != hash(t, other) {
					t.Fatal("the replayed state has another hash")
				}
				return "same\n"
			default:
				t.Fatalf("unknown directive %s", d.Cmd)
			}
			return out.String()
		})
	})
}

// result prints what a caller sees, the refusal first.
func result(r *commandpb.Result) string {
	if r.Rejection != nil {
		return "refused: " + text(r) + "\n"
	}
	return "ok: " + text(r) + "\n"
}
