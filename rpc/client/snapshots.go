package client

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// Backup returns the stub of BackupService. For the bytes of a snapshot, see
// Download and Upload.
func (c *Client) Backup() backuppb.BackupServiceClient { return backuppb.NewBackupServiceClient(c) }

const (
	// uploadChunkBytes is the size of the chunks sent, far below the limit of
	// a message.
	uploadChunkBytes = 256 << 10
	// maxTransferPause bounds the pause before a transfer is taken up again.
	maxTransferPause = 2 * time.Second
	// minUploads is how often an upload is begun at least, however long the
	// first one took to break.
	minUploads = 3
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Download is the archive of one snapshot, an io.Reader for one caller at a
// time. A transfer that breaks goes on at the byte where it broke, on whichever
// node answers.
type Download struct {
	c        *Client
	ctx      context.Context
	cancel   context.CancelFunc
	req      *backuppb.StreamSnapshotRequest
	patience time.Duration

	stream backuppb.BackupService_StreamSnapshotClient
	// drop ends stream.
	drop  context.CancelFunc
	data  []byte
	at    uint64 // bytes received
	total uint64
	last  bool
	// since is when the transfer last moved; pause doubles while it does not.
	since time.Time
	pause time.Duration
	err   error
}

// Download begins to read snapshot id. It gives up when nothing has come for
// patience, or ctx is done. Close frees it.
func (c *Client) Download(ctx context.Context, id string, compression backuppb.CompressionType, patience time.Duration) *Download {
	ctx, cancel := context.WithCancel(ctx)
	return &Download{
		c: c, ctx: ctx, cancel: cancel, patience: patience, since: time.Now(), pause: c.o.BackoffMin,
		req: &backuppb.StreamSnapshotRequest{SnapshotId: id, Compression: compression},
	}
}

// Total returns about how many bytes the archive has before compression, 0 as
// long as it is not known.
func (d *Download) Total() uint64 { return d.total }

// Read implements io.Reader. io.EOF means that the node has marked the end.
func (d *Download) Read(p []byte) (int, error) {
	for len(d.data) == 0 && d.err == nil {
		if d.last {
			d.err = io.EOF
			break
		}
		if err := d.next(); err != nil {
			d.err = d.again(err)
		}
	}
	if len(d.data) > 0 {
		n := copy(p, d.data)
		d.data = d.data[n:]
		return n, nil
	}
	return 0, d.err
}

// errBroken: the stream has ended too early, or its bytes are not what the node
// sent. Asking again helps.
var errBroken = status.Error(codes.Unavailable, "the transfer broke off")

// next receives one chunk.
func (d *Download) next() error {
	if d.stream == nil {
		d.req.Offset = d.at
		ctx, drop := context.WithCancel(d.ctx)
		s, err := d.c.Backup().StreamSnapshot(ctx, d.req)
		if err != nil {
			drop()
			return err
		}
		d.drop = drop
		d.stream = s
	}
	chunk, err := d.stream.Recv()
	switch {
	case errors.Is(err, io.EOF):
		return errBroken
	case err != nil:
		return err
	case chunk.GetOffset() != d.at:
		return status.Errorf(codes.DataLoss, "the node sent byte %d of the snapshot in place of %d", chunk.GetOffset(), d.at)
	case chunk.GetCrc32C() != 0 && chunk.GetCrc32C() != crc32.Checksum(chunk.GetData(), castagnoli):
		return errBroken
	}
	if t := chunk.GetTotalBytes(); t > 0 {
		d.total = t
	}
	d.data, d.last = chunk.GetData(), chunk.GetIsLast()
	d.at += uint64(len(d.data))
	d.since, d.pause = time.Now(), d.c.o.BackoffMin
	return nil
}

// again returns err when it is time to give up.
func (d *Download) again(err error) error {
	if d.stream != nil {
		d.drop()
		d.stream = nil
	}
	if d.ctx.Err() != nil {
		return d.ctx.Err()
	}
	if !transient(err) || time.Since(d.since) > d.patience {
		return err
	}
	if !sleep(d.ctx, jitter(d.pause)) {
		return err
	}
	d.pause = min(2*d.pause, maxTransferPause)
	return nil
}

// transient reports whether another attempt, perhaps on another node, may do
// better.
func transient(err error) bool {
	v := judge(err, read)
	return v.repeat || v.elsewhere
}

// Close ends the transfer.
func (d *Download) Close() error {
	d.cancel()
	d.stream = nil
	if d.err == nil {
		d.err = ErrClosed
	}
	return nil
}

// Upload sends an archive to the cluster and returns the snapshot it became.
// open returns the archive from its beginning; it is called again for each
// attempt, since an upload that breaks leaves nothing to go on from. Attempts
// are made until patience has passed, three at least. moved, when it is not nil,
// is told how many bytes of the present attempt were sent.
//
// Should the answer to a complete upload get lost, the snapshot of that attempt
// stays with the node that took it, until its retention removes it.
//
// A temporary snapshot is for one restore: it is removed when that has ended, or
// when none has used it for an hour.
func (c *Client) Upload(ctx context.Context, open func(ctx context.Context) (io.ReadCloser, error), patience time.Duration,
	temporary bool, moved func(sent int64)) (*backuppb.UploadSnapshotResponse, error) {
	begun := time.Now()
	pause := c.o.BackoffMin
	for attempt := 1; ; attempt++ {
		reply, err := c.upload(ctx, open, temporary, moved)
		var source sourceError
		switch {
		case err == nil:
			return reply, nil
		case errors.As(err, &source):
			return nil, source.err
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !transient(err) && status.Code(err) != codes.DataLoss,
			attempt >= minUploads && time.Since(begun) > patience:
			return nil, err
		}
		if !sleep(ctx, jitter(pause)) {
			return nil, err
		}
		pause = min(2*pause, maxTransferPause)
	}
}

// sourceError is a failure of the caller's archive.
type sourceError struct{ err error }

func (e sourceError) Error() string { return e.err.Error() }

func (c *Client) upload(ctx context.Context, open func(ctx context.Context) (io.ReadCloser, error), temporary bool, moved func(int64)) (*backuppb.UploadSnapshotResponse, error) {
	// Ends the stream of an attempt that fails here; the node then removes what
	// it has received.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in, err := open(ctx)
	if err != nil {
		return nil, sourceError{err}
	}
	defer func() { _ = in.Close() }() // it was only read
	stream, err := c.Backup().UploadSnapshot(ctx)
	if err != nil {
		return nil, err
	}
	// The chunk that ends the archive says so. It is sent only when the source
	// has ended in order, since that is where a store finds damage.
	bufs := [2][]byte{make([]byte, uploadChunkBytes), make([]byte, uploadChunkBytes)}
	fill := func(b []byte) ([]byte, error) {
		n, err := io.ReadFull(in, b)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, sourceError{fmt.Errorf("read the archive: %w", err)}
		}
		return b[:n], nil
	}
	data, err := fill(bufs[0])
	if err != nil {
		return nil, err
	}
	var at uint64
	for i := 1; ; i++ {
		var next []byte
		if len(data) == uploadChunkBytes {
			if next, err = fill(bufs[i%2]); err != nil {
				return nil, err
			}
		}
		chunk := &backuppb.DataChunk{Data: data, Offset: at, IsLast: len(next) == 0, Crc32C: crc32.Checksum(data, castagnoli),
			Temporary: temporary && at == 0}
		if err := stream.Send(chunk); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		} else if err != nil {
			// The node has ended the stream; its answer says why.
			_, err = stream.CloseAndRecv()
			if err == nil {
				err = errBroken
			}
			return nil, err
		}
		at += uint64(len(data))
		if moved != nil {
			moved(int64(at))
		}
		if chunk.IsLast {
			break
		}
		data = next
	}
	reply, err := stream.CloseAndRecv()
	if err != nil {
		return nil, err
	}
	if !reply.GetSuccess() || reply.GetSnapshotId() == "" {
		return nil, status.Error(codes.Internal, "the node took the upload and made no snapshot of it")
	}
	return reply, nil
}
