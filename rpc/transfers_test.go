package rpc

import (
	"context"
	"errors"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
	"conveyor.etl/router/snap"
)

// transferWatch notes what it is told of images, and stops them where it is to.
type transferWatch struct {
	stopAt int64 // negative: never

	mu          sync.Mutex
	node        uint64
	total, held int64
	ends        []error
	refuse      error
}

func (w *transferWatch) Begin(ctx context.Context, node uint64, total int64) (context.Context, func(int64), func(error), error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse != nil {
		return nil, nil, nil, w.refuse
	}
	w.node, w.total = node, total
	ctx, cancel := context.WithCancelCause(ctx)
	held := func(n int64) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.held = n; w.stopAt >= 0 && n >= w.stopAt {
			cancel(raftnode.ErrImageHeld)
		}
	}
	return ctx, held, func(err error) {
		cancel(nil)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ends = append(w.ends, err)
	}, nil
}

// Goal: who watches images is told of the bytes of each, up to the last, and of its
// end; it can stop one in the middle, and keep one from being begun. Method: both
// ways an image travels.
func TestImagesAreWatched(t *testing.T) {
	const size, chunk = 600 << 10, 8 << 10
	ways := map[string]func(t *testing.T, w *transferWatch) (*snap.Reader, *snap.Store, error){
		"sent": func(t *testing.T, w *transferWatch) (*snap.Reader, *snap.Store, error) {
			a := newStation(t, 1, func(o *TransportOptions) { o.Transfers, o.ImageChunkBytes = w, chunk })
			b := newStation(t, 2, nil)
			introduce(a, b)
			image := a.node.makeImage(t, 100, size)
			return image, b.node.images, a.transport.SendImage(t.Context(), snapshotMessage(1, 2, image), image)
		},
		"fetched": func(t *testing.T, w *transferWatch) (*snap.Reader, *snap.Store, error) {
			a := newStation(t, 1, func(o *TransportOptions) { o.Transfers = w })
			image := a.node.makeImage(t, 100, size)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			o := FetchOptions{
				Identity: Identity{ClusterID: testCluster, NodeID: 2}, Peers: []raftnode.Member{a.member()},
				MinIndex: 100, Store: newFakeNode(t, 9).images, Dial: a.net.dial, BackoffMin: 1, BackoffMax: 1,
			}
			o.ensureDefaults()
			var state fetched
			_, err := o.fetchFrom(ctx, newPeerDialer(o.Dial, nil, o.DialTimeout), a.member(), &state)
			return image, o.Store, err
		},
	}
	for name, run := range ways {
		t.Run(name, func(t *testing.T) {
			t.Run("whole", func(t *testing.T) {
				checkLeaks(t)
				w := &transferWatch{stopAt: -1}
				image, store, err := run(t, w)
				noError(t, err)
				noError(t, store.Verify(image.Info().ID))
				eventually(t, "its end is told", func() bool {
					w.mu.Lock()
					defer w.mu.Unlock()
					return len(w.ends) == 1
				})
				if w.node != 2 || w.total != image.Size() || w.held != image.Size() || w.ends[0] != nil {
					t.Errorf("%d of %d bytes for node %d, ends %v", w.held, w.total, w.node, w.ends)
				}
			})
			t.Run("stopped", func(t *testing.T) {
				checkLeaks(t)
				w := &transferWatch{stopAt: size / 2}
				_, store, err := run(t, w)
				if !errors.Is(err, raftnode.ErrImageHeld) && status.Code(err) != codes.FailedPrecondition {
					t.Errorf("stopped: %v", err)
				}
				if len(store.List()) != 0 {
					t.Error("it has arrived")
				}
				eventually(t, "its end is told", func() bool {
					w.mu.Lock()
					defer w.mu.Unlock()
					return len(w.ends) == 1 && errors.Is(w.ends[0], raftnode.ErrImageHeld)
				})
			})
			t.Run("not begun", func(t *testing.T) {
				checkLeaks(t)
				w := &transferWatch{refuse: raftnode.ErrImageHeld}
				_, store, err := run(t, w)
				if !errors.Is(err, raftnode.ErrImageHeld) && status.Code(err) != codes.FailedPrecondition {
					t.Errorf("refused: %v", err)
				}
				if len(store.List()) != 0 {
					t.Error("it has arrived")
				}
			})
		})
	}
}

// Goal: who waits for an operation is not sent away by a restore of the whole state
// meanwhile, and is told its end afterwards; what ended before is still told.
func TestWaitOperationAcrossARestore(t *testing.T) {
	a := newAPI(t)
	put := func(create bool, id string, state commandpb.OperationState) {
		a.node.must(t, &commandpb.Command{Op: &commandpb.Command_PutOperation{PutOperation: &commandpb.PutOperation{
			Create: create, Operation: &commandpb.Operation{OperationId: id, Kind: "replace", State: state},
		}}})
	}
	a.node.image(t, "image")
	put(true, "long", commandpb.OperationState_OPERATION_STATE_RUNNING)
	put(true, "short", commandpb.OperationState_OPERATION_STATE_RUNNING)
	put(false, "short", commandpb.OperationState_OPERATION_STATE_FAILED)
	type outcome struct {
		op  *clusterpb.Operation
		err error
	}
	waited := make(chan outcome, 1)
	subscribers := a.node.fsm.Hub().Subscribers()
	go func() {
		op, err := a.cluster.WaitOperation(a.ctx(), &clusterpb.WaitOperationRequest{OperationId: "long"})
		waited <- outcome{op, err}
	}()
	eventually(t, "it is waited for", func() bool { return a.node.fsm.Hub().Subscribers() > subscribers })
	a.node.restore(t, "image")
	a.node.restore(t, "image")
	put(false, "long", commandpb.OperationState_OPERATION_STATE_DONE)
	got := <-waited
	noError(t, got.err)
	if got.op.State != clusterpb.OperationState_OPERATION_STATE_DONE {
		t.Errorf("waited for: %v", got.op)
	}
	short, err := a.cluster.WaitOperation(a.ctx(), &clusterpb.WaitOperationRequest{OperationId: "short"})
	noError(t, err)
	if short.State != clusterpb.OperationState_OPERATION_STATE_FAILED {
		t.Errorf("ended before: %v", short)
	}
}
