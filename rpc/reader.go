package rpc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"conveyor.etl/router/raftnode"
)

// Names of the metadata that a request or a reply may carry.
const (
	// MetadataConsistency: "linearizable" (the default) or "stale".
	MetadataConsistency = "conveyor-consistency"
	// MetadataMinRevision: a decimal revision that the answer must reflect.
	MetadataMinRevision = "conveyor-min-revision"
	// MetadataRevision: in replies, the revision the answer reflects.
	MetadataRevision = "conveyor-revision"
	// MetadataClusterID: in replies, the id of the cluster, 16 hex digits.
	MetadataClusterID = "conveyor-cluster-id"
	// MetadataEpoch: in replies, how often the state was replaced by a backup; a
	// revision means something only together with it. In requests, the epoch the
	// caller knows: when it is no longer that, the call is refused and the caller
	// has to read everything again.
	MetadataEpoch = "conveyor-epoch"
	// MetadataRequestID: in requests, the id under which a repeated command
	// gets the result of the first.
	MetadataRequestID = "conveyor-request-id"
)

// DefaultMaxWait is how long a call waits for a leader before it fails.
const DefaultMaxWait = 5 * time.Second

// ReadNode is what a Reader needs of a raft node.
type ReadNode interface {
	ReadIndex(ctx context.Context) (uint64, error)
	// ReadIndexUntil also returns when up delivers, with context.DeadlineExceeded.
	ReadIndexUntil(ctx context.Context, up <-chan time.Time) (uint64, error)
	WaitApplied(ctx context.Context, index uint64) error
	// Changed returns a channel that is closed at the next change of
	// leadership.
	Changed() <-chan struct{}
}

// Reader brings the local state up to what a request may see before it is
// read. Its methods are safe for concurrent use.
type Reader struct {
	node      ReadNode
	clusterID string
	maxWait   time.Duration
	base      func() uint64 // what is added to an index to get a revision
	epoch     func() uint64 // of the local state
	revision  func() uint64 // of the local state
	timers    timerPool
	// gate refuses reads while the state is in doubt.
	gate *StateGate
	// header is that of the newest revision answered: many replies in a row
	// have the same.
	header atomic.Pointer[replyHeader]
}

// replyHeader is what replies of one revision carry. It is never changed.
type replyHeader struct {
	revision, epoch uint64
	md              metadata.MD
}

// NewReader returns a Reader over node. clusterID goes into reply headers;
// maxWait bounds the waiting for a leader or a revision, 0 = DefaultMaxWait.
func NewReader(node ReadNode, clusterID uint64, maxWait time.Duration) *Reader {
	if maxWait <= 0 {
		maxWait = DefaultMaxWait
	}
	return &Reader{
		node: node, clusterID: fmt.Sprintf("%016x", clusterID), maxWait: maxWait,
		base: func() uint64 { return 0 }, epoch: func() uint64 { return 0 },
		revision: func() uint64 { return 0 },
	}
}

// Epochs is what a Reader has to know of restores. *router.FSM implements it.
type Epochs interface {
	// Epoch is how often the state was replaced by a backup.
	Epoch() uint64
	// RevisionBase is what is added to a log index to get a revision.
	RevisionBase() uint64
	// Revision is that of the newest change.
	Revision() uint64
}

// WithEpochs tells r where to look for what a restore changes, and returns r. It
// is for before the first Wait. Without it there are no restores.
func (r *Reader) WithEpochs(e Epochs) *Reader {
	r.base, r.epoch, r.revision = e.RevisionBase, e.Epoch, e.Revision
	return r
}

// readOptions is what the metadata of a request asks for.
type readOptions struct {
	stale       bool
	minRevision uint64
	epoch       *uint64
}

func parseReadOptions(ctx context.Context) (readOptions, error) {
	var o readOptions
	value, err := oneValue(ctx, MetadataConsistency)
	if err != nil {
		return o, err
	}
	switch value {
	case "", "linearizable":
	case "stale":
		o.stale = true
	default:
		return o, fmt.Errorf("%w: %s is %.40q, must be \"linearizable\" or \"stale\"; nothing was read",
			ErrInvalidMetadata, MetadataConsistency, value)
	}
	if o.epoch, err = requestEpoch(ctx); err != nil {
		return o, err
	}
	if value, err = oneValue(ctx, MetadataMinRevision); err != nil || value == "" {
		return o, err
	}
	if o.minRevision, err = strconv.ParseUint(value, 10, 64); err != nil {
		return o, fmt.Errorf("%w: %s is %.40q, must be a decimal number; nothing was read",
			ErrInvalidMetadata, MetadataMinRevision, value)
	}
	return o, nil
}

// requestEpoch returns the epoch the caller knows, nil when it does not say.
func requestEpoch(ctx context.Context) (*uint64, error) {
	value, err := oneValue(ctx, MetadataEpoch)
	if err != nil || value == "" {
		return nil, err
	}
	epoch, err := strconv.ParseUint(value, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is %.40q, must be a decimal number; nothing was done",
			ErrInvalidMetadata, MetadataEpoch, value)
	}
	return &epoch, nil
}

// oneValue returns the value of key, "" when absent. Several values would
// leave open which of them the caller relies on. It looks the key up by itself:
// metadata.FromIncomingContext copies everything a request came with.
func oneValue(ctx context.Context, key string) (string, error) {
	values := metadata.ValueFromIncomingContext(ctx, key)
	switch len(values) {
	case 0:
		return "", nil
	case 1:
		return values[0], nil
	}
	return "", fmt.Errorf("%w: %s is given %d times, give it once; nothing was read",
		ErrInvalidMetadata, key, len(values))
}

// Wait blocks until the local state may answer the request of ctx: by default
// until it holds everything acknowledged before Wait was called
// (linearizable), with metadata conveyor-consistency "stale" at once, and in
// both cases not before the revision of conveyor-min-revision. It waits at
// most maxWait; an error means that nothing may be read.
func (r *Reader) Wait(ctx context.Context) error {
	if err := r.gate.Err(); err != nil {
		return err
	}
	if err := r.await(ctx); err != nil {
		return err
	}
	return r.gate.Err() // it may have been shut meanwhile
}

func (r *Reader) await(ctx context.Context) error {
	o, err := parseReadOptions(ctx)
	if err != nil {
		return err
	}
	if o.stale && o.minRevision == 0 {
		return r.checkEpoch(o)
	}
	limit := r.maxWait
	if c, ok := ctx.(*callContext); ok {
		limit = max(0, min(limit, time.Until(c.deadline)).Round(time.Millisecond))
	}
	ctx = untimed(ctx)
	if !o.stale {
		index, err := r.readIndex(ctx, limit)
		if err != nil {
			return err
		}
		// The entries up to index are applied here, so the base is that of index
		// or of a later one, never of an earlier.
		if current := index + r.base(); o.minRevision > current {
			// A revision is the index of an applied command, and index covers
			// all that were acknowledged: nobody can have been told this one.
			if err := r.checkEpoch(o); err != nil {
				return err
			}
			return &FutureRevisionError{Asked: o.minRevision, Current: current}
		}
		return r.checkEpoch(o)
	}
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = r.waitRevision(wait, o.minRevision)
	if err != nil && wait.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: revision %d was not applied here within %v; nothing was read: "+
			"try again, or ask another node", ErrBehind, o.minRevision, limit)
	}
	if err != nil {
		return err
	}
	return r.checkEpoch(o)
}

// checkEpoch refuses a caller that knows another epoch than the local state is
// of, which is up to date by now as far as the caller asked for it.
func (r *Reader) checkEpoch(o readOptions) error {
	if o.epoch == nil {
		return nil
	}
	if current := r.epoch(); *o.epoch != current {
		return &EpochError{Known: *o.epoch, Current: current, Revision: r.revision()}
	}
	return nil
}

// rebasePause is how often a waiting read looks whether a restore has brought
// its revision nearer.
const rebasePause = 50 * time.Millisecond

// waitRevision waits until the state has reached a revision.
func (r *Reader) waitRevision(ctx context.Context, revision uint64) error {
	for {
		base := r.base()
		if revision <= base {
			return nil
		}
		some, cancel := context.WithTimeout(ctx, rebasePause)
		err := r.node.WaitApplied(some, revision-base)
		expired := some.Err() != nil
		cancel()
		if err == nil || !expired || ctx.Err() != nil {
			return err
		}
	}
}

// readIndex asks for a read index until one is given, for limit at most. A read has
// no effect, so every failure of the group, also an unknown outcome, may be repeated.
// ctx tells whether the caller is still there.
func (r *Reader) readIndex(ctx context.Context, limit time.Duration) (uint64, error) {
	up := r.timers.start(limit)
	defer r.timers.put(up)
	var last error
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		// Taken before the attempt, so that a change during it is not missed.
		changed := r.node.Changed()
		index, err := r.node.ReadIndexUntil(ctx, up.C)
		if err == nil {
			return index, nil
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		var notLeader *raftnode.NotLeaderError
		switch {
		case errors.As(err, &notLeader), errors.Is(err, raftnode.ErrNoLeader),
			errors.Is(err, raftnode.ErrAmbiguous), errors.Is(err, raftnode.ErrBusy):
			last = err
		case errors.Is(err, context.DeadlineExceeded):
			return 0, noIndex(last)
		default:
			return 0, err
		}
		timer := r.timers.start(pause)
		ended := false
		select {
		case <-changed:
		case <-timer.C:
		case <-up.C:
			ended = true
		case <-ctx.Done():
		}
		r.timers.put(timer)
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if ended {
			return 0, noIndex(last)
		}
	}
}

// noIndex says that nobody gave a read index in time; last is what the last attempt
// failed with, if one did.
func noIndex(last error) error {
	text := ""
	if last != nil && !errors.Is(last, raftnode.ErrNoLeader) {
		text = fmt.Sprintf(" (last: %v)", last)
	}
	return fmt.Errorf("%w that answered in time%s; nothing was read or changed: try again, "+
		"or read with metadata %s: stale", raftnode.ErrNoLeader, text, MetadataConsistency)
}

// SetHeader has the reply carry the revision of the answer, its epoch, and the cluster it
// comes from in its headers. Of several times in one unary call the last counts: a command
// that is proposed after a read, or again, is what its reply is about. A stream's headers are
// sent at once, and once. A failure (no gRPC call in ctx, or one that has ended) leaves a
// reply without them, which is no reason to fail it.
func (r *Reader) SetHeader(ctx context.Context, revision, epoch uint64) {
	h := r.header.Load()
	if h == nil || h.revision != revision || h.epoch != epoch {
		h = &replyHeader{revision, epoch, metadata.Pairs(
			MetadataRevision, strconv.FormatUint(revision, 10),
			MetadataEpoch, strconv.FormatUint(epoch, 10),
			MetadataClusterID, r.clusterID)}
		r.header.Store(h)
	}
	if c, ok := ctx.Value(callKey{}).(*callContext); ok {
		c.setHeader(h.md)
		return
	}
	_ = grpc.SendHeader(ctx, h.md)
}
