package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newClusterCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "Show and steer the cluster"}
	cmd.AddCommand(newClusterStatusCommand(a), newClusterCheckCommand(a), newMemberListCommand(a, "members"), newTransferLeaderCommand(a),
		newWhatIfCommand(a), newRecoverCommand(a))
	return cmd
}

func newClusterStatusCommand(a *app) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the nodes, who leads and how far each is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				st, err := c.Admin.GetClusterStatus(ctx, &adminpb.GetClusterStatusRequest{})
				if err != nil {
					return err
				}
				quality := clusterQuality(ctx, c, st)
				if a.format != output.Table {
					err = output.Document(a.stdout, a.format, shownStatus{st, qualityOf(quality)})
				} else {
					err = printStatus(a, st, quality)
				}
				if err == nil && check && st.GetHealth() != adminpb.ClusterHealth_CLUSTER_HEALTH_HEALTHY {
					return silentError{exitCheckFailed}
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "exit with code 8 unless the cluster is healthy")
	return cmd
}

func printStatus(a *app, st *adminpb.GetClusterStatusResponse, quality *clusterpb.GetPlacementQualityResponse) error {
	head := &output.Grid{}
	head.Add("CLUSTER", fmt.Sprintf("%s (%s)", st.GetClusterName(), st.GetClusterId()))
	head.Add("HEALTH", short(st.GetHealth().String(), "CLUSTER_HEALTH_"))
	leader := "none"
	if st.GetLeaderId() != 0 {
		leader = "node " + strconv.FormatUint(st.GetLeaderId(), 10)
	}
	head.Add("LEADER", fmt.Sprintf("%s, term %d", leader, st.GetTerm()))
	head.Add("REVISION", st.GetRevision())
	head.Add("ANSWERED BY", fmt.Sprintf("node %d, commit %d, applied %d, version %s",
		st.GetNodeId(), st.GetCommitIndex(), st.GetAppliedIndex(), output.Clean(st.GetVersion())))
	if n := st.GetDrainingSidecars(); n > 0 {
		head.Add("DRAINING", count(n, "sidecar", "sidecars"))
	}
	if n := st.GetPendingHandovers(); n > 0 {
		head.Add("HANDOVERS", count(n, "waits", "wait")+" for a sidecar to let go of a stage")
	}
	if n := st.GetHeldMoves(); n > 0 {
		head.Add("HELD MOVES", count(n, "stage waits", "stages wait")+" for the movement budget (placement.moves_per_minute)")
	}
	if quality != nil {
		head.Add("PLACEMENT", qualityLine(quality))
	}
	for _, alarm := range st.GetAlarms() {
		head.Add("ALARM", alarm)
	}
	if err := head.Write(a.stdout); err != nil {
		return err
	}
	fmt.Fprintln(a.stdout)
	g := &output.Grid{Header: []string{"NODE", "ROLE", "HEALTHY", "MATCH", "APPLIED", "PEER ADDRESS", "CLIENT ADDRESS", "VERSION"}}
	for _, n := range st.GetNodes() {
		g.Add(n.GetNodeId(), short(n.GetRole().String(), "NODE_ROLE_"), health(n.GetHealthy(), n.GetHealthUnknown()), known(n.GetMatchIndex()),
			known(n.GetAppliedIndex()), n.GetAddress(), n.GetClientAddress(), n.GetVersion())
	}
	return g.Write(a.stdout)
}

// health shows whether a node is up. Right after a leader change the new leader
// has neither heard of a node nor missed it.
func health(healthy, unknown bool) string {
	if unknown {
		return "unknown"
	}
	return yesNo(healthy)
}

// known shows an index; 0, which no node is ever at, means that the node that
// answered was not told.
func known(index uint64) string {
	if index == 0 {
		return "-"
	}
	return strconv.FormatUint(index, 10)
}

func newTransferLeaderCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "transfer-leader [NODE]",
		Short: "Hand leadership to a node, or to the best one",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &clusterpb.TransferLeaderRequest{}
			if len(args) == 1 {
				id, err := strconv.ParseUint(args[0], 10, 64)
				if err != nil || id == 0 {
					return usageError{cmd, fmt.Errorf("%q is not a node id", args[0])}
				}
				req.NodeId = id
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.TransferLeader(ctx, req)
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				fmt.Fprintf(a.stdout, "node %d leads in term %d\n", reply.GetLeaderId(), reply.GetTerm())
				return nil
			})
		},
	}
}
