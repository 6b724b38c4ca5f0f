package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// recoverer is what the recovery rows ask of a system beyond the loads.
type recoverer interface {
	// putMany commits keys with their values in one step.
	putMany(ctx context.Context, conn *grpc.ClientConn, keys []string, data [][]byte) error
	// has reads key: linearizably, or what the member asked holds itself.
	has(ctx context.Context, conn *grpc.ClientConn, key string, own bool) (bool, error)
	// progress is what the member reports about itself.
	progress(ctx context.Context, conn *grpc.ClientConn) (applied, committed uint64, err error)
	// save writes a snapshot of the member to the file path, synced.
	save(ctx context.Context, conn *grpc.ClientConn, path, compression string) error
	// restore makes the directory of member i of a new cluster from a file.
	restore(o *options, path, dir string, i int) *exec.Cmd
	// join prepares the start of the joiner. It returns errNoJoin when the
	// system cannot.
	join(ctx context.Context, c *cluster) error
	// promote makes the joiner a voter, or reports whether it is one already.
	promote(ctx context.Context, c *cluster, leader *grpc.ClientConn) (bool, error)
}

var errNoJoin = errors.New("this binary cannot join a cluster")

func (s *etcdSystem) putMany(ctx context.Context, conn *grpc.ClientConn, keys []string, data [][]byte) error {
	txn := &pb.TxnRequest{}
	for i, key := range keys {
		txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{
			RequestPut: &pb.PutRequest{Key: []byte(key), Value: data[i]},
		}})
	}
	_, err := pb.NewKVClient(conn).Txn(ctx, txn)
	return err
}

func (s *etcdSystem) has(ctx context.Context, conn *grpc.ClientConn, key string, own bool) (bool, error) {
	r, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(key), Serializable: own})
	return len(r.GetKvs()) == 1, err
}

func (s *etcdSystem) progress(ctx context.Context, conn *grpc.ClientConn) (applied, committed uint64, err error) {
	st, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
	return st.GetRaftAppliedIndex(), st.GetRaftIndex(), err
}

// save does what `etcdctl snapshot save` does; the sum is part of the stream.
func (s *etcdSystem) save(ctx context.Context, conn *grpc.ClientConn, path, _ string) error {
	stream, err := pb.NewMaintenanceClient(conn).Snapshot(ctx, &pb.SnapshotRequest{})
	if err != nil {
		return err
	}
	return toFile(path, func() ([]byte, error) {
		r, err := stream.Recv()
		return r.GetBlob(), err
	})
}

func (s *etcdSystem) restore(o *options, path, dir string, i int) *exec.Cmd {
	return exec.Command(o.etcdutl, "snapshot", "restore", path, "--data-dir", dir, "--name", fmt.Sprintf("m%d", i+1),
		"--initial-cluster", strings.Join(s.initial(), ","), "--initial-cluster-token", "restored",
		"--initial-advertise-peer-urls", s.peer(i))
}

func (s *etcdSystem) join(ctx context.Context, c *cluster) error {
	ctx, cancel := context.WithTimeout(ctx, c.o.patience)
	defer cancel()
	return withConn(c, 0, func(conn *grpc.ClientConn) error {
		for {
			_, err := pb.NewClusterClient(conn).MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{s.peer(joiner)}, IsLearner: true})
			// It wants its members to have been connected for some seconds.
			if status.Code(err) != codes.Unavailable || !settle(ctx, 200*time.Millisecond) {
				return err
			}
		}
	})
}

func (s *etcdSystem) promote(ctx context.Context, _ *cluster, leader *grpc.ClientConn) (bool, error) {
	api := pb.NewClusterClient(leader)
	list, err := api.MemberList(ctx, &pb.MemberListRequest{})
	if err != nil {
		return false, err
	}
	for _, m := range list.GetMembers() {
		if !m.GetIsLearner() {
			continue
		}
		_, err := api.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: m.GetID()})
		if status.Code(err) == codes.FailedPrecondition {
			return false, nil // not in sync with the leader, it says
		}
		return err == nil, err
	}
	return true, nil
}

func (s *routerSystem) putMany(ctx context.Context, conn *grpc.ClientConn, keys []string, data [][]byte) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := clusterpb.NewCommitsClient(conn).Commit(ctx)
	if err != nil {
		return err
	}
	req := &clusterpb.CommitRequest{Id: 1}
	for i, key := range keys {
		req.Ops = append(req.Ops, &clusterpb.CommitOp{Op: &clusterpb.CommitOp_Checkpoint{
			Checkpoint: &clusterpb.CheckpointCommit{ServiceId: key, CheckpointId: "b", Data: data[i]},
		}})
	}
	if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	resp, err := stream.Recv()
	if err != nil {
		return err
	}
	for _, r := range resp.GetResults() {
		if r.GetOutcome() != clusterpb.Outcome_OUTCOME_DONE {
			return fmt.Errorf("a batch was not committed: %s", r.GetMessage())
		}
	}
	return nil
}

// stale asks the member for what it knows itself.
func stale(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
}

func (s *routerSystem) has(ctx context.Context, conn *grpc.ClientConn, key string, own bool) (bool, error) {
	if own {
		ctx = stale(ctx)
	}
	r, err := checkpointpb.NewCheckpointServiceClient(conn).GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: key})
	return r.GetFound(), err
}

func (s *routerSystem) progress(ctx context.Context, conn *grpc.ClientConn) (applied, committed uint64, err error) {
	st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(stale(ctx), &adminpb.GetClusterStatusRequest{})
	return st.GetAppliedIndex(), st.GetCommitIndex(), err
}

func (s *routerSystem) save(ctx context.Context, conn *grpc.ClientConn, path, compression string) error {
	api := backuppb.NewBackupServiceClient(conn)
	made, err := api.CreateSnapshot(ctx, &backuppb.CreateSnapshotRequest{})
	if err != nil {
		return err
	}
	c := backuppb.CompressionType_COMPRESSION_ZSTD
	if compression == "none" {
		c = backuppb.CompressionType_COMPRESSION_NONE
	}
	stream, err := api.StreamSnapshot(ctx, &backuppb.StreamSnapshotRequest{SnapshotId: made.GetSnapshotId(), Compression: c})
	if err != nil {
		return err
	}
	err = toFile(path, func() ([]byte, error) {
		r, err := stream.Recv()
		return r.GetData(), err
	})
	_, derr := api.DeleteSnapshot(ctx, &backuppb.DeleteSnapshotRequest{SnapshotId: made.GetSnapshotId()})
	return errors.Join(err, derr)
}

func (s *routerSystem) restore(o *options, path, dir string, i int) *exec.Cmd {
	args := []string{"snapshot", "restore", "--data-dir", dir, "--node-id", fmt.Sprint(i + 1), "--cluster-name", "bench"}
	return exec.Command(o.router, append(append(args, s.peers()...), path)...)
}

func (s *routerSystem) join(_ context.Context, c *cluster) error {
	help, err := exec.Command(c.o.router, "serve", "--help").CombinedOutput()
	if err == nil && !strings.Contains(string(help), "--join") {
		err = errNoJoin
	}
	return err
}

// promote only looks: the router promotes by itself.
func (s *routerSystem) promote(ctx context.Context, _ *cluster, leader *grpc.ClientConn) (bool, error) {
	list, err := clusterpb.NewClusterClient(leader).ListMembers(stale(ctx), &clusterpb.ListMembersRequest{})
	for _, m := range list.GetMembers() {
		if m.GetNodeId() == joiner+1 && (m.GetRole() == "voter" || m.GetRole() == "leader") {
			return true, nil
		}
	}
	return false, err
}

// toFile writes what next returns until io.EOF to a new file, synced, under its
// name only when it is whole.
func toFile(path string, next func() ([]byte, error)) error {
	f, err := os.Create(path + ".part")
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		data, err := next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if _, err := f.Write(data); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(path+".part", path)
}
