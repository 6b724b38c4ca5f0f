package rpc

import (
	"crypto/rand"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// handTimers is a clock that moves when the test says so.
type handTimers struct {
	mu     sync.Mutex
	now    time.Duration
	begun  int
	active map[*handTimer]bool
}

type handTimer struct {
	at time.Duration
	c  chan time.Time
}

func (h *handTimers) timer(d time.Duration) (<-chan time.Time, func() bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := &handTimer{h.now + d, make(chan time.Time, 1)}
	h.begun++
	h.active[t] = true
	return t.c, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.active, t)
		return true
	}
}

func (h *handTimers) advance(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now += d
	for t := range h.active {
		if t.at <= h.now {
			t.c <- time.Time{}
			delete(h.active, t)
		}
	}
}

func (h *handTimers) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.begun
}

// stallAPI is a node with one place for transfers, a snapshot "s" that does not
// fit into what a connection has under way, and a clock for its transfers.
func stallAPI(t *testing.T) (*api, backuppb.BackupServiceClient, *handTimers) {
	t.Helper()
	node := newOneNode(t)
	noError(t, node.fs.MkdirAll("backups", 0o755))
	sh, err := shelf.Open(node.fs, "backups", shelf.Options{})
	noError(t, err)
	rec, err := recovery.New(recovery.Config{
		NodeID: 1, ClusterID: 0xc0ffee, ClusterName: "test", Node: node, State: node.fsm, Submit: node, Shelf: sh,
		Judge: Judge, FS: node.fs, MaxTransfers: 1,
	})
	noError(t, err)
	for i := range 8 {
		data := make([]byte, 512<<10)
		_, err := rand.Read(data)
		noError(t, err)
		node.must(t, &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{
			ServiceId: fmt.Sprint("s", i), CheckpointId: "c", Data: data,
		}}})
	}
	a := serveAPI(t, node, func(c *ServerConfig) { c.Recovery = rec })
	timers := &handTimers{active: map[*handTimer]bool{}}
	a.Server.idle.timer = timers.timer
	c := backuppb.NewBackupServiceClient(a.conn)
	_, err = c.CreateSnapshot(a.ctx(), &backuppb.CreateSnapshotRequest{SnapshotId: "s"})
	noError(t, err)
	return a, c, timers
}

// Goal: a client that opens a download and does not read it loses its place
// after the idle limit, with a status that says how to go on; one that reads
// slowly keeps it.
func TestStalledDownload(t *testing.T) {
	a, c, timers := stallAPI(t)
	open := func() backuppb.BackupService_StreamSnapshotClient {
		t.Helper()
		stream, err := c.StreamSnapshot(a.ctx(), &backuppb.StreamSnapshotRequest{SnapshotId: "s"})
		noError(t, err)
		return stream
	}
	slow := open()
	// Every chunk has its own time: all together take longer than one may. Some are
	// on their way at once, so that one of them sees several steps of the clock.
	step, took := a.cfg.TransferIdle/8, time.Duration(0)
	for last := false; !last; took += step {
		chunk, err := slow.Recv()
		noError(t, err)
		last = chunk.IsLast
		timers.advance(step)
	}
	if took <= a.cfg.TransferIdle {
		t.Fatalf("the download took %v only, %v are allowed to each chunk", took, a.cfg.TransferIdle)
	}
	if _, err := slow.Recv(); err != io.EOF {
		t.Fatal(err)
	}

	stuck := open()
	_, err := stuck.Recv()
	noError(t, err)
	other := open()
	_, err = other.Recv()
	wantCode(t, err, codes.ResourceExhausted)
	if text := status.Convert(err).Message(); !strings.Contains(text, "download of s for") || !strings.Contains(text, "nothing was done: wait") {
		t.Errorf("who finds no place reads %q", text)
	}
	// Nobody reads: only the limit can make the place free again. The node may
	// not have come to the chunk that does not fit when the clock moves first.
	eventually(t, "the place is free", func() bool {
		timers.advance(a.cfg.TransferIdle)
		_, err := open().Recv()
		return err == nil
	})
	for err = nil; err == nil; {
		_, err = stuck.Recv()
	}
	wantCode(t, err, codes.DeadlineExceeded)
	if text := status.Convert(err).Message(); !strings.Contains(text, "taken nothing for 1m0s") || !strings.Contains(text, "offset") {
		t.Errorf("the client of a download that stood still reads %q", text)
	}
}

// Goal: a client that stops in the middle of an upload loses its place after the
// idle limit, and nothing of the upload is left on disk; one that sends slowly
// is taken.
func TestStalledUpload(t *testing.T) {
	a, c, timers := stallAPI(t)
	down, err := c.StreamSnapshot(a.ctx(), &backuppb.StreamSnapshotRequest{SnapshotId: "s"})
	noError(t, err)
	var chunks []*backuppb.DataChunk
	for {
		chunk, err := down.Recv()
		if err == io.EOF {
			break
		}
		noError(t, err)
		chunks = append(chunks, chunk)
	}
	images := func() string {
		t.Helper()
		names, err := a.node.fs.List("backups/images")
		noError(t, err)
		return strings.Join(names, " ")
	}
	before := images()

	begun := timers.count()
	stuck, err := c.UploadSnapshot(a.ctx())
	noError(t, err)
	noError(t, stuck.Send(chunks[0]))
	noError(t, stuck.Send(chunks[1]))
	eventually(t, "the node waits for the third chunk", func() bool { return timers.count() == begun+3 })
	eventually(t, "half an upload is on disk", func() bool { return images() != before })
	timers.advance(a.cfg.TransferIdle - 1)
	other, err := c.UploadSnapshot(a.ctx())
	noError(t, err)
	noError(t, other.Send(chunks[0]))
	_, err = other.CloseAndRecv()
	wantCode(t, err, codes.ResourceExhausted)
	if text := status.Convert(err).Message(); !strings.Contains(text, "an upload for") || !strings.Contains(text, "another node") {
		t.Errorf("who finds no place reads %q", text)
	}
	timers.advance(1)
	err = stuck.RecvMsg(&backuppb.UploadSnapshotResponse{})
	wantCode(t, err, codes.DeadlineExceeded)
	if text := status.Convert(err).Message(); !strings.Contains(text, "sent nothing for 1m0s after 524288 bytes; nothing was kept") {
		t.Errorf("the client of an upload that stood still reads %q", text)
	}
	if after := images(); after != before {
		t.Errorf("the images were %q, and are %q after an upload that stood still", before, after)
	}

	begun = timers.count()
	slow, err := c.UploadSnapshot(a.ctx())
	noError(t, err)
	for i, chunk := range chunks {
		eventually(t, "the node waits for the next chunk", func() bool { return timers.count() == begun+i+1 })
		timers.advance(a.cfg.TransferIdle - 1)
		noError(t, slow.Send(chunk))
	}
	resp, err := slow.CloseAndRecv()
	noError(t, err)
	if !resp.Success {
		t.Fatal(resp)
	}
}
