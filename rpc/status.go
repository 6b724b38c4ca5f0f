package rpc

import (
	"context"
	"errors"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/snap"
)

// errorDomain is the domain of every ErrorInfo this program attaches.
const errorDomain = "conveyor.etl"

// Outcome says what a failed call leaves behind. It travels in
// ErrorInfo.metadata["outcome"].
type Outcome string

const (
	// NotDone: nothing changed and nothing will. Safe to repeat.
	NotDone Outcome = "not_done"
	// Refused: the state machine considered the command and refused it.
	Refused Outcome = "refused"
	// Unknown: the command may or may not take effect. Repeat it only with
	// the same request id or with a precondition.
	Unknown Outcome = "unknown"
)

// statusRow is one line of the table from errors to codes.
type statusRow struct {
	is      error
	code    codes.Code
	reason  string
	outcome Outcome
	retry   time.Duration // > 0: attached as RetryInfo
}

// statusTable maps sentinels to codes; the first row that matches wins. Two
// rules hold it together. UNAVAILABLE means certainly not done, so that generic
// retry policies are safe. Rows that say "not done" come before those of
// contexts: an error that is both (a deadline that passed while waiting for a
// leader, say) was made by someone who knew that nothing had been proposed.
func statusTable() []statusRow {
	const soon, later = 100 * time.Millisecond, time.Second
	return []statusRow{
		// Unknown first: when a repeat failed for a definite reason, the first
		// attempt may still have happened.
		{raftnode.ErrAmbiguous, codes.Unknown, "AMBIGUOUS", Unknown, 0},

		{ErrNotProposed, codes.Unavailable, "NOT_PROPOSED", NotDone, soon},
		{raftnode.ErrNoLeader, codes.Unavailable, "NO_LEADER", NotDone, soon},
		{raftnode.ErrStopping, codes.Unavailable, "STOPPING", NotDone, soon},
		{ErrUnreachable, codes.Unavailable, "LEADER_UNREACHABLE", NotDone, soon},
		{ErrQuarantined, codes.Unavailable, "QUARANTINED", NotDone, later},
		{ErrClosed, codes.Unavailable, "STOPPING", NotDone, soon},
		{raftnode.ErrOverwritten, codes.Unavailable, "OVERWRITTEN", NotDone, soon},
		{raftnode.ErrBusy, codes.ResourceExhausted, "BUSY", NotDone, soon},
		{ErrNoSpace, codes.ResourceExhausted, "NO_SPACE", NotDone, 0},
		{raftnode.ErrTooLarge, codes.InvalidArgument, "TOO_LARGE", NotDone, 0},
		{ErrInvalidCommand, codes.InvalidArgument, "INVALID_COMMAND", NotDone, 0},
		{raftnode.ErrMembershipPending, codes.FailedPrecondition, "MEMBERSHIP_PENDING", NotDone, later},
		{raftnode.ErrMembershipRefused, codes.FailedPrecondition, "MEMBERSHIP_REFUSED", NotDone, 0},
		{ErrPreflight, codes.FailedPrecondition, "PREFLIGHT_FAILED", NotDone, 0},
		{ErrOperationRunning, codes.FailedPrecondition, "OPERATION_RUNNING", NotDone, later},
		{raftnode.ErrTransferFailed, codes.Aborted, "TRANSFER_FAILED", Unknown, later},
		{raftnode.ErrStateBehindLog, codes.Unavailable, "STATE_BEHIND_LOG", NotDone, later},

		{ErrInvalidMetadata, codes.InvalidArgument, "INVALID_METADATA", NotDone, 0},
		{ErrEpoch, codes.OutOfRange, "EPOCH", NotDone, 0},
		{ErrFutureRevision, codes.OutOfRange, "FUTURE_REVISION", NotDone, 0},
		{ErrBehind, codes.Unavailable, "BEHIND", NotDone, soon},
		{ErrRefused, codes.PermissionDenied, "HANDSHAKE_REFUSED", NotDone, 0},
		{ErrSuperseded, codes.Aborted, "SUPERSEDED", NotDone, 0},
		{ErrOtherDisk, codes.FailedPrecondition, ReasonOtherDisk, NotDone, 0},
		{ErrMemberRemoved, codes.FailedPrecondition, ReasonMemberRemoved, NotDone, 0},
		{ErrMalformed, codes.InvalidArgument, "MALFORMED", NotDone, 0},

		{shelf.ErrNotFound, codes.NotFound, "SNAPSHOT_NOT_FOUND", NotDone, 0},
		{shelf.ErrExists, codes.AlreadyExists, "SNAPSHOT_EXISTS", NotDone, 0},
		{shelf.ErrSuspect, codes.FailedPrecondition, "SNAPSHOT_SUSPECT", NotDone, 0},
		{shelf.ErrQuota, codes.ResourceExhausted, "SNAPSHOT_QUOTA", NotDone, 0},
		{ErrSnapshotUnreachable, codes.Unavailable, "SNAPSHOT_UNREACHABLE", NotDone, later},
		{ErrStalled, codes.DeadlineExceeded, "TRANSFER_STALLED", NotDone, 0},
		{recovery.ErrBusy, codes.ResourceExhausted, "BUSY", NotDone, later},
		{recovery.ErrDamaged, codes.DataLoss, "SNAPSHOT_DAMAGED", NotDone, 0},
		{recovery.ErrNoUndo, codes.FailedPrecondition, "NO_UNDO", NotDone, 0},
		{archive.ErrNewerFormat, codes.FailedPrecondition, "ARCHIVE_NEWER_FORMAT", NotDone, 0},
		{archive.ErrTooLarge, codes.InvalidArgument, "ARCHIVE_TOO_LARGE", NotDone, 0},
		{archive.ErrNotArchive, codes.InvalidArgument, "NOT_AN_ARCHIVE", NotDone, 0},
		{archive.ErrCorrupt, codes.DataLoss, "ARCHIVE_CORRUPT", NotDone, 0},
		{archive.ErrOffset, codes.OutOfRange, "ARCHIVE_OFFSET", NotDone, 0},
		{archive.ErrClosed, codes.Unavailable, "STOPPING", NotDone, soon},
		{syscall.ENOSPC, codes.ResourceExhausted, "NO_SPACE", NotDone, 0},

		{snap.ErrNotFound, codes.NotFound, "IMAGE_NOT_FOUND", NotDone, 0},
		{snap.ErrExists, codes.AlreadyExists, "IMAGE_EXISTS", NotDone, 0},
		{snap.ErrCorrupt, codes.DataLoss, "IMAGE_CORRUPT", NotDone, 0},
		{snap.ErrNewerFormat, codes.FailedPrecondition, "IMAGE_NEWER_FORMAT", NotDone, 0},
		{snap.ErrInvalidID, codes.InvalidArgument, "IMAGE_INVALID_ID", NotDone, 0},
		{snap.ErrTooLarge, codes.InvalidArgument, "IMAGE_TOO_LARGE", NotDone, 0},
		{snap.ErrOutOfOrder, codes.Aborted, "IMAGE_OUT_OF_ORDER", NotDone, 0},
		{snap.ErrBadChunk, codes.Aborted, "IMAGE_BAD_CHUNK", NotDone, 0},
		{snap.ErrBusy, codes.Unavailable, "IMAGE_BUSY", NotDone, later},
		{snap.ErrNoSpace, codes.ResourceExhausted, "NO_SPACE", NotDone, 0},
		{snap.ErrClosed, codes.Unavailable, "IMAGE_CLOSED", NotDone, later},

		{router.ErrClosed, codes.Unavailable, "STOPPING", NotDone, soon},
		{router.ErrCompacted, codes.OutOfRange, "COMPACTED", NotDone, 0},
		{router.ErrFutureRevision, codes.OutOfRange, "FUTURE_REVISION", NotDone, 0},
		{router.ErrResync, codes.OutOfRange, "RESYNC", NotDone, 0},
		{router.ErrNotStaged, codes.FailedPrecondition, "NOT_STAGED", NotDone, 0},
		{router.ErrBadChunk, codes.DataLoss, "STAGE_CORRUPT", NotDone, 0},
		{router.ErrStateExists, codes.FailedPrecondition, "STATE_EXISTS", NotDone, 0},
		{router.ErrIndexPassed, codes.FailedPrecondition, "INDEX_PASSED", NotDone, 0},
		{router.ErrHashBusy, codes.ResourceExhausted, "HASH_BUSY", NotDone, later},
		{router.ErrNewerFormat, codes.FailedPrecondition, "STATE_NEWER_FORMAT", NotDone, 0},
		// These stop the node; what it had proposed, others may apply.
		{raftnode.ErrDiverged, codes.DataLoss, "DIVERGED", Unknown, 0},
		{raftnode.ErrDiskStalled, codes.Unknown, "DISK_STALLED", Unknown, 0},
		{router.ErrUnknownCommand, codes.DataLoss, "UNKNOWN_COMMAND", Unknown, 0},
		{router.ErrCorrupt, codes.DataLoss, "STATE_CORRUPT", Unknown, 0},
		{router.ErrLostMarker, codes.DataLoss, "STATE_CORRUPT", Unknown, 0},
		{router.ErrNoSpace, codes.ResourceExhausted, "NO_SPACE", Unknown, 0},

		// gRPC itself calls an expired deadline unknown: the command may have
		// been proposed before.
		{context.DeadlineExceeded, codes.DeadlineExceeded, "DEADLINE", Unknown, 0},
		{context.Canceled, codes.Canceled, "CANCELLED", Unknown, 0},
	}
}

// Status returns the gRPC status of err, and nil for nil. It is the only place
// where an error becomes a code. An err that is a status error already is
// returned as it is. An error that no row knows becomes INTERNAL with a fixed
// text: what went wrong inside is for the log, not for callers.
func Status(err error) *status.Status {
	if err == nil {
		return nil
	}
	if s, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return s.GRPCStatus()
	}
	var refused *recovery.RefusedError
	if errors.As(err, &refused) {
		return FromRejection(refused.Rejection)
	}
	var notLeader *raftnode.NotLeaderError
	ambiguous := errors.Is(err, raftnode.ErrAmbiguous)
	if !ambiguous && errors.As(err, &notLeader) {
		return newStatus(codes.Unavailable, err.Error(), "NOT_LEADER", NotDone, 50*time.Millisecond, map[string]string{
			"leader":    strconv.FormatUint(notLeader.Leader, 10),
			"peer_addr": notLeader.Addr,
			"term":      strconv.FormatUint(notLeader.Term, 10),
		})
	}
	for _, row := range statusTable() {
		if errors.Is(err, row.is) {
			return newStatus(row.code, err.Error(), row.reason, row.outcome, row.retry, revisionOf(err))
		}
	}
	return newStatus(codes.Internal, "internal error; the log of the node has the details",
		"INTERNAL", Unknown, 0, nil)
}

// revisionOf returns the metadata of errors that carry the current revision.
func revisionOf(err error) map[string]string {
	var future *FutureRevisionError
	var revision *router.RevisionError
	var epoch *EpochError
	var refused *RefusedError
	switch {
	case errors.As(err, &refused) && refused.Kind != "":
		return refused.metadata()
	case errors.As(err, &epoch):
		return map[string]string{
			"current_revision": strconv.FormatUint(epoch.Revision, 10),
			"current_epoch":    strconv.FormatUint(epoch.Current, 10),
		}
	case errors.As(err, &future):
		return map[string]string{"current_revision": strconv.FormatUint(future.Current, 10)}
	case errors.As(err, &revision):
		return map[string]string{"current_revision": strconv.FormatUint(revision.Current, 10)}
	}
	return nil
}

// rejectionCode gives a code of the state machine its gRPC code. Only codes
// whose repetition without a change can succeed get one that clients repeat.
func rejectionCode(c commandpb.Code) codes.Code {
	switch c {
	case commandpb.Code_CODE_INVALID:
		return codes.InvalidArgument
	case commandpb.Code_CODE_NOT_FOUND:
		return codes.NotFound
	case commandpb.Code_CODE_EXISTS:
		return codes.AlreadyExists
	case commandpb.Code_CODE_PRECONDITION, commandpb.Code_CODE_REGRESSION:
		return codes.FailedPrecondition
	case commandpb.Code_CODE_CONFLICT, commandpb.Code_CODE_FENCED:
		// ABORTED: read again, decide again, then repeat.
		return codes.Aborted
	case commandpb.Code_CODE_LIMIT:
		return codes.ResourceExhausted
	case commandpb.Code_CODE_EPOCH:
		// As for a revision that is no longer kept: what the caller knows is of
		// another state, and repeating does not help.
		return codes.OutOfRange
	}
	// A code of a newer version: refused is all that is known.
	return codes.FailedPrecondition
}

// FromRejection returns the status of a refusal, for calls whose reply has no
// field for it, and nil for nil.
func FromRejection(r *commandpb.Rejection) *status.Status {
	if r == nil {
		return nil
	}
	const prefix = "CODE_"
	reason := r.GetCode().String()
	if len(reason) > len(prefix) && reason[:len(prefix)] == prefix {
		reason = reason[len(prefix):]
	}
	meta := map[string]string{}
	if r.GetSubject() != "" {
		meta["subject"] = r.GetSubject()
	}
	switch r.GetCode() {
	case commandpb.Code_CODE_CONFLICT, commandpb.Code_CODE_FENCED, commandpb.Code_CODE_REGRESSION:
		meta["current"] = strconv.FormatUint(r.GetCurrent(), 10)
	case commandpb.Code_CODE_EPOCH:
		meta["current_revision"] = strconv.FormatUint(r.GetCurrent(), 10)
	}
	var more []protoadapt.MessageV1
	if len(r.GetViolations()) > 0 {
		bad := &errdetails.BadRequest{}
		for _, v := range r.GetViolations() {
			bad.FieldViolations = append(bad.FieldViolations,
				&errdetails.BadRequest_FieldViolation{Field: r.GetSubject(), Description: v})
		}
		more = append(more, bad)
	}
	return newStatus(rejectionCode(r.GetCode()), r.GetReason(), reason, Refused, 0, meta, more...)
}

// InvalidArgument returns the status of a malformed field of a request.
func InvalidArgument(field, description string) *status.Status {
	return newStatus(codes.InvalidArgument, field+": "+description, "INVALID", NotDone, 0,
		map[string]string{"field": field}, &errdetails.BadRequest{
			FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}},
		})
}

// Judge says of the error of a command whether nothing was and will be done, and
// whether repeating it does not help.
func Judge(err error) (notDone, final bool) {
	notDone = OutcomeOf(Status(err)) == NotDone
	final = notDone && (errors.Is(err, ErrNoSpace) || errors.Is(err, ErrInvalidCommand) || errors.Is(err, raftnode.ErrTooLarge))
	return notDone, final
}

// ReasonOtherDisk and ReasonMemberRemoved are the reasons of ErrOtherDisk and
// ErrMemberRemoved, which a node that joins acts on.
const (
	ReasonOtherDisk     = "OTHER_DISK"
	ReasonMemberRemoved = "MEMBER_REMOVED"
)

// ReasonOf returns the reason in the details of a status of this program, ""
// when there is none.
func ReasonOf(s *status.Status) string {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			return info.GetReason()
		}
	}
	return ""
}

// OutcomeOf returns what the failed call left behind as far as the status says,
// which is Unknown when it carries no such detail.
func OutcomeOf(s *status.Status) Outcome {
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			if o := Outcome(info.GetMetadata()["outcome"]); o != "" {
				return o
			}
		}
	}
	return Unknown
}

func newStatus(code codes.Code, text, reason string, outcome Outcome, retry time.Duration,
	meta map[string]string, more ...protoadapt.MessageV1) *status.Status {
	if meta == nil {
		meta = map[string]string{}
	}
	meta["outcome"] = string(outcome)
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Reason: reason, Domain: errorDomain, Metadata: meta}}
	if retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	s := status.New(code, text)
	if full, err := s.WithDetails(append(details, more...)...); err == nil {
		return full
	}
	return s // details are a service to the caller; the code is the contract
}
