package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc"
)

// The exit codes, documented in doc.go and in the help of the root command.
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
)

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

// GRPCStatus lets exitCode and explain see the code of the call and its details.
func (e callError) GRPCStatus() *status.Status {
	p := e.st.Proto()
	p.Message = e.Error()
	return status.FromProto(p)
}

// about says which object a failed call was about, without the ornaments gRPC
// puts around a message.
func about(subject string, err error) error {
	if st, ok := status.FromError(err); ok {
		return callError{subject, st}
	}
	return fmt.Errorf("%s: %w", subject, err)
}

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
	case errors.Is(err, context.DeadlineExceeded):
		return exitDeadline
	case errors.Is(err, os.ErrNotExist):
		return exitNotFound
	}
	st, ok := status.FromError(err)
	if !ok {
		return exitError
	}
	if otherEpoch(st) {
		return exitConflict
	}
	switch st.Code() {
	case codes.OK:
		return exitOK
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return exitConflict
	case codes.Unavailable:
		return exitUnavailable
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.DeadlineExceeded:
		return exitDeadline
	default:
		return exitError
	}
}

// otherEpoch says whether a call was refused because the state was restored from a
// backup since what it is about was read.
func otherEpoch(st *status.Status) bool {
	return st.Code() == codes.OutOfRange && rpc.ReasonOf(st) == "EPOCH"
}

// explain turns err into sentences for people: what happened, whether it was
// done, what to do.
func explain(err error) string {
	st, ok := status.FromError(err)
	if !ok {
		return err.Error()
	}
	if otherEpoch(st) {
		return st.Message() + "\nNothing was changed. Look at the current state; a version is given with its epoch, as 'router pipeline get' shows it: --if-version 5@2."
	}
	switch st.Code() {
	case codes.Unavailable:
		return st.Message() + "\nNothing was done. Check that the nodes given by --server run and that a majority of the cluster is up, then try again."
	case codes.DeadlineExceeded:
		if errors.As(err, new(readError)) {
			return st.Message() + "\nThe time allowed by --timeout passed, nothing was read. The cluster may have no leader: " +
				"'router cluster status --stale' shows what a node knows, and --stale reads without one."
		}
		return st.Message() + "\nThe time allowed by --timeout passed. A change may or may not have been made: look before you repeat it."
	case codes.Unknown:
		return st.Message() + "\nIt is not known whether the change was made: look before you repeat it."
	case codes.ResourceExhausted:
		return st.Message() + "\nNothing was done. Try again later."
	case codes.Aborted:
		return st.Message() + "\nNothing was changed. Read the current state and try again."
	default:
		return st.Message()
	}
}
