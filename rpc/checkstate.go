package rpc

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// CheckState compares the states of all members. Any node takes the call; the
// leader does the work, for as long as the deadline of the call allows: a full
// check reads everything, which the default may be too short for.
func (a *clusterAPI) CheckState(ctx context.Context, req *clusterpb.CheckStateRequest) (*clusterpb.CheckStateResponse, error) {
	if a.cfg.CheckState == nil {
		return nil, status.Error(codes.Unimplemented, "this node cannot compare the members' states")
	}
	resp, err := a.cfg.CheckState(ctx, req.GetFull())
	var elsewhere *raftnode.NotLeaderError
	if !errors.As(err, &elsewhere) {
		return resp, err
	}
	conn, rctx, rerr := a.relay.connect(ctx)
	if rerr != nil {
		return nil, rerr
	}
	return clusterpb.NewClusterClient(conn).CheckState(rctx, req)
}
