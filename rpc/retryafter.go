package rpc

import (
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// retryAfter is an error whose status asks for a pause of its own instead of the
// one in the table.
type retryAfter struct {
	error
	after time.Duration
}

// Unwrap lets errors.Is see what it is.
func (e retryAfter) Unwrap() error { return e.error }

// GRPCStatus is the status of the error with the pause in its RetryInfo.
func (e retryAfter) GRPCStatus() *status.Status {
	p := Status(e.error).Proto()
	kept := p.Details[:0:0]
	for _, d := range p.Details {
		if !d.MessageIs((*errdetails.RetryInfo)(nil)) {
			kept = append(kept, d)
		}
	}
	if d, err := anypb.New(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.after)}); err == nil {
		kept = append(kept, d)
	}
	p.Details = kept
	return status.FromProto(p)
}
