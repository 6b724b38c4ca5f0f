package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"conveyor.etl/router/rpc/routerpb/commonpb"
	"conveyor.etl/router/rpc/routerpb/registrypb"
)

// registered lists one service as a node shows it, nil when it is not registered.
func registered(ctx context.Context, n *Node, id string) (*registrypb.RegisteredService, error) {
	list, err := n.Registry().ListServices(ctx, &registrypb.ListServicesRequest{IncludeUnhealthy: true})
	for _, s := range list.GetServices() {
		if s.GetIdentity().GetServiceId() == id {
			return s, err
		}
	}
	return nil, err
}

// TestServiceDrainSurvivesTheLeader: a service that is deregistered in peace is known
// to drain by every node, also when the leader dies; it is removed once it has left
// its group, and one that stays silent and expires, after the retention. On the way,
// each node that is asked for the status shows what all that live have applied.
func TestServiceDrainSurvivesTheLeader(t *testing.T) {
	c := NewCluster(t, Options{Args: []string{
		"--liveness-heartbeat-interval", "1s", "--liveness-suspect-after", "2s", "--liveness-expire-after", "3s", "--liveness-service-retention", "5s",
	}})
	leader := c.Leader()
	for _, id := range []string{"drains", "silent"} {
		eventually(t, 20*time.Second, id+" is registered", func(ctx context.Context) error {
			r, err := c.Followers(leader)[0].Registry().Register(ctx, &registrypb.RegisterRequest{
				Identity:          &commonpb.ServiceIdentity{ServiceId: id, Name: "e2e-filter", ServiceType: commonpb.ServiceType_SERVICE_TYPE_TRANSFORM},
				Endpoint:          &commonpb.Endpoint{Host: "10.0.0.1", Port: 8080},
				HeartbeatInterval: durationpb.New(map[string]time.Duration{"drains": time.Hour}[id]),
			})
			return ok(err, r.GetSuccess(), "it is refused")
		})
	}
	eventually(t, 20*time.Second, "it is in a group", func(ctx context.Context) error {
		r, err := leader.Registry().JoinGroup(ctx, &registrypb.JoinGroupRequest{ServiceId: "drains", GroupId: "g", PartitionCount: 3})
		return ok(err, r.GetSuccess(), r.GetError())
	})
	eventually(t, 20*time.Second, "it is to drain", func(ctx context.Context) error {
		r, err := c.Followers(leader)[0].Registry().Deregister(ctx, &registrypb.DeregisterRequest{
			ServiceId: "drains", Graceful: true, DrainTimeout: durationpb.New(time.Hour),
		})
		return ok(err, r.GetSuccess() && r.GetDraining() && r.GetRemovedBy() != nil, fmt.Sprint(r))
	})
	leader.Kill()
	next := c.Leader(c.running()...)
	for _, n := range c.running() {
		eventually(t, 20*time.Second, "every node knows that it drains", func(ctx context.Context) error {
			s, err := registered(ctx, n, "drains")
			if err == nil && s.GetRemovedBy() == nil {
				err = fmt.Errorf("node %d shows %v", n.ID, s)
			}
			return err
		})
		eventually(t, 20*time.Second, "the status shows all that live", func(ctx context.Context) error {
			for _, m := range statusOf(t, n).GetNodes() {
				if known := m.GetAppliedIndex() > 0 && m.GetVersion() != ""; known != (m.GetNodeId() != leader.ID) {
					return fmt.Errorf("node %d shows of node %d: applied %d, version %q", n.ID, m.GetNodeId(), m.GetAppliedIndex(), m.GetVersion())
				}
			}
			return nil
		})
	}
	eventually(t, 20*time.Second, "it leaves its group", func(ctx context.Context) error {
		r, err := next.Registry().LeaveGroup(ctx, &registrypb.LeaveGroupRequest{ServiceId: "drains", GroupId: "g"})
		return ok(err, r.GetSuccess(), "it is refused")
	})
	for id, why := range map[string]string{"drains": "it has drained", "silent": "it has been expired for long"} {
		eventually(t, 60*time.Second, why, func(ctx context.Context) error {
			s, err := registered(ctx, c.running()[0], id)
			if err == nil && s != nil {
				err = fmt.Errorf("it is still there: %v", s)
			}
			return err
		})
	}
	leader.Start()
	c.WaitServing(leader)
	c.WaitSameState()
}
