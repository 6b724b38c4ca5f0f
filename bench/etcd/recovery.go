package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/bench"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// A cluster is left alone before something is measured on it, for at least quiet
// and until its members together use less than calmCPU of a processor, and the disk has
// what was written, so that what a load left to do (compactions, mostly, and hundreds of
// megabytes that the kernel begins to write some seconds later) is not measured with it.
// It is not waited for longer than patient.
const (
	quiet   = 3 * time.Second
	calmCPU = 0.25
	patient = time.Minute
)

// calm waits for that; false when ctx is done.
func calm(ctx context.Context, c *cluster) bool {
	for end := time.Now().Add(patient); ; {
		used := cpu(c)
		if !settle(ctx, quiet) {
			return false
		}
		if used() < calmCPU*quiet.Seconds() || time.Now().After(end) {
			syscall.Sync()
			return true
		}
	}
}

// measureRecovery runs the recovery rows among rows: all of one system on one
// cluster, since filling it takes longest.
func measureRecovery(ctx context.Context, o *options, rows []row, res *results) error {
	for _, s := range []system{newEtcd(o, false), newRouter(o)} {
		var mine []row
		for _, r := range rows {
			if r.recovery != nil && (s.streams() || !r.own) {
				mine = append(mine, r)
			}
		}
		if len(mine) == 0 || !strings.Contains(o.systems, s.name()) {
			continue
		}
		if err := recoveryOf(ctx, o, s, mine, res); err != nil {
			return fmt.Errorf("%s, row %w", s.name(), err)
		}
	}
	return nil
}

func recoveryOf(ctx context.Context, o *options, s system, rows []row, res *results) error {
	c, err := startCluster(ctx, o, s)
	if err != nil {
		return fmt.Errorf("%s: %w", rows[0].name, err)
	}
	defer c.stop()
	began := time.Now()
	if err := batches(ctx, c, 0, o.objects); err != nil {
		return fmt.Errorf("%s: %w", rows[0].name, err)
	}
	fmt.Printf("recovery  %-8s %d objects of 256 bytes (%s) in %.1f s\n", s.name(), o.objects, o.content, time.Since(began).Seconds())
	for _, r := range rows {
		if !calm(ctx, c) {
			return ctx.Err()
		}
		if err := r.recovery(ctx, c, res); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	return nil
}

// cpu returns a function that says how many seconds of processor time the
// members have used since: on a machine that others use too, this says more
// than the time that went by.
func cpu(c *cluster) func() float64 {
	before, _, err := c.usage()
	return func() float64 {
		after, _, err2 := c.usage()
		if errors.Join(err, err2) != nil {
			return 0
		}
		return (after - before).Seconds()
	}
}

// note prints a figure and keeps it.
func note(c *cluster, res *results, row, name string, v float64) {
	res.figure(row, c.s.name(), name, v)
	fmt.Printf("%-10s %-8s %-32s %10s\n", row, c.s.name(), name, number(v))
}

// create makes snapshot id through conn.
func create(ctx context.Context, conn *grpc.ClientConn, id string) (*backuppb.CreateSnapshotResponse, span, error) {
	began := time.Now()
	r, err := backuppb.NewBackupServiceClient(conn).CreateSnapshot(ctx, &backuppb.CreateSnapshotRequest{SnapshotId: id})
	return r, span{began, time.Now()}, err
}

func drop(ctx context.Context, conn *grpc.ClientConn, id string) error {
	_, err := backuppb.NewBackupServiceClient(conn).DeleteSnapshot(ctx, &backuppb.DeleteSnapshotRequest{SnapshotId: id})
	return err
}

// snapshotRow makes snapshots on the leader, which is where writes would notice,
// while clients write.
func snapshotRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	writes, stop := writeProbe(ctx, c, leader)
	defer stop()
	settle(ctx, 2*time.Second)
	var during, before []span
	var took []float64
	err = withConn(c, leader, func(conn *grpc.ClientConn) error {
		for n := range c.o.creates {
			from := time.Now()
			if !settle(ctx, time.Second) {
				return ctx.Err()
			}
			before = append(before, span{from, time.Now()})
			id := fmt.Sprintf("row-%d", n)
			_, s, err := create(ctx, conn, id)
			if err != nil {
				return err
			}
			during, took = append(during, s), append(took, bench.Millis(s.took()))
			if err := drop(ctx, conn, id); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	writes.reach(ctx, during[len(during)-1].to)
	stop()
	beside := writes.took(during...)
	calm, busy := p99(writes.took(before...)), p99(beside)
	note(c, res, "snapshot", "create median ms", median(took))
	note(c, res, "snapshot", "create max ms", slices.Max(took))
	note(c, res, "snapshot", "write p99 before ms", calm)
	note(c, res, "snapshot", "write p99 during ms", busy)
	note(c, res, "snapshot", "writes during", float64(len(beside)))
	note(c, res, "snapshot", "write p99 during / before", busy/calm)
	return nil
}

// download reads a snapshot away and returns its bytes before and behind
// compression.
func download(ctx context.Context, conn *grpc.ClientConn, id string, c backuppb.CompressionType) (raw, sent int64, err error) {
	stream, err := backuppb.NewBackupServiceClient(conn).StreamSnapshot(ctx, &backuppb.StreamSnapshotRequest{SnapshotId: id, Compression: c})
	if err != nil {
		return 0, 0, err
	}
	for {
		chunk, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return raw, sent, nil
		}
		if err != nil {
			return 0, 0, err
		}
		raw += int64(chunk.GetTotalBytes())
		sent += int64(len(chunk.GetData()))
	}
}

// streamRow downloads a snapshot from the leader. MB/s are of state: keys and
// values as the clients sent them, whatever they take on disk.
func streamRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	state := float64(c.o.objects) * (16 + 256) / 1e6
	return withConn(c, leader, func(conn *grpc.ClientConn) error {
		for _, way := range []struct {
			name string
			c    backuppb.CompressionType
		}{{"zstd", backuppb.CompressionType_COMPRESSION_ZSTD}, {"none", backuppb.CompressionType_COMPRESSION_NONE}} {
			made, _, err := create(ctx, conn, "row-"+way.name)
			if err != nil {
				return err
			}
			settle(ctx, time.Second)
			grown := watchResident(ctx, c.procs[leader].Process.Pid)
			began, used := time.Now(), cpu(c)
			raw, sent, err := download(ctx, conn, made.GetSnapshotId(), way.c)
			took := time.Since(began).Seconds()
			burnt := used()
			growth := grown()
			if err != nil {
				return err
			}
			note(c, res, "stream", way.name+" s", took)
			note(c, res, "stream", way.name+" MB/s", state/took)
			note(c, res, "stream", way.name+" CPU s", burnt)
			note(c, res, "stream", way.name+" MB sent", float64(sent)/1e6)
			if way.name == "zstd" {
				note(c, res, "stream", "image MB", float64(raw)/1e6)
				note(c, res, "stream", "resident growth MB", float64(growth)/1e6)
			}
			// The first download also computes the hash of the content.
			began = time.Now()
			if _, _, err := download(ctx, conn, made.GetSnapshotId(), way.c); err != nil {
				return err
			}
			note(c, res, "stream", way.name+" again MB/s", state/time.Since(began).Seconds())
			if err := drop(ctx, conn, made.GetSnapshotId()); err != nil {
				return err
			}
		}
		return nil
	})
}

// watchResident returns a function that says by how many bytes the resident
// memory of the process was at most above what it is now.
func watchResident(ctx context.Context, pid int) func() int64 {
	at := func() int64 {
		p, err := bench.ReadProcess(pid)
		if err != nil {
			return 0
		}
		return p.Resident
	}
	ctx, cancel := context.WithCancel(ctx)
	before, most := at(), int64(0)
	var watching sync.WaitGroup
	watching.Go(func() {
		for ok := true; ok; ok = settle(ctx, 20*time.Millisecond) {
			most = max(most, at())
		}
	})
	return func() int64 {
		cancel()
		watching.Wait()
		return most - before
	}
}

func validateRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	return withConn(c, leader, func(conn *grpc.ClientConn) error {
		made, _, err := create(ctx, conn, "row-validate")
		if err != nil {
			return err
		}
		// Some of the records differ, so that there is something to say.
		if err := batches(ctx, c, 0, c.o.objects/100); err != nil {
			return err
		}
		began, used := time.Now(), cpu(c)
		r, err := backuppb.NewBackupServiceClient(conn).RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{
			SnapshotId: made.GetSnapshotId(), ValidateOnly: true,
		})
		if err == nil && !r.GetSuccess() {
			err = errors.New(r.GetMessage())
		}
		if err != nil {
			return err
		}
		note(c, res, "validate", "validate s", time.Since(began).Seconds())
		note(c, res, "validate", "CPU s", used())
		return drop(ctx, conn, made.GetSnapshotId())
	})
}

// restoreRow restores a snapshot while clients write through the leader and read
// through every member.
func restoreRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	conn, err := dialFast(c.s.endpoint(c.o, leader))
	if err != nil {
		return err
	}
	defer closeConn(conn)
	made, _, err := create(ctx, conn, "row-restore")
	if err != nil {
		return err
	}
	if err := batches(ctx, c, 0, c.o.objects/10); err != nil {
		return err
	}
	// What the changes leave to be compacted is not the restore's.
	if !calm(ctx, c) {
		return ctx.Err()
	}
	writes, stopWrites := writeProbeAt(ctx, c, leader, c.o.restoreWrites)
	defer stopWrites()
	var reads []*probe
	for i := range members {
		r, stop := readProbe(ctx, c, i)
		defer stop()
		reads = append(reads, r)
	}
	settle(ctx, 2*time.Second)
	calm, probing := span{from: time.Now()}, cpu(c)
	settle(ctx, 5*time.Second)
	calm.to = time.Now()
	note(c, res, "restore", "cores before", probing()/calm.took().Seconds())

	during, used := span{from: time.Now()}, cpu(c)
	r, err := backuppb.NewBackupServiceClient(conn).RestoreSnapshot(ctx, &backuppb.RestoreSnapshotRequest{
		SnapshotId: made.GetSnapshotId(), Detach: true,
	})
	if err != nil {
		return err
	}
	if err := followRestore(ctx, c, conn, res, r.GetOperationId()); err != nil {
		return err
	}
	during.to = time.Now()
	note(c, res, "restore", "CPU s", used())
	writes.reach(ctx, during.to)
	settle(ctx, 2*time.Second)
	shown := span{during.from, time.Now()}
	note(c, res, "restore", "restore s", during.took().Seconds())
	const ordinary = 100 * time.Millisecond // shorter pauses happen without a restore
	sum, longest := writes.gaps(shown, ordinary)
	note(c, res, "restore", "writes paused ms", bench.Millis(sum))
	note(c, res, "restore", "longest write pause ms", bench.Millis(longest))
	_, longest = writes.gaps(calm, ordinary)
	note(c, res, "restore", "longest write pause before ms", bench.Millis(longest))
	a, b := p99(writes.took(calm)), p99(writes.took(during))
	note(c, res, "restore", "write p99 before ms", a)
	note(c, res, "restore", "write p99 during ms", b)
	n, last := writes.failed(shown)
	note(c, res, "restore", "writes failed", float64(n))
	if last != nil {
		fmt.Printf("restore    the last failed write: %v\n", last)
	}
	var worst time.Duration
	failed := 0
	for i, p := range reads {
		_, longest := p.gaps(shown, ordinary)
		note(c, res, "restore", fmt.Sprintf("read gap member %d ms", i+1), bench.Millis(longest))
		worst = max(worst, longest)
		n, last := p.failed(shown)
		if failed += n; n > 0 {
			fmt.Printf("restore    member %d failed %d reads, the last: %v\n", i+1, n, last)
		}
	}
	note(c, res, "restore", "longest read gap ms", bench.Millis(worst))
	note(c, res, "restore", "reads failed", float64(failed))
	return drop(ctx, conn, made.GetSnapshotId())
}

// followRestore waits for the end of operation id and notes how long its phases
// took.
func followRestore(ctx context.Context, c *cluster, conn *grpc.ClientConn, res *results, id string) error {
	phase, since, used := "verify", time.Now(), cpu(c)
	for {
		op, err := clusterpb.NewClusterClient(conn).GetOperation(stale(ctx), &clusterpb.GetOperationRequest{OperationId: id})
		// A member that is exchanging its state may refuse for a moment.
		if err == nil {
			ended := op.GetState() != clusterpb.OperationState_OPERATION_STATE_RUNNING
			if op.GetPhase() != phase || ended {
				note(c, res, "restore", phase+" s", time.Since(since).Seconds())
				note(c, res, "restore", phase+" CPU s", used())
				phase, since, used = op.GetPhase(), time.Now(), cpu(c)
			}
			if ended {
				if op.GetState() != clusterpb.OperationState_OPERATION_STATE_DONE {
					return fmt.Errorf("the restore has failed: %s", op.GetMessage())
				}
				return nil
			}
		}
		if !settle(ctx, 20*time.Millisecond) {
			return errors.Join(ctx.Err(), err)
		}
	}
}
