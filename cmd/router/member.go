package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newMemberCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "member", Aliases: []string{"members"}, Short: "Show and change who is in the cluster",
		Long: `Show and change who is in the cluster.

A new node joins by itself: start it with 'router serve --join HOST:PORT' and the
client address of any member. It becomes a learner, gets the state, and is made a
voter by the leader once it has caught up. To take a node out, remove it; its id
is never used again. To exchange one, let the new one join and replace the old one.`,
	}
	cmd.AddCommand(newMemberListCommand(a, "list"), newMemberAddCommand(a), newMemberPromoteCommand(a),
		newMemberRemoveCommand(a), newMemberReplaceCommand(a), newMemberUpdateCommand(a))
	return cmd
}

// newMemberListCommand is `member list` and `cluster members`.
func newMemberListCommand(a *app, name string) *cobra.Command {
	return &cobra.Command{
		Use:   name,
		Short: "Show the members: who votes, who learns, how far each is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.ListMembers(ctx, &clusterpb.ListMembersRequest{})
				if err != nil {
					return err
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				g := &output.Grid{Header: []string{"NODE", "ROLE", "HEALTHY", "LAG", "REPLICATION", "PEER ADDRESS", "CLIENT ADDRESS", "DISK"}}
				for _, m := range reply.GetMembers() {
					role := m.GetRole()
					if m.GetReadReplica() {
						role += ", read replica"
					}
					g.Add(m.GetNodeId(), role, health(m.GetHealthy(), m.GetHealthUnknown()), lag(m, reply), dash(m.GetState()),
						dash(m.GetPeerAddr()), dash(m.GetClientAddr()), dash(m.GetDiskId()))
				}
				if err := g.Write(a.stdout); err != nil {
					return err
				}
				for _, alarm := range reply.GetAlarms() {
					fmt.Fprintf(a.stdout, "\nALARM: %s\n", output.Clean(alarm))
				}
				if removed := reply.GetRemoved(); len(removed) > 0 {
					fmt.Fprintf(a.stdout, "\nRemoved, never to be used again: %s\n", idList(removed))
				}
				return nil
			})
		},
	}
}

// lag shows how many entries a member lacks, when the leader has said so.
func lag(m *clusterpb.Member, reply *clusterpb.ListMembersResponse) string {
	if m.GetState() == "" && m.GetNodeId() != reply.GetLeaderId() {
		return "-"
	}
	return strconv.FormatUint(m.GetLag(), 10)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func idList(ids []uint64) string {
	parts := make([]string, len(ids))
	for i, id := range ids {
		parts[i] = strconv.FormatUint(id, 10)
	}
	return strings.Join(parts, ", ")
}

func nodeArg(cmd *cobra.Command, text string) (uint64, error) {
	id, err := strconv.ParseUint(text, 10, 64)
	if err != nil || id == 0 {
		return 0, usageError{cmd, fmt.Errorf("%q is not a node id", text)}
	}
	return id, nil
}

func newMemberAddCommand(a *app) *cobra.Command {
	req := &clusterpb.AddMemberRequest{}
	cmd := &cobra.Command{
		Use:   "add PEER_ADDRESS",
		Short: "Make room for a node before it is started",
		Long: `Make room for a node before it is started: it becomes a learner, which receives
the log and does not vote. Start it with 'router serve --join ... --node-id ID'.
A node that is started with --join does not need this.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.PeerAddr = args[0]
			return a.changeMember(cmd, "added as a learner", func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
				return c.AddMember(ctx, req)
			})
		},
	}
	cmd.Flags().Uint64Var(&req.NodeId, "id", 0, "id of the node; 0 = the next that was never used")
	cmd.Flags().BoolVar(&req.ReadReplica, "read-replica", false, "a learner on purpose: it serves reads and is never promoted by itself")
	return cmd
}

func newMemberPromoteCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "promote NODE",
		Short: "Make a learner that has caught up a voter",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.changeMember(cmd, "votes now", func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
				return c.PromoteMember(ctx, &clusterpb.PromoteMemberRequest{NodeId: id})
			})
		},
	}
}

func newMemberRemoveCommand(a *app) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "remove NODE",
		Short: "Take a node out of the cluster for good",
		Long: `Take a node out of the cluster for good. Its id is never used again. A leader
hands leadership over first. A removal after which too few voters would be alive
is refused. The node stops by itself; erase its data directory.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeArg(cmd, args[0])
			if err != nil {
				return err
			}
			if !yes {
				if err := a.confirm(cmd.Context(), fmt.Sprintf("Remove node %d for good?", id)); err != nil {
					return err
				}
			}
			return a.changeMember(cmd, "removed", func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
				return c.RemoveMember(ctx, &clusterpb.RemoveMemberRequest{NodeId: id})
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

func newMemberReplaceCommand(a *app) *cobra.Command {
	var yes bool
	req := &clusterpb.ReplaceMemberRequest{}
	cmd := &cobra.Command{
		Use:   "replace OLD NEW",
		Short: "Exchange a voter for a node that has joined",
		Long: `Exchange voter OLD for node NEW, which has joined with 'router serve --join' (with
--read-replica it is certain not to have become a voter by itself before). First the
versions, the connections in both directions, the disk and the clock are checked;
then, once NEW has caught up, one change puts it in the place of OLD, so that the
cluster is never weaker than before. A leader hands leadership over first. It is an
operation: 'router operation cancel' ends it, and leaves the cluster as it was, up
to the moment of the exchange; it survives a change of leader.

Exit codes: 0 done, 3 one of the two is no member, 4 a check failed and nothing was begun, 8 it failed or was
cancelled, or a check failed with --check, 7 --timeout passed first (it goes on).`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if req.OldNodeId, err = nodeArg(cmd, args[0]); err != nil {
				return err
			}
			if req.NewNodeId, err = nodeArg(cmd, args[1]); err != nil {
				return err
			}
			if req.OldNodeId == req.NewNodeId {
				return usageError{cmd, fmt.Errorf("node %d cannot take its own place: the new node is that of the node to be replaced", req.OldNodeId)}
			}
			if !yes && !req.PreflightOnly {
				if err := a.replaceable(cmd, req.OldNodeId, req.NewNodeId); err != nil {
					return err
				}
				if err := a.confirm(cmd.Context(), fmt.Sprintf("Replace node %d by node %d, for good?", req.OldNodeId, req.NewNodeId)); err != nil {
					return err
				}
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.ReplaceMember(ctx, req)
				if err != nil {
					return err
				}
				if !req.Detach && reply.GetOperation() != nil {
					// The node that answered may be the one that was exchanged, and have
					// stopped: others know how it went on.
					if op := followOperation(ctx, c, reply.GetOperation()); op != nil {
						reply.Operation = op
					}
				}
				return a.printReplacement(req, reply)
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&req.PreflightOnly, "check", false, "only check whether it could be done; exit code 8 when not")
	cmd.Flags().BoolVar(&req.Detach, "detach", false, "do not wait for the end")
	return cmd
}

// replaceable checks an exchange before anybody is asked about it.
func (a *app) replaceable(cmd *cobra.Command, old, new uint64) error {
	return a.call(cmd, func(ctx context.Context, c *clients) error {
		reply, err := c.Cluster.ReplaceMember(ctx, &clusterpb.ReplaceMemberRequest{OldNodeId: old, NewNodeId: new, PreflightOnly: true})
		if err != nil {
			return toChange{readError{err}}
		}
		var failed []string
		code := exitConflict
		for _, check := range reply.GetChecks() {
			if check.GetOk() {
				continue
			}
			failed = append(failed, check.GetName()+": "+check.GetDetail())
			if strings.Contains(check.GetDetail(), "is no member") {
				code = exitNotFound
			}
		}
		if len(failed) > 0 {
			return codedError{code, fmt.Errorf("node %d cannot be replaced by node %d: %s; nothing was changed", old, new, strings.Join(failed, "; "))}
		}
		return nil
	})
}

// printReplacement shows what was checked and how far the exchange is.
func (a *app) printReplacement(req *clusterpb.ReplaceMemberRequest, reply *clusterpb.ReplaceMemberResponse) error {
	if a.format != output.Table {
		if err := output.Document(a.stdout, a.format, reply); err != nil {
			return err
		}
	} else {
		g := &output.Grid{Header: []string{"CHECK", "OK", "DETAIL"}}
		for _, check := range reply.GetChecks() {
			g.Add(check.GetName(), yesNo(check.GetOk()), check.GetDetail())
		}
		if err := g.Write(a.stdout); err != nil {
			return err
		}
		if reply.GetOperation() != nil {
			fmt.Fprintln(a.stdout)
			if err := printOperation(a, reply.GetOperation()); err != nil {
				return err
			}
		}
	}
	if req.PreflightOnly {
		for _, check := range reply.GetChecks() {
			if !check.GetOk() {
				return silentError{exitCheckFailed}
			}
		}
		return nil
	}
	if req.Detach {
		return nil
	}
	return operationOutcome(reply.GetOperation())
}

func newMemberUpdateCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "update NODE PEER_ADDRESS",
		Short: "Tell the others where a member is reached now",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := nodeArg(cmd, args[0])
			if err != nil {
				return err
			}
			return a.changeMember(cmd, "is reached at "+args[1]+" now", func(ctx context.Context, c clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error) {
				return c.UpdateMember(ctx, &clusterpb.UpdateMemberRequest{NodeId: id, PeerAddr: args[1]})
			})
		},
	}
}

// changeMember makes a change and prints what the membership is now.
func (a *app) changeMember(cmd *cobra.Command, done string,
	change func(context.Context, clusterpb.ClusterClient) (*clusterpb.ChangeMemberResponse, error)) error {
	return a.call(cmd, func(ctx context.Context, c *clients) error {
		reply, err := change(ctx, c.Cluster)
		if err != nil {
			return err
		}
		if a.format != output.Table {
			return output.Document(a.stdout, a.format, reply)
		}
		fmt.Fprintf(a.stdout, "node %d %s; voters %s", reply.GetMember().GetNodeId(), done, idList(reply.GetVoters()))
		if len(reply.GetLearners()) > 0 {
			fmt.Fprintf(a.stdout, "; learners %s", idList(reply.GetLearners()))
		}
		fmt.Fprintln(a.stdout)
		switch voters := reply.GetVoters(); {
		case len(voters) == 2:
			fmt.Fprintln(a.stdout, "With two voters, losing either one stops the cluster: let a third node join.")
		case len(voters) == 1 && slices.Contains(reply.GetLearners(), reply.GetMember().GetNodeId()) && !reply.GetMember().GetReadReplica():
			fmt.Fprintln(a.stdout, "Once it votes there are two voters, and losing either one stops the cluster: let a third node join soon.")
		}
		return nil
	})
}
