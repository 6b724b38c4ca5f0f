package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// archiveNode is a node with one snapshot. All nodes of a test share it.
type archiveNode struct {
	backuppb.UnimplementedBackupServiceServer
	t *testing.T
	*archiveState
}

type archiveState struct {
	mu      sync.Mutex
	archive []byte
	// next says what becomes of the streams to come, in order; then all is well.
	next []string
	// offsets are those that were asked for.
	offsets []uint64
	uploads []string
}

func (s *archiveState) fate() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.next) == 0 {
		return ""
	}
	f := s.next[0]
	s.next = s.next[1:]
	return f
}

func (n archiveNode) StreamSnapshot(req *backuppb.StreamSnapshotRequest, stream backuppb.BackupService_StreamSnapshotServer) error {
	fate := n.fate()
	n.mu.Lock()
	n.offsets = append(n.offsets, req.GetOffset())
	n.mu.Unlock()
	if fate == "missing" {
		return status.Error(codes.NotFound, "no such snapshot")
	}
	const size = 1000
	sent := 0
	for at := req.GetOffset(); ; {
		if sent == 3 && fate != "" {
			switch fate {
			case "break":
				return status.Error(codes.Unavailable, "shutting down")
			case "end":
				return nil
			}
		}
		data := n.archive[at:min(at+size, uint64(len(n.archive)))]
		c := &backuppb.DataChunk{Data: data, Offset: at, Crc32C: crc32.Checksum(data, castagnoli), IsLast: at+uint64(len(data)) == uint64(len(n.archive))}
		if sent == 0 {
			c.TotalBytes = uint64(len(n.archive))
		}
		if sent == 2 {
			switch fate {
			case "damage":
				c.Data = append([]byte("x"), data[1:]...)
			case "gap":
				c.Offset++
			}
		}
		if err := stream.Send(c); err != nil {
			return err
		}
		if c.IsLast {
			return nil
		}
		at += uint64(len(data))
		sent++
	}
}

func (n archiveNode) UploadSnapshot(stream backuppb.BackupService_UploadSnapshotServer) error {
	fate := n.fate()
	var got []byte
	for {
		c, err := stream.Recv()
		if err != nil {
			return err
		}
		if c.GetOffset() != uint64(len(got)) || c.GetCrc32C() != crc32.Checksum(c.GetData(), castagnoli) {
			n.t.Errorf("chunk at %d, received %d", c.GetOffset(), len(got))
		}
		got = append(got, c.GetData()...)
		switch fate {
		case "break":
			return status.Error(codes.Unavailable, "shutting down")
		case "damage":
			return status.Error(codes.DataLoss, "the chunk was damaged on its way")
		case "refuse":
			return status.Error(codes.InvalidArgument, "not an archive")
		}
		if c.GetIsLast() {
			break
		}
	}
	n.mu.Lock()
	n.uploads = append(n.uploads, string(got))
	n.mu.Unlock()
	return stream.SendAndClose(&backuppb.UploadSnapshotResponse{Success: true, SnapshotId: "up"})
}

// archiveCluster starts n nodes that share state, behind one that is dead.
func archiveCluster(t *testing.T, n int, state *archiveState) *Client {
	t.Helper()
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	endpoints := []string{dead.Addr().String()}
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer()
		backuppb.RegisterBackupServiceServer(s, archiveNode{t: t, archiveState: state})
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.Serve(l) // ends with Stop
		}()
		t.Cleanup(func() { s.Stop(); <-done })
		endpoints = append(endpoints, l.Addr().String())
	}
	c, err := Dial(endpoints, Options{AttemptTimeout: 10 * time.Second, BackoffMin: time.Millisecond, BackoffMax: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func testArchive(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * i >> 5)
	}
	return b
}

// However a transfer breaks, it goes on where it broke, and no byte is lost or
// doubled.
func TestDownloadGoesOn(t *testing.T) {
	state := &archiveState{archive: testArchive(20_500), next: []string{"break", "end", "damage", "break"}}
	c := archiveCluster(t, 2, state)
	d := c.Download(context.Background(), "s", backuppb.CompressionType_COMPRESSION_ZSTD, time.Minute)
	defer d.Close()
	got, err := io.ReadAll(iotest.HalfReader(d))
	if err != nil || !bytes.Equal(got, state.archive) {
		t.Fatalf("%d of %d bytes, %v", len(got), len(state.archive), err)
	}
	if want := fmt.Sprint([]uint64{0, 3000, 6000, 8000, 11000}); fmt.Sprint(state.offsets) != want {
		t.Errorf("asked for %v, want %v", state.offsets, want)
	}
	if d.Total() == 0 {
		t.Error("the size is not known")
	}
}

func TestDownloadGivesUp(t *testing.T) {
	read := func(c *Client, ctx context.Context, patience time.Duration) error {
		d := c.Download(ctx, "s", 0, patience)
		defer d.Close()
		_, err := io.ReadAll(d)
		return err
	}
	state := &archiveState{archive: testArchive(20_000), next: []string{"missing"}}
	c := archiveCluster(t, 1, state)
	if err := read(c, context.Background(), time.Minute); status.Code(err) != codes.NotFound {
		t.Errorf("a snapshot that is not there: %v", err)
	}
	state.next = []string{"gap"}
	if err := read(c, context.Background(), time.Minute); status.Code(err) != codes.DataLoss {
		t.Errorf("a gap: %v", err)
	}
	state.next = []string{"break"}
	if err := read(c, context.Background(), -1); status.Code(err) != codes.Unavailable {
		t.Errorf("without patience: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := read(c, ctx, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	d := c.Download(context.Background(), "s", 0, time.Minute)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := d.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// An upload that breaks begins anew, on another node, with the archive from its
// beginning.
func TestUpload(t *testing.T) {
	for _, size := range []int{0, 1, uploadChunkBytes, uploadChunkBytes + 1, 3*uploadChunkBytes - 1} {
		archive := string(testArchive(size))
		state := &archiveState{next: []string{"break", "damage"}}
		c := archiveCluster(t, 2, state)
		opened, most := 0, int64(0)
		reply, err := c.Upload(context.Background(), func(context.Context) (io.ReadCloser, error) {
			opened++
			return io.NopCloser(iotest.HalfReader(strings.NewReader(archive))), nil
		}, time.Minute, false, func(sent int64) { most = max(most, sent) })
		if err != nil || reply.GetSnapshotId() != "up" {
			t.Fatalf("%d bytes: %v, %v", size, reply, err)
		}
		if opened < 3 || most != int64(size) || len(state.uploads) != 1 || state.uploads[0] != archive {
			t.Errorf("%d bytes: opened %d times, sent %d, arrived %d times", size, opened, most, len(state.uploads))
		}
	}
}

func TestUploadGivesUp(t *testing.T) {
	state := &archiveState{next: []string{"refuse"}}
	c := archiveCluster(t, 1, state)
	open := func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(testArchive(5 * uploadChunkBytes))), nil
	}
	if _, err := c.Upload(context.Background(), open, time.Minute, false, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("refused: %v", err)
	}
	broken := errors.New("bad sector")
	// Also when only the very end is bad: nothing may be taken for complete.
	for _, n := range []int{0, 1, uploadChunkBytes, 2 * uploadChunkBytes} {
		_, err := c.Upload(context.Background(), func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(make([]byte, n)), iotest.ErrReader(broken))), nil
		}, time.Minute, false, nil)
		if !errors.Is(err, broken) {
			t.Errorf("a source that fails after %d bytes: %v", n, err)
		}
	}
	if _, err := c.Upload(context.Background(), func(context.Context) (io.ReadCloser, error) { return nil, broken }, time.Minute, false, nil); !errors.Is(err, broken) {
		t.Errorf("a source that cannot be opened: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	_, err := c.Upload(ctx, open, time.Minute, false, func(int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if len(state.uploads) > 0 {
		t.Errorf("%d uploads arrived", len(state.uploads))
	}
}
