package rpc

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// operationToAPI shows an operation.
func operationToAPI(op *commandpb.Operation) *clusterpb.Operation {
	at := func(ms uint64) *timestamppb.Timestamp {
		if ms == 0 {
			return nil
		}
		return &timestamppb.Timestamp{Seconds: int64(ms / 1000), Nanos: int32(ms%1000) * 1e6}
	}
	var left uint64
	if op.State == commandpb.OperationState_OPERATION_STATE_RUNNING && op.Rate > 0 && op.Total > op.Done {
		left = uint64(float64(op.Total-op.Done) / float64(op.Rate) * 1000)
	}
	return &clusterpb.Operation{
		Rate: op.Rate, LeftMs: left,
		OperationId: op.OperationId, Kind: op.Kind, State: clusterpb.OperationState(op.State), Subject: op.Subject,
		NodeId: op.NodeId, Phase: op.Phase, Done: op.Done, Total: op.Total, Unit: op.Unit, Message: Plain(op.Message),
		StartedAt: at(op.StartedAtMs), UpdatedAt: at(op.UpdatedAtMs), EndedAt: at(op.EndedAtMs),
		CancelRequested: op.CancelRequested, Revision: op.ModRevision,
	}
}

// ListOperations lists the operations of the cluster, the newest first.
func (a *clusterAPI) ListOperations(ctx context.Context, req *clusterpb.ListOperationsRequest) (*clusterpb.ListOperationsResponse, error) {
	if err := checkText("kind", req.GetKind(), MaxText); err != nil {
		return nil, err
	}
	v, err := a.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	resp := &clusterpb.ListOperationsResponse{Revision: v.Revision()}
	err = v.Operations(func(op *commandpb.Operation) bool {
		running := op.State == commandpb.OperationState_OPERATION_STATE_RUNNING
		if (running || !req.GetRunningOnly()) && (req.GetKind() == "" || op.Kind == req.GetKind()) {
			resp.Operations = append(resp.Operations, operationToAPI(op))
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func unknownOperation(id string) error {
	return status.Errorf(codes.NotFound, "operation %s is unknown: the last 1,000 that ended are kept", id)
}

// GetOperation returns one operation.
func (a *clusterAPI) GetOperation(ctx context.Context, req *clusterpb.GetOperationRequest) (*clusterpb.Operation, error) {
	if err := checkID("operation_id", req.GetOperationId()); err != nil {
		return nil, err
	}
	v, err := a.latest(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	op, err := v.Operation(req.OperationId)
	if err != nil {
		return nil, err
	}
	if op == nil {
		return nil, unknownOperation(req.OperationId)
	}
	return operationToAPI(op), nil
}

// CancelOperation asks an operation to end. It does so at the next point at which
// nothing is half done; WaitOperation tells.
func (a *clusterAPI) CancelOperation(ctx context.Context, req *clusterpb.CancelOperationRequest) (*clusterpb.Operation, error) {
	if err := checkID("operation_id", req.GetOperationId()); err != nil {
		return nil, err
	}
	op, err := a.GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: req.GetOperationId()})
	if err != nil {
		return nil, err
	}
	if op.GetState() != clusterpb.OperationState_OPERATION_STATE_RUNNING {
		return nil, status.Errorf(codes.FailedPrecondition, "operation %s has ended already, as %s; nothing was changed",
			req.OperationId, strings.ToLower(strings.TrimPrefix(op.GetState().String(), "OPERATION_STATE_")))
	}
	res, err := a.submit(ctx, &commandpb.Command{Op: &commandpb.Command_CancelOperation{
		CancelOperation: &commandpb.CancelOperation{OperationId: req.OperationId},
	}})
	if err != nil {
		return nil, err
	}
	if rej := res.GetRejection(); rej != nil {
		return nil, FromRejection(rej).Err()
	}
	return a.GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: req.OperationId})
}

// WaitOperation answers when an operation has ended, or shortly before the
// deadline of the call.
func (a *clusterAPI) WaitOperation(ctx context.Context, req *clusterpb.WaitOperationRequest) (*clusterpb.Operation, error) {
	if _, err := a.GetOperation(ctx, &clusterpb.GetOperationRequest{OperationId: req.GetOperationId()}); err != nil {
		return nil, err
	}
	op, err := recovery.Wait(ctx, a.cfg.State, req.OperationId)
	if err != nil {
		return nil, err
	}
	if op == nil {
		return nil, unknownOperation(req.OperationId)
	}
	return operationToAPI(op), nil
}

// UndoRestore restores the state that the last restore replaced.
func (a *clusterAPI) UndoRestore(ctx context.Context, req *clusterpb.UndoRestoreRequest) (*clusterpb.UndoRestoreResponse, error) {
	if a.cfg.Recovery == nil {
		return nil, fmt.Errorf("%w: this node keeps no snapshots", ErrNotProposed)
	}
	if err := a.reader.Wait(ctx); err != nil {
		return nil, err
	}
	id, err := a.cfg.Recovery.UndoID(ctx)
	if err != nil {
		return nil, err
	}
	opID, err := a.cfg.Recovery.Restore(ctx, id, fmt.Sprintf("the state before the last restore (snapshot %s)", id))
	if err != nil {
		return nil, err
	}
	var op *commandpb.Operation
	if req.GetDetach() {
		v := a.cfg.State.Latest()
		defer v.Close()
		op, err = v.Operation(opID)
	} else {
		op, err = recovery.Wait(ctx, a.cfg.State, opID)
	}
	if err != nil {
		return nil, err
	}
	return &clusterpb.UndoRestoreResponse{
		Operation: operationToAPI(op), Epoch: a.cfg.State.Epoch(), Revision: a.cfg.State.Revision(),
	}, nil
}

func summarizeOperation(id string, prev, next *commandpb.Operation) string {
	switch {
	case next == nil:
		return fmt.Sprintf("operation %s forgotten", id)
	case prev == nil:
		return fmt.Sprintf("%s of %s begun on node %d as %s", next.Kind, next.Subject, next.NodeId, id)
	case next.State != prev.State:
		line := fmt.Sprintf("%s of %s: %s", next.Kind, next.Subject, strings.ToLower(strings.TrimPrefix(next.State.String(), "OPERATION_STATE_")))
		if next.Message != "" {
			line += ", " + next.Message
		}
		return line
	case next.CancelRequested && !prev.CancelRequested:
		return fmt.Sprintf("%s of %s is to be cancelled", next.Kind, next.Subject)
	}
	return fmt.Sprintf("%s of %s: %s, %d of %d %s", next.Kind, next.Subject, next.Phase, next.Done, next.Total, next.Unit)
}
