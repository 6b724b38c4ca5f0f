package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/internal/background"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// endOfStream turns the end that a client announced into success.
func endOfStream(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// ImageTransfers is told of the images this node sends to others, and may stop
// them.
type ImageTransfers interface {
	// Begin says that an image of total bytes is about to be sent to node. An error
	// means that it must not be; it matches raftnode.ErrImageHeld. The context is
	// done when ctx is, or when the image is to be stopped, which its cause then
	// says. held is to be called with the bytes that are there, often; it does not
	// block. end is to be called once, with nil when the image has arrived.
	Begin(ctx context.Context, node uint64, total int64) (watched context.Context, held func(int64), end func(error), err error)
}

// beginImage tells transfers, if anybody, of an image.
func beginImage(ctx context.Context, transfers ImageTransfers, node uint64, total int64) (context.Context, func(int64), func(error), error) {
	if transfers == nil {
		return ctx, func(int64) {}, func(error) {}, nil
	}
	return transfers.Begin(ctx, node, total)
}

// SendImage implements raftnode.Transport. It uses a connection of its own, so
// that an image never delays log entries, and starts again from what the
// receiver holds after every break, as long as that grows.
func (t *PeerTransport) SendImage(ctx context.Context, m *raftpb.Message, image *snap.Reader) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.ctx, cancel)()

	to, id := m.GetTo(), image.Info().ID
	if string(m.GetSnapshot().GetData()) != id {
		return fmt.Errorf("rpc: the message names image %q, the image is %s; nothing was sent",
			m.GetSnapshot().GetData(), id)
	}
	raw, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("rpc: encode a snapshot message: %w", err)
	}
	ctx, note, end, err := beginImage(ctx, t.o.Transfers, to, image.Size())
	if err != nil {
		return err
	}
	defer func() { end(err) }()
	held := int64(-1)
	failures := 0
	pause := t.o.BackoffMin
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		reached, err := t.sendImageOnce(ctx, to, raw, image, note)
		if err == nil {
			return nil
		}
		if t.ctx.Err() != nil {
			return fmt.Errorf("%w: the transport was closed while image %s was sent to node %d", ErrClosed, id, to)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("rpc: image %s was not sent to node %d: %w (last: %v)", id, to, context.Cause(ctx), err)
		}
		if final(err) {
			return fmt.Errorf("rpc: node %d cannot take image %s: %w", to, id, err)
		}
		if reached > held {
			held, failures, pause = reached, 0, t.o.BackoffMin
		} else if failures++; failures >= t.o.ImageAttempts {
			return fmt.Errorf("rpc: image %s: %d attempts without progress, node %d holds %d of %d bytes: %w",
				id, failures, to, max(held, 0), image.Size(), err)
		}
		t.o.Logger.Warn("sending an image was interrupted; going on", "peer", to, "image", id,
			"receiver_holds_bytes", max(held, 0), "size", image.Size(), "err", err)
		timer.Reset(pause)
		pause = min(2*pause, t.o.BackoffMax)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
	}
}

// final reports whether trying again cannot help.
func final(err error) bool {
	if errors.Is(err, ErrRefused) || errors.Is(err, snap.ErrCorrupt) || errors.Is(err, snap.ErrClosed) {
		return true
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition,
		codes.ResourceExhausted, codes.Unimplemented:
		return true
	}
	return false
}

// sendImageOnce makes one attempt and returns how much the receiver held at its
// beginning, -1 when it did not say.
func (t *PeerTransport) sendImageOnce(ctx context.Context, to uint64, message []byte, image *snap.Reader, note func(int64)) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conn, err := t.connect(to, grpc.WithWriteBufferSize(imageWriteBuffer))
	if err != nil {
		return -1, err
	}
	defer conn.Close()
	timeout := time.AfterFunc(2*t.o.DialTimeout, func() {
		cancel(fmt.Errorf("rpc: no connection to node %d within %v", to, 2*t.o.DialTimeout))
	})
	defer timeout.Stop()
	stream, err := peerpb.NewPeerClient(conn).SendImage(ctx)
	if err != nil {
		return -1, cause(ctx, fromPeer(to, err))
	}
	// Connected. What the receiver does next can take long: it reads back what
	// it holds of the image.
	timeout.Stop()
	// Send fails with EOF when the stream is gone; Recv knows why.
	failed := func(err error) error {
		if errors.Is(err, io.EOF) {
			_, err = stream.Recv()
			if err == nil {
				err = fmt.Errorf("%w: an answer to an unfinished image", ErrMalformed)
			}
		}
		return cause(ctx, fromPeer(to, err))
	}
	err = stream.Send(&peerpb.ImageFrame{
		Hello:   t.identity().hello(to),
		ImageId: image.Info().ID,
		Size:    image.Size(),
	})
	if err != nil {
		return -1, failed(err)
	}
	progress, err := stream.Recv()
	if err != nil {
		return -1, failed(err)
	}
	if err := t.checkAnswer(progress.GetHello(), to); err != nil {
		return -1, err
	}
	held := progress.GetOffset()
	if held < 0 || held > image.Size() {
		return -1, fmt.Errorf("%w: it holds %d of %d bytes", ErrMalformed, held, image.Size())
	}
	note(held)
	for offset := held; ; {
		frame, err := readFrame(ctx, t.o.ImageLimit, image, offset, t.o.ImageChunkBytes)
		switch {
		case errors.Is(err, io.EOF): // everything is there, only the end is missing
			frame = &imageOut{ImageFrame: peerpb.ImageFrame{Offset: offset, Last: true}}
		case err != nil:
			return held, err
		default:
			offset += int64(len(*frame.data))
		}
		if frame.Last {
			frame.Message = message
		}
		if err := stream.SendMsg(frame); err != nil {
			return held, failed(err)
		}
		note(offset)
		if frame.Last {
			break
		}
	}
	if err := stream.CloseSend(); err != nil {
		return held, failed(err)
	}
	progress, err = stream.Recv()
	if err != nil {
		return held, failed(err)
	}
	if !progress.GetStored() {
		return held, fmt.Errorf("%w: the whole image was sent, but not stored", ErrMalformed)
	}
	return held, nil
}

// SendImage implements peerpb.PeerServer: it stores an image and then steps the
// message that announces it.
func (s *PeerServer) SendImage(stream peerpb.Peer_SendImageServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	from := first.GetHello().GetNodeId()
	done, err := s.greet(first.GetHello(), false)
	if err != nil {
		return err
	}
	defer done()
	id, size := first.GetImageId(), first.GetSize()
	held := size
	r, err := s.c.Node.Images().Receive(id, size)
	switch {
	case err == nil:
		// Close keeps what has come for the next attempt; after Commit it does
		// nothing.
		defer r.Close()
		held = r.Offset()
	case !errors.Is(err, snap.ErrExists):
		return Status(err).Err()
	}
	if err := stream.Send(&peerpb.ImageProgress{Hello: s.c.Transport.identity().hello(from), Offset: held}); err != nil {
		return err
	}
	background.Do(func() { err = s.receiveImage(stream, r, id, from) })
	return err
}

// receiveImage has r take what comes and steps the message that ends it.
func (s *PeerServer) receiveImage(stream peerpb.Peer_SendImageServer, r *snap.Receiver, id string, from uint64) error {
	f := &imageIn{}
	defer f.free()
	for {
		if err := stream.RecvMsg(f); err != nil {
			return endOfStream(err)
		}
		if len(f.data) > 0 {
			if r == nil {
				return Status(fmt.Errorf("%w: data of an image that is here", ErrMalformed)).Err()
			}
			err := r.Write(snap.Chunk{Offset: f.offset, Data: f.data, CRC: f.crc, Last: f.last})
			if err != nil {
				return Status(err).Err()
			}
		}
		if f.last {
			return s.finishImage(stream, r, id, from, f.message)
		}
	}
}

// readFrame reads the next chunk of image, of at most size bytes, at the pace of limit.
func readFrame(ctx context.Context, limit *snap.RateLimit, image *snap.Reader, offset int64, size int) (*imageOut, error) {
	buf := buffers.Get(size)
	chunk, err := limit.ReadChunkInto(ctx, image, *buf, offset)
	if err != nil {
		buffers.Put(buf)
		return nil, err
	}
	*buf = chunk.Data
	return &imageOut{peerpb.ImageFrame{Offset: chunk.Offset, Crc: chunk.CRC, Last: chunk.Last}, buf}, nil
}

// finishImage stores what r received and steps the message raw.
func (s *PeerServer) finishImage(stream peerpb.Peer_SendImageServer, r *snap.Receiver, id string, from uint64, raw []byte) error {
	m := &raftpb.Message{}
	if err := proto.Unmarshal(raw, m); err != nil {
		return Status(fmt.Errorf("%w: the message of image %s: %w", ErrMalformed, id, err)).Err()
	}
	if m.GetType() != raftpb.MsgSnap || m.GetTo() != s.self.NodeID || m.GetFrom() != from ||
		string(m.GetSnapshot().GetData()) != id {
		return Status(fmt.Errorf("%w: the message of image %s is not about it", ErrMalformed, id)).Err()
	}
	if r != nil {
		if _, err := r.Commit(); err != nil {
			return Status(err).Err()
		}
	}
	// Only now: a snapshot message whose image is not safely here would make
	// raft give up its log for a state that does not exist.
	if err := s.c.Node.Step(stream.Context(), []*raftpb.Message{m}); err != nil {
		return Status(err).Err()
	}
	return stream.Send(&peerpb.ImageProgress{Stored: true})
}

// fetchChunkBytes is the size of the chunks of an image that was asked for.
const fetchChunkBytes = 256 << 10

// FetchImage implements peerpb.PeerServer.
func (s *PeerServer) FetchImage(req *peerpb.FetchImageRequest, stream peerpb.Peer_FetchImageServer) error {
	done, err := s.greet(req.GetHello(), false)
	if err != nil {
		return err
	}
	defer done()
	// Whoever asks has no state, or a wrong one: it must not get another.
	if err := s.c.Gate.Final(); err != nil {
		return Status(err).Err()
	}
	ctx := stream.Context()
	image, offset, err := s.imageFor(ctx, req)
	if err != nil {
		return Status(err).Err()
	}
	defer image.Close()
	info := image.Info()
	if offset < 0 || offset > image.Size() {
		return InvalidArgument("offset", fmt.Sprintf("%d is outside of image %s", offset, info.ID)).Err()
	}
	ctx, note, end, err := beginImage(ctx, s.c.Transfers, req.GetHello().GetNodeId(), image.Size())
	if err != nil {
		return Status(err).Err()
	}
	defer func() { end(err) }()
	err = stream.Send(&peerpb.ImageFrame{
		Hello:   s.c.Transport.identity().hello(req.GetHello().GetNodeId()),
		ImageId: info.ID,
		Size:    image.Size(),
		Offset:  offset,
	})
	if err == nil {
		err = s.sendImage(ctx, stream, image, offset, note)
	}
	if err != nil {
		return Status(err).Err()
	}
	return nil
}

// sendImage sends what image has from offset on.
func (s *PeerServer) sendImage(ctx context.Context, stream peerpb.Peer_FetchImageServer, image *snap.Reader, offset int64, note func(int64)) error {
	for {
		note(offset)
		frame, err := readFrame(ctx, s.c.ImageLimit, image, offset, fetchChunkBytes)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if ctx.Err() != nil { // the stream itself does not notice
			if err == nil {
				buffers.Put(frame.data)
			}
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		offset += int64(len(*frame.data))
		if err := stream.SendMsg(frame); err != nil {
			return err
		}
	}
}

// imageFor returns the image a FetchImage asked for, and the offset to begin
// at: the one to resume when it is still here and new enough.
func (s *PeerServer) imageFor(ctx context.Context, req *peerpb.FetchImageRequest) (*snap.Reader, int64, error) {
	if id := req.GetImageId(); id != "" {
		image, err := s.c.Node.Images().Open(id)
		switch {
		case err == nil && image.Info().Index >= req.GetMinIndex():
			return image, req.GetOffset(), nil
		case err == nil:
			image.Close()
		case !errors.Is(err, snap.ErrNotFound):
			return nil, 0, err
		}
	}
	image, err := s.c.Image(ctx, req.GetMinIndex())
	if err != nil {
		return nil, 0, err
	}
	if got := image.Info().Index; got < req.GetMinIndex() {
		image.Close()
		return nil, 0, fmt.Errorf("%w: the newest image is of index %d, %d was asked for",
			ErrBehind, got, req.GetMinIndex())
	}
	return image, 0, nil
}
