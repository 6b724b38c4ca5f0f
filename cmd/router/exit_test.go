package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/offline"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/wal"
)

// said is an error as a node sends it.
func said(code codes.Code, outcome, text string) error {
	st, _ := status.New(code, text).WithDetails(&errdetails.ErrorInfo{
		Reason: "TEST", Domain: "conveyor.etl", Metadata: map[string]string{"outcome": outcome},
	})
	return st.Err()
}

// Goal: one table decides the exit code of every command.
func TestExitCodes(t *testing.T) {
	broken := status.Error(codes.Unavailable, "error reading from server: EOF")
	for _, c := range []struct {
		err  error
		code int
	}{
		{nil, 0},
		{errors.New("x"), 1},
		{usageError{nil, errors.New("x")}, 2},
		{backup.ErrInvalidID, 2},
		{said(codes.InvalidArgument, "not_done", "x"), 2},
		{notFound("x"), 3},
		{backup.ErrNotFound, 3},
		{fs.ErrNotExist, 3},
		{said(codes.NotFound, "refused", "x"), 3},
		{said(codes.FailedPrecondition, "refused", "x"), 4},
		{said(codes.Aborted, "refused", "x"), 4},
		{fmt.Errorf("open: %w", datadir.ErrInUse), 4},
		{errors.Join(offline.ErrNotEmpty, nil), 4},
		{fs.ErrExist, 4},
		{said(codes.Unavailable, "not_done", "x"), 5},
		{about("pipeline x", said(codes.Unavailable, "not_done", "x")), 5},
		{said(codes.ResourceExhausted, "not_done", "x"), 5},
		{readError{broken}, 5},
		{said(codes.PermissionDenied, "not_done", "x"), 6},
		{fs.ErrPermission, 6},
		{broken, 7},
		{about("pipeline x", broken), 7},
		{said(codes.Unknown, "unknown", "x"), 7},
		{said(codes.DeadlineExceeded, "unknown", "x"), 7},
		{context.DeadlineExceeded, 7},
		{said(codes.DataLoss, "not_done", "x"), 8},
		{fmt.Errorf("x: %w", wal.ErrCorrupt), 8},
		{fmt.Errorf("x: %w", router.ErrCorrupt), 8},
		{backup.ErrDamaged, 8},
		{silentError{8}, 8},
	} {
		if got := exitCode(c.err); got != c.code {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.code)
		}
	}
}

// Goal: every code is in the help and in docs/commands.md.
func TestExitCodesAreDocumented(t *testing.T) {
	docs, err := os.ReadFile("../../docs/commands.md")
	if err != nil {
		t.Fatal(err)
	}
	code, help, _ := runRouter(t, "help", "exit-codes")
	if code != exitOK {
		t.Fatalf("help exit-codes: exit code %d", code)
	}
	for code := exitOK; code <= exitRemoved; code++ {
		if !regexp.MustCompile(fmt.Sprintf(`(?m)^  %d  [a-z]`, code)).MatchString(help) {
			t.Errorf("help does not say what exit code %d means", code)
		}
		if !regexp.MustCompile(fmt.Sprintf("(?m)^\\| %d \\| [a-z`]", code)).Match(docs) {
			t.Errorf("docs/commands.md does not say what exit code %d means", code)
		}
	}
}

// Goal: what a user reads names neither packages nor gRPC, says whether it was
// done, and gives advice once.
func TestExplain(t *testing.T) {
	refused := status.Error(codes.Unavailable,
		`connection error: desc = "transport: Error while dialing: dial tcp 127.0.0.1:1: connect: connection refused"`)
	noLeader := rpc.Status(raftnode.ErrNoLeader).Err()
	for _, c := range []struct {
		err    error
		want   []string
		absent []string
	}{
		{readError{refused}, []string{"127.0.0.1:1: connection refused", "Nothing was done"}, []string{"transport", "desc", "dial"}},
		// Nothing was sent where nobody could be connected to; a connection that
		// broke may have been used before.
		{refused, []string{"127.0.0.1:1: connection refused", "Nothing was done"}, []string{"not known"}},
		{status.Error(codes.Unavailable, "error reading from server: EOF"), []string{"the connection broke", "not known whether the change was made"}, []string{"Nothing was done", "EOF"}},
		{noLeader, []string{"no leader", "Nothing was done"}, []string{"raftnode"}},
		{fmt.Errorf("wal: x is damaged: %w", router.ErrCorrupt), []string{"x is damaged"}, []string{"wal: ", "router: "}},
		{fmt.Errorf("restore: %w", noLeader), []string{"restore: "}, []string{"rpc error", "code ="}},
		{context.DeadlineExceeded, []string{"no answer in time"}, []string{"context"}},
		{errors.Join(about("pipeline a", noLeader), about("pipeline b", noLeader)), []string{"pipeline a: ", "\npipeline b: "}, []string{"raftnode", "rpc error"}},
	} {
		got := explain(c.err)
		for _, text := range c.want {
			if !strings.Contains(got, text) {
				t.Errorf("%q does not say %q", got, text)
			}
		}
		for _, text := range c.absent {
			if strings.Contains(got, text) {
				t.Errorf("%q says %q", got, text)
			}
		}
		if strings.Count(got, "Nothing was done") > 1 {
			t.Errorf("%q gives one advice twice", got)
		}
	}
}
