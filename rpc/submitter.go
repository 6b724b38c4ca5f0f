package rpc

import (
	"context"

	"conveyor.etl/router/router/commandpb"
)

// Submitter turns a command into its result, whichever node leads.
type Submitter interface {
	// Submit replicates cmd and returns what every replica computed for it. A
	// refusal by the state machine is a result (Result.Rejection), not an
	// error. Without a leader Submit waits until there is one, for 5 s or until
	// ctx is done. When it returns an error, the error says whether cmd can
	// still take effect: see Status. cmd must not be modified before Submit
	// has returned, nor afterwards when the error is that of ctx.
	Submit(ctx context.Context, cmd *commandpb.Command) (*commandpb.Result, error)

	// SubmitFunc is Submit without a goroutine per command: done is called
	// exactly once, from any goroutine and perhaps before SubmitFunc returns,
	// with the result and the log index it was applied at, or with an error.
	// done must not block. cmd must not be modified until then. Commands in
	// flight at the same time may be applied in any order.
	SubmitFunc(cmd *commandpb.Command, done func(result *commandpb.Result, index uint64, err error))
}
