package rpc

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/snap"
)

// statusCases has a row for every sentinel of the packages below this one.
func statusCases() map[string]struct {
	err     error
	code    codes.Code
	outcome Outcome
} {
	type c = struct {
		err     error
		code    codes.Code
		outcome Outcome
	}
	return map[string]c{
		"raftnode.ErrNoLeader":          {raftnode.ErrNoLeader, codes.Unavailable, NotDone},
		"raftnode.ErrStopping":          {raftnode.ErrStopping, codes.Unavailable, NotDone},
		"raftnode.ErrBusy":              {raftnode.ErrBusy, codes.ResourceExhausted, NotDone},
		"raftnode.ErrTooLarge":          {raftnode.ErrTooLarge, codes.InvalidArgument, NotDone},
		"raftnode.ErrAmbiguous":         {raftnode.ErrAmbiguous, codes.Unknown, Unknown},
		"raftnode.ErrMembershipPending": {raftnode.ErrMembershipPending, codes.FailedPrecondition, NotDone},
		"raftnode.ErrTransferFailed":    {raftnode.ErrTransferFailed, codes.Aborted, Unknown},
		"raftnode.ErrOverwritten":       {raftnode.ErrOverwritten, codes.Unavailable, NotDone},
		"raftnode.ErrMembershipRefused": {raftnode.ErrMembershipRefused, codes.FailedPrecondition, NotDone},
		"raftnode.ErrDiverged":          {raftnode.ErrDiverged, codes.DataLoss, Unknown},
		"raftnode.ErrDiskStalled":       {raftnode.ErrDiskStalled, codes.Unknown, Unknown},
		"raftnode.ErrStateBehindLog":    {raftnode.ErrStateBehindLog, codes.Unavailable, NotDone},

		"rpc.ErrNoSpace":             {ErrNoSpace, codes.ResourceExhausted, NotDone},
		"rpc.ErrUnreachable":         {ErrUnreachable, codes.Unavailable, NotDone},
		"rpc.ErrNotProposed":         {fmt.Errorf("%w: %w", ErrNotProposed, context.DeadlineExceeded), codes.Unavailable, NotDone},
		"rpc.ErrInvalidCommand":      {ErrInvalidCommand, codes.InvalidArgument, NotDone},
		"rpc.ErrInvalidMetadata":     {ErrInvalidMetadata, codes.InvalidArgument, NotDone},
		"rpc.ErrBehind":              {ErrBehind, codes.Unavailable, NotDone},
		"rpc.ErrFutureRevision":      {&FutureRevisionError{Asked: 7, Current: 5}, codes.OutOfRange, NotDone},
		"rpc.ErrEpoch":               {&EpochError{Known: 1, Current: 2, Revision: 5}, codes.OutOfRange, NotDone},
		"rpc.ErrSnapshotUnreachable": {ErrSnapshotUnreachable, codes.Unavailable, NotDone},
		"rpc.ErrRefused":             {&RefusedError{Peer: 1, Reason: "r"}, codes.PermissionDenied, NotDone},
		"rpc.ErrSuperseded":          {ErrSuperseded, codes.Aborted, NotDone},
		"rpc.ErrOtherDisk":           {ErrOtherDisk, codes.FailedPrecondition, NotDone},
		"rpc.ErrMemberRemoved":       {ErrMemberRemoved, codes.FailedPrecondition, NotDone},
		"rpc.ErrPreflight":           {ErrPreflight, codes.FailedPrecondition, NotDone},
		"rpc.ErrOperationRunning":    {ErrOperationRunning, codes.FailedPrecondition, NotDone},
		"rpc.ErrMalformed":           {ErrMalformed, codes.InvalidArgument, NotDone},
		"rpc.ErrClosed":              {ErrClosed, codes.Unavailable, NotDone},
		"rpc.ErrStalled":             {ErrStalled, codes.DeadlineExceeded, NotDone},
		"rpc.ErrQuarantined":         {ErrQuarantined, codes.Unavailable, NotDone},

		"router.ErrClosed":         {router.ErrClosed, codes.Unavailable, NotDone},
		"router.ErrCompacted":      {&router.RevisionError{Kind: router.ErrCompacted, Requested: 1, Current: 5}, codes.OutOfRange, NotDone},
		"router.ErrFutureRevision": {&router.RevisionError{Kind: router.ErrFutureRevision, Requested: 9, Current: 5}, codes.OutOfRange, NotDone},
		"router.ErrResync":         {&router.RevisionError{Kind: router.ErrResync, Current: 5}, codes.OutOfRange, NotDone},
		"router.ErrNotStaged":      {router.ErrNotStaged, codes.FailedPrecondition, NotDone},
		"router.ErrBadChunk":       {router.ErrBadChunk, codes.DataLoss, NotDone},
		"router.ErrStateExists":    {router.ErrStateExists, codes.FailedPrecondition, NotDone},
		"router.ErrIndexPassed":    {router.ErrIndexPassed, codes.FailedPrecondition, NotDone},
		"router.ErrHashBusy":       {router.ErrHashBusy, codes.ResourceExhausted, NotDone},
		"router.ErrNewerFormat":    {router.ErrNewerFormat, codes.FailedPrecondition, NotDone},
		"router.ErrUnknownCommand": {router.ErrUnknownCommand, codes.DataLoss, Unknown},
		"router.ErrNoSpace":        {router.ErrNoSpace, codes.ResourceExhausted, Unknown},
		"router.ErrCorrupt":        {router.ErrCorrupt, codes.DataLoss, Unknown},
		"router.ErrLostMarker":     {router.ErrLostMarker, codes.DataLoss, Unknown},

		"snap.ErrNotFound":    {snap.ErrNotFound, codes.NotFound, NotDone},
		"snap.ErrExists":      {snap.ErrExists, codes.AlreadyExists, NotDone},
		"snap.ErrCorrupt":     {&snap.CorruptError{Image: "i", File: "f"}, codes.DataLoss, NotDone},
		"snap.ErrInvalidID":   {snap.ErrInvalidID, codes.InvalidArgument, NotDone},
		"snap.ErrTooLarge":    {snap.ErrTooLarge, codes.InvalidArgument, NotDone},
		"snap.ErrOutOfOrder":  {&snap.OffsetError{Expected: 1, Got: 2}, codes.Aborted, NotDone},
		"snap.ErrBadChunk":    {snap.ErrBadChunk, codes.Aborted, NotDone},
		"snap.ErrNewerFormat": {snap.ErrNewerFormat, codes.FailedPrecondition, NotDone},
		"snap.ErrBusy":        {snap.ErrBusy, codes.Unavailable, NotDone},
		"snap.ErrNoSpace":     {snap.ErrNoSpace, codes.ResourceExhausted, NotDone},
		"snap.ErrClosed":      {snap.ErrClosed, codes.Unavailable, NotDone},

		"context.DeadlineExceeded": {context.DeadlineExceeded, codes.DeadlineExceeded, Unknown},
		"context.Canceled":         {context.Canceled, codes.Canceled, Unknown},
		"a bug":                    {errors.New("secret internals"), codes.Internal, Unknown},
		"not leader":               {&raftnode.NotLeaderError{Leader: 2, Addr: "a:1", Term: 3}, codes.Unavailable, NotDone},
		// Unknown wins over whatever failed afterwards.
		"unknown, then no leader": {fmt.Errorf("%w; then %w", raftnode.ErrAmbiguous, &raftnode.NotLeaderError{Leader: 1}), codes.Unknown, Unknown},
		"no leader, then late":    {fmt.Errorf("%w; then %w", raftnode.ErrNoLeader, context.DeadlineExceeded), codes.Unavailable, NotDone},
	}
}

func TestStatusTable(t *testing.T) {
	for name, c := range statusCases() {
		t.Run(name, func(t *testing.T) {
			s := Status(fmt.Errorf("while testing: %w", c.err))
			if s.Code() != c.code || OutcomeOf(s) != c.outcome {
				t.Errorf("%v: code %v, outcome %q; want %v, %q", c.err, s.Code(), OutcomeOf(s), c.code, c.outcome)
			}
			if c.code == codes.Internal && strings.Contains(s.Message(), "secret") {
				t.Errorf("internals in %q", s.Message())
			}
			// Generic retry policies repeat UNAVAILABLE.
			if s.Code() == codes.Unavailable && OutcomeOf(s) != NotDone {
				t.Error("UNAVAILABLE for something that may have been done")
			}
			var info *errdetails.ErrorInfo
			for _, d := range s.Details() {
				if i, ok := d.(*errdetails.ErrorInfo); ok {
					info = i
				}
			}
			if info.GetReason() == "" || info.GetDomain() != errorDomain {
				t.Errorf("details: %v", s.Details())
			}
			if c.code == codes.OutOfRange && info.GetMetadata()["current_revision"] != "5" {
				t.Errorf("the current revision is missing: %v", info)
			}
		})
	}
	if Status(nil) != nil {
		t.Error("a status for no error")
	}
	own := status.New(codes.NotFound, "ours")
	if got := Status(own.Err()); got.Code() != codes.NotFound || got.Message() != "ours" {
		t.Errorf("a status became %v", got)
	}
	for _, d := range Status(&raftnode.NotLeaderError{Leader: 2, Addr: "a:1", Term: 3}).Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok && (i.Metadata["leader"] != "2" || i.Metadata["peer_addr"] != "a:1") {
			t.Errorf("the leader is missing: %v", i)
		}
	}
}

// A sentinel added to one of the packages must get a row, or callers are told
// "internal error" for what was foreseen.
func TestEverySentinelHasARow(t *testing.T) {
	cases := statusCases()
	for _, pkg := range []string{"raftnode", "router", "snap", "rpc"} {
		files, err := filepath.Glob(filepath.Join("..", pkg, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("no source of %s: %v", pkg, err)
		}
		found := 0
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), file, src, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, decl := range parsed.Decls {
				d, ok := decl.(*ast.GenDecl)
				if !ok || d.Tok != token.VAR {
					continue
				}
				for _, spec := range d.Specs {
					for _, id := range spec.(*ast.ValueSpec).Names {
						if !strings.HasPrefix(id.Name, "Err") {
							continue
						}
						found++
						if _, ok := cases[pkg+"."+id.Name]; !ok {
							t.Errorf("%s.%s has no row in the status table and its test", pkg, id.Name)
						}
					}
				}
			}
		}
		if found == 0 {
			t.Errorf("no sentinels found in %s: the test tests nothing", pkg)
		}
	}
}

func TestFromRejection(t *testing.T) {
	want := map[commandpb.Code]codes.Code{
		commandpb.Code_CODE_UNSPECIFIED:  codes.FailedPrecondition,
		commandpb.Code_CODE_INVALID:      codes.InvalidArgument,
		commandpb.Code_CODE_NOT_FOUND:    codes.NotFound,
		commandpb.Code_CODE_EXISTS:       codes.AlreadyExists,
		commandpb.Code_CODE_PRECONDITION: codes.FailedPrecondition,
		commandpb.Code_CODE_CONFLICT:     codes.Aborted,
		commandpb.Code_CODE_REGRESSION:   codes.FailedPrecondition,
		commandpb.Code_CODE_FENCED:       codes.Aborted,
		commandpb.Code_CODE_LIMIT:        codes.ResourceExhausted,
		commandpb.Code_CODE_EPOCH:        codes.OutOfRange,
	}
	for n := range commandpb.Code_name {
		code := commandpb.Code(n)
		s := FromRejection(&commandpb.Rejection{Code: code, Reason: "because", Subject: "pipeline p", Current: 4,
			Violations: []string{"one", "two"}})
		if s.Code() != want[code] || s.Message() != "because" || OutcomeOf(s) != Refused {
			t.Errorf("%v: %v, %q", code, s, OutcomeOf(s))
		}
		var bad *errdetails.BadRequest
		for _, d := range s.Details() {
			switch d := d.(type) {
			case *errdetails.BadRequest:
				bad = d
			case *errdetails.ErrorInfo:
				if code == commandpb.Code_CODE_CONFLICT && d.Metadata["current"] != "4" {
					t.Errorf("the current version is missing: %v", d)
				}
				if d.Metadata["subject"] != "pipeline p" {
					t.Errorf("the subject is missing: %v", d)
				}
			}
		}
		if len(bad.GetFieldViolations()) != 2 {
			t.Errorf("violations: %v", bad)
		}
	}
	if FromRejection(nil) != nil {
		t.Error("a status for no rejection")
	}
	if s := InvalidArgument("name", "is empty"); s.Code() != codes.InvalidArgument || OutcomeOf(s) != NotDone {
		t.Errorf("%v", s)
	}
	if OutcomeOf(status.New(codes.Unavailable, "from a proxy")) != Unknown {
		t.Error("a status of somebody else says what it does not know")
	}
}
