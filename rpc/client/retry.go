package client

import (
	"context"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// callKind says how a call may be repeated.
type callKind int

const (
	// read changes nothing: repeat it freely.
	read callKind = iota
	// mutation carries a request id: repeat it freely.
	mutation
	// action has an effect that the request id does not cover: repeat it only
	// when it was certainly not done.
	action
)

// kindOf knows the methods of the API; a method it does not know counts as an
// action.
func kindOf(method string) callKind {
	switch method[strings.LastIndexByte(method, '/')+1:] {
	case "GetPipeline", "ListPipelines", "GetClusterStatus", "GetMetrics",
		"ListServices", "GetServiceEndpoints",
		"GetSourceOffset", "GetWatermark", "GetCheckpoint", "GetGroupOffsets", "GetPipelineCheckpoints",
		"GetStateHash", "ListSidecars", "GetSidecar", "ListGroups", "GetGroup",
		"ListMembers", "ListOperations", "GetOperation", "WaitOperation", "CheckState",
		"GetStateMetadata", "ListSnapshots", "GetConvergence", "AwaitPlanned",
		"ExplainPipeline", "PlanPipelines", "WhatIf", "GetPlacementQuality", "GetPlacementHolds",
		// A node that asks again is known by the id of its directory.
		"JoinMember",
		// A heartbeat says the same however often it is said.
		"Heartbeat", "Check":
		return read
	case "CreatePipeline", "UpdatePipeline", "DeletePipeline", "EnablePipeline", "DisablePipeline",
		"RegisterSidecar", "DeregisterSidecar", "DrainSidecar", "UndrainSidecar",
		"Register", "Deregister", "JoinGroup", "LeaveGroup",
		"CommitOffset", "ReportWatermark", "SaveCheckpoint", "CommitGroupOffset",
		"CancelOperation":
		return mutation
	}
	return action
}

// verdict is what a failure means for the next attempt.
type verdict struct {
	repeat    bool          // the call may be made again
	elsewhere bool          // this node is not the one to make it on
	wait      time.Duration // the cluster asks for this pause
}

// judge decides by the code and by what the cluster says of the outcome.
func judge(err error, kind callKind) verdict {
	st, ok := status.FromError(err)
	if !ok {
		return verdict{}
	}
	outcome, wait := details(st)
	safe := kind != action || outcome == NotDone
	switch st.Code() {
	case codes.Unavailable:
		return verdict{repeat: safe, elsewhere: true, wait: wait}
	case codes.ResourceExhausted:
		// Busy passes, and says when to come back; a message that is too
		// large, a full disk or a limit of the state does not.
		return verdict{repeat: safe && outcome == NotDone && wait > 0, wait: wait}
	case codes.Unknown:
		// A command whose outcome is unknown, and nothing else of this code.
		return verdict{repeat: kind != action && outcome == Unknown, elsewhere: outcome == Unknown, wait: wait}
	case codes.DeadlineExceeded:
		// The attempt's, or the node's own; that of the caller ends the loop.
		return verdict{repeat: kind != action, elsewhere: true, wait: wait}
	}
	return verdict{}
}

// jitter spreads clients that failed together.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d; it returns false when ctx is done first or will be.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) <= d {
		return false
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Outcome says what a failed call leaves behind.
type Outcome string

const (
	// NotDone: nothing changed and nothing will.
	NotDone Outcome = "not_done"
	// Refused: the cluster considered the command and refused it.
	Refused Outcome = "refused"
	// Unknown: the command may or may not take effect. Make the call again
	// with the same request id, or read what the state is.
	Unknown Outcome = "unknown"
)

// OutcomeOf returns what the call that failed with err leaves behind, Unknown
// when the error does not say. nil is no failure and gives "".
func OutcomeOf(err error) Outcome {
	if err == nil {
		return ""
	}
	st, ok := status.FromError(err)
	if !ok {
		return Unknown
	}
	if o, _ := details(st); o != "" {
		return o
	}
	return Unknown
}

// stillUnknown returns err as the word on a call of which an earlier attempt may
// take effect: that a later one was certainly not done does not undo that. What
// every node says of the request itself, that it is malformed or refused, it
// would have said of the first attempt too, and stays.
func stillUnknown(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	outcome, _ := details(st)
	if outcome != NotDone || st.Code() != codes.Unavailable && st.Code() != codes.ResourceExhausted {
		return err
	}
	again, derr := status.New(codes.Unknown,
		"an earlier attempt may have been done; the last one was not: "+st.Message()).WithDetails(&errdetails.ErrorInfo{
		Reason: "AMBIGUOUS", Domain: errorDomain, Metadata: map[string]string{"outcome": string(Unknown)},
	})
	if derr != nil {
		return err
	}
	return again.Err()
}

// notConnected reports whether st was made up by gRPC because the node could not be
// connected to: then the call was not sent. Everything else that gRPC makes up
// may have happened after it was.
func notConnected(st *status.Status) bool {
	return st.Code() == codes.Unavailable && len(st.Details()) == 0 && strings.Contains(st.Message(), "transport: Error while dialing")
}

// details reads what the cluster attached to a status: the outcome ("" when
// none) and how long to wait.
func details(st *status.Status) (outcome Outcome, wait time.Duration) {
	if notConnected(st) {
		return NotDone, 0
	}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == errorDomain {
				outcome = Outcome(d.GetMetadata()["outcome"])
			}
		case *errdetails.RetryInfo:
			wait = d.GetRetryDelay().AsDuration()
		}
	}
	return outcome, wait
}
