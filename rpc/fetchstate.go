package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc/credentials"

	"conveyor.etl/router/internal/background"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc/peerpb"
	"conveyor.etl/router/snap"
)

// FetchOptions says whom to ask for an image of the state, and for which.
type FetchOptions struct {
	// Identity is this node, Peers are the nodes to ask; this node among them is
	// skipped. Required.
	Identity Identity
	Peers    []raftnode.Member
	// MinIndex is the least index the image must reflect.
	MinIndex uint64
	// Store takes the image; required.
	Store *snap.Store
	// Progress is told how many bytes of how many are here; optional, called for
	// every chunk.
	Progress func(done, total int64)
	// Dial and Credentials are those of TransportOptions.
	Dial        Dialer
	Credentials credentials.TransportCredentials
	// Logger receives every failed attempt. Default: discarded.
	Logger *slog.Logger
	// DialTimeout bounds one attempt to connect. Default 1 s.
	DialTimeout time.Duration
	// BackoffMin and BackoffMax bound the pause after all peers failed.
	// Defaults 50 ms and 2 s.
	BackoffMin time.Duration
	BackoffMax time.Duration
}

func (o *FetchOptions) ensureDefaults() {
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&o.DialTimeout, time.Second)
	setDefault(&o.BackoffMin, 50*time.Millisecond)
	setDefault(&o.BackoffMax, 2*time.Second)
}

// fetched is how far an image has come, over all attempts.
type fetched struct {
	image  string
	offset int64
}

// FetchState gets an image of the state at or after o.MinIndex from a peer, for
// a node whose own state was lost or fell behind its log
// (raftnode.ErrStateBehindLog), and returns its id in o.Store. It asks the peers
// in turn, goes on where an interrupted attempt stopped, and tries until ctx is
// done. Nothing but o.Store changes.
func FetchState(ctx context.Context, o FetchOptions) (string, error) {
	o.ensureDefaults()
	if err := o.Identity.Validate(); err != nil {
		return "", err
	}
	var peers []raftnode.Member
	for _, p := range o.Peers {
		if p.ID != o.Identity.NodeID && p.Addr != "" {
			peers = append(peers, p)
		}
	}
	if len(peers) == 0 {
		return "", errors.New("rpc: the state cannot be fetched: no other node is known")
	}
	d := newPeerDialer(o.Dial, o.Credentials, o.DialTimeout)
	var state fetched
	pause := o.BackoffMin
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var errs []error
		for i := 0; i < len(peers) && ctx.Err() == nil; {
			before := state
			var id string
			var err error
			background.Do(func() { id, err = o.fetchFrom(ctx, d, peers[i], &state) })
			if err == nil {
				return id, nil
			}
			o.Logger.Warn("fetching the state from a peer failed; trying on", "peer", peers[i].ID,
				"addr", peers[i].Addr, "image", state.image, "held_bytes", state.offset, "err", err)
			// As long as it helps, stay with the peer that has this image: the
			// others would have to make, and send, another one from its start.
			if state != before && state.image != "" {
				pause = o.BackoffMin
				continue
			}
			errs = append(errs, fmt.Errorf("node %d: %w", peers[i].ID, err))
			i++
		}
		if ctx.Err() == nil {
			timer.Reset(pause)
			pause = min(2*pause, o.BackoffMax)
			select {
			case <-ctx.Done():
			case <-timer.C:
				continue
			}
		}
		return "", fmt.Errorf("rpc: the state could not be fetched from any peer: %w",
			errors.Join(append([]error{ctx.Err()}, errs...)...))
	}
}

// fetchFrom makes one attempt with one peer and updates state.
func (o *FetchOptions) fetchFrom(ctx context.Context, d peerDialer, p raftnode.Member, state *fetched) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conn, err := d.conn(p.Addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	timeout := time.AfterFunc(2*o.DialTimeout, func() {
		cancel(fmt.Errorf("rpc: no connection to node %d within %v", p.ID, 2*o.DialTimeout))
	})
	defer timeout.Stop()
	stream, err := peerpb.NewPeerClient(conn).FetchImage(ctx, &peerpb.FetchImageRequest{
		Hello:    o.Identity.hello(p.ID),
		MinIndex: o.MinIndex,
		ImageId:  state.image,
		Offset:   state.offset,
	})
	if err != nil {
		return "", cause(ctx, fromPeer(p.ID, err))
	}
	timeout.Stop() // making an image may take its time
	first, err := stream.Recv()
	if err != nil {
		return "", fromPeer(p.ID, err)
	}
	if err := o.Identity.check(first.GetHello(), p.ID); err != nil {
		return "", err
	}
	id := first.GetImageId()
	r, err := o.Store.Receive(id, first.GetSize())
	if errors.Is(err, snap.ErrExists) {
		return id, nil
	}
	if err != nil {
		*state = fetched{}
		return "", err
	}
	defer r.Close()
	if r.Offset() != first.GetOffset() {
		// A new process, or another image than the last attempt's: ask again
		// for the rest of what is here.
		*state = fetched{id, r.Offset()}
		return "", fmt.Errorf("rpc: %d bytes of image %s are here, the peer began at %d", r.Offset(), id, first.GetOffset())
	}
	// What the next Receive in this process will find. After a damaged image
	// that is nothing: another peer's may be whole.
	broken := false
	defer func() {
		if *state = (fetched{id, r.Offset()}); broken {
			*state = fetched{}
		}
	}()
	f := &imageIn{}
	defer f.free()
	for {
		if r.Offset() == first.GetSize() {
			info, err := r.Commit()
			if err != nil {
				broken = true
				return "", err
			}
			if info.Index < o.MinIndex {
				broken = true
				return "", fmt.Errorf("%w: image %s is of index %d, %d is needed", ErrMalformed, id, info.Index, o.MinIndex)
			}
			return id, nil
		}
		if err := stream.RecvMsg(f); err != nil {
			return "", fromPeer(p.ID, err)
		}
		err := r.Write(snap.Chunk{Offset: f.offset, Data: f.data, CRC: f.crc, Last: f.last})
		if err != nil {
			broken = true
			return "", err
		}
		o.Progress(r.Offset(), first.GetSize())
	}
}
