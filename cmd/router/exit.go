package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/bench"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/offline"
	"conveyor.etl/router/router"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/snap"
	"conveyor.etl/router/wal"
)

// The exit codes, documented in doc.go, exitCodesHelp and docs/commands.md.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitUnavailable = 5
	exitDenied      = 6
	exitDeadline    = 7
	exitCheckFailed = 8
	exitRemoved     = 9
	// exitInterrupted is what shells say of a process that SIGINT has ended.
	exitInterrupted = 130
)

// exitCodesHelp is `router help exit-codes`.
const exitCodesHelp = `The exit codes of every command:

  0  done
  1  error that none of the others describes
  2  wrong use: unknown command or flag, bad argument, bad setting, a file that
     cannot be understood or declares what cannot be
  3  not found; also a node that is no member
  4  conflict: the state does not allow it, it changed meanwhile, or a node runs on
     the data directory; nothing was done
  5  no node or no leader answered in time, or they were too busy; nothing was done
  6  denied
  7  a deadline passed or a connection broke: whether a change was made is not
     known, or the operation goes on ('router operation wait')
  8  a check failed, something is damaged, an operation failed or was cancelled,
     or calls of 'router bench' failed
  9  serve: the node was removed from its cluster
  130  bench: interrupted; what was measured until then is printed

What a command prints on stderr says which object it was about, whether something
was done, and what to do. With 5 it is always safe to repeat the command; with 7
look first.`

// errorCodes gives the errors of packages their exit codes; the first row that
// matches wins. It and statusCodes are the only places where this is decided:
// commands return what they got.
func errorCodes() []struct {
	is   error
	code int
} {
	return []struct {
		is   error
		code int
	}{
		{backup.ErrInvalidURL, exitUsage},
		{backup.ErrInvalidID, exitUsage},
		{snap.ErrInvalidID, exitUsage},
		{backup.ErrNotFound, exitNotFound},
		{backup.ErrExists, exitConflict},
		{datadir.ErrInUse, exitConflict},
		{datadir.ErrForeign, exitConflict},
		{datadir.ErrBeforeKept, exitConflict},
		{offline.ErrUnfinished, exitConflict},
		{offline.ErrNotBest, exitConflict},
		{offline.ErrPlanChanged, exitConflict},
		{offline.ErrNotEmpty, exitConflict},
		{backup.ErrDamaged, exitCheckFailed},
		{backup.ErrIncomplete, exitCheckFailed},
		{archive.ErrCorrupt, exitCheckFailed},
		{archive.ErrNotArchive, exitCheckFailed},
		{archive.ErrNewerFormat, exitCheckFailed},
		{archive.ErrTooLarge, exitCheckFailed},
		{offline.ErrContent, exitCheckFailed},
		{router.ErrCorrupt, exitCheckFailed},
		{snap.ErrCorrupt, exitCheckFailed},
		{wal.ErrCorrupt, exitCheckFailed},
		{bench.ErrAllFailed, exitCheckFailed},
		{context.DeadlineExceeded, exitDeadline},
		{fs.ErrNotExist, exitNotFound},
		{fs.ErrExist, exitConflict},
		{fs.ErrPermission, exitDenied},
	}
}

// statusCode gives the answer of a node its exit code.
func statusCode(c codes.Code) int {
	switch c {
	case codes.OK:
		return exitOK
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition, codes.OutOfRange:
		return exitConflict
	case codes.Unavailable, codes.ResourceExhausted:
		return exitUnavailable
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.DeadlineExceeded, codes.Unknown:
		return exitDeadline
	case codes.DataLoss:
		return exitCheckFailed
	}
	return exitError
}

// usageError is a command line that does not make sense.
type usageError struct {
	cmd *cobra.Command
	err error
}

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// codedError gives err a fixed exit code.
type codedError struct {
	code int
	err  error
}

func (e codedError) Error() string { return e.err.Error() }
func (e codedError) Unwrap() error { return e.err }

// callError is a failed call about one of several objects.
type callError struct {
	subject string
	st      *status.Status
}

func (e callError) Error() string { return e.subject + ": " + e.st.Message() }

// GRPCStatus lets exitCode and explain see the code and the details of the call.
func (e callError) GRPCStatus() *status.Status {
	p := e.st.Proto()
	p.Message = e.Error()
	return status.FromProto(p)
}

// about says which object a failed call was about, without the ornaments gRPC
// puts around a message.
func about(subject string, err error) error {
	read, change := errors.As(err, new(readError)), errors.As(err, new(toChange))
	if st, ok := status.FromError(err); ok {
		err = callError{subject, st}
	} else {
		err = fmt.Errorf("%s: %w", subject, err)
	}
	switch {
	case change:
		return toChange{readError{err}}
	case read:
		return readError{err}
	}
	return err
}

// toChange is a failed read on the way to a change, for which it is of no use to read
// what a single node has.
type toChange struct{ readError }

func (e toChange) Unwrap() error { return e.readError }

// readError is the failure of a command that changes nothing.
type readError struct{ err error }

func (e readError) Error() string { return e.err.Error() }
func (e readError) Unwrap() error { return e.err }

// GRPCStatus lets exitCode and explain see the code of the call.
func (e readError) GRPCStatus() *status.Status {
	st, _ := status.FromError(e.err)
	return st
}

// silentError ends the process with its code after the command itself has
// printed everything there is to say.
type silentError struct{ code int }

func (e silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func notFound(format string, args ...any) error {
	return codedError{exitNotFound, fmt.Errorf(format, args...)}
}

func checkFailed(err error) error { return codedError{exitCheckFailed, err} }

// exitCode returns the exit code of a command that ended with err.
func exitCode(err error) int {
	var silent silentError
	var coded codedError
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &silent):
		return silent.code
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &usage):
		return exitUsage
	}
	if st, ok := status.FromError(err); ok {
		if outcomeUnknown(err, st) {
			return exitDeadline
		}
		if otherEpoch(st) {
			return exitConflict
		}
		return statusCode(st.Code())
	}
	for _, row := range errorCodes() {
		if errors.Is(err, row.is) {
			return row.code
		}
	}
	return exitError
}

// outcomeUnknown reports whether a call broke off so that a change may have been
// made: UNAVAILABLE is "certainly not" only from a node, which says so in the
// details; gRPC makes up its own when a connection breaks.
func outcomeUnknown(err error, st *status.Status) bool {
	return st.Code() == codes.Unavailable && !errors.As(err, new(readError)) && client.OutcomeOf(err) == client.Unknown
}

// otherEpoch says whether a call was refused because the state was restored from a
// backup since what it is about was read.
func otherEpoch(st *status.Status) bool {
	return st.Code() == codes.OutOfRange && rpc.ReasonOf(st) == "EPOCH"
}

// explain turns err into sentences for people: what happened, whether it was
// done, what to do.
func explain(err error) string {
	var texts, advice []string
	for _, e := range parts(err) {
		texts = append(texts, plain(e))
		if a := advise(e); a != "" && !slices.Contains(advice, a) {
			advice = append(advice, a)
		}
	}
	return strings.Join(append(texts, advice...), "\n")
}

// parts returns the errors that errors.Join put together; not those of a
// sentence that names several.
func parts(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	list := joined.Unwrap()
	texts := make([]string, len(list))
	for i, e := range list {
		texts[i] = e.Error()
	}
	if strings.Join(texts, "\n") != err.Error() {
		return []error{err}
	}
	var out []error
	for _, e := range list {
		out = append(out, parts(e)...)
	}
	return out
}

// plain returns the text of one error without package names and gRPC's words.
func plain(err error) string {
	text := err.Error()
	if st, ok := status.FromError(err); ok {
		text = st.Message()
		stale := "read with metadata " + rpc.MetadataConsistency + ": stale"
		if errors.As(err, new(toChange)) {
			text = strings.ReplaceAll(text, ", or "+stale, "")
		}
		text = strings.ReplaceAll(text, stale, "give --stale to read what one node has")
	}
	return rpc.Plain(text)
}

// advise says of one error what it left behind and what to do.
func advise(err error) string {
	st, ok := status.FromError(err)
	if !ok || errors.As(err, new(codedError)) {
		return ""
	}
	if otherEpoch(st) {
		return "Nothing was changed. Look at the current state; a version is given with its epoch, as 'router pipeline get' shows it: --if-version 5@2."
	}
	read := errors.As(err, new(readError))
	const unknown = "It is not known whether the change was made: look before you repeat it."
	switch st.Code() {
	case codes.Unavailable:
		if outcomeUnknown(err, st) {
			return unknown
		}
		done := ""
		if !strings.Contains(strings.ToLower(st.Message()), "nothing was") {
			done = "Nothing was done. "
		}
		if rpc.ReasonOf(st) != "" { // a node has answered
			return done + "A majority of the nodes must be up and reach each other; 'router cluster status' shows what a node knows of them."
		}
		return done + "Check that the nodes given by --server run and that a majority of the cluster is up, then try again."
	case codes.DeadlineExceeded:
		if errors.As(err, new(toChange)) {
			return "The time allowed by --timeout passed, nothing was changed. The cluster may have no leader: " +
				"'router cluster status' shows what a node knows."
		}
		if read {
			return "The time allowed by --timeout passed, nothing was read. The cluster may have no leader: " +
				"'router cluster status --stale' shows what a node knows, and --stale reads without one."
		}
		return "The time allowed by --timeout passed. A change may or may not have been made: look before you repeat it."
	case codes.Unknown:
		return unknown
	case codes.Canceled:
		if !read {
			return unknown
		}
	case codes.ResourceExhausted:
		return "Nothing was done. Try again later."
	case codes.Aborted:
		if client.OutcomeOf(err) == client.Unknown {
			return unknown
		}
		return "Nothing was changed. Read the current state and try again."
	}
	return ""
}
