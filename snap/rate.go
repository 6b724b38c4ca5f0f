package snap

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// RateLimit bounds how fast images are read for sending, so that a follower
// catching up does not take the disk and the network from the log. One
// RateLimit may be shared by all senders of a node; the bound then holds for
// them together. Its methods are safe for concurrent use.
type RateLimit struct {
	limiter *rate.Limiter
	burst   int

	// mu guards what follows.
	mu sync.Mutex
	// full is the rate beyond the slow start; begun is when that began, last when
	// the limit was used last.
	full        rate.Limit
	slow        time.Duration
	begun, last time.Time

	// beside is the rate while others are busy, and most for how long.
	beside rate.Limit
	most   time.Duration
	busy   func() bool
	// sending is since when there has been something to send again and again.
	sending time.Time
}

// After longIdle without anything to send, it may be beside others for as long as before.
// It is longer than a receiver whose disk stalls, or that is connected to again, needs.
const longIdle = 10 * time.Second

// After restIdle without anything to send, a slow start begins again.
const restIdle = time.Second

// NewRateLimit returns a limit of bytesPerSecond with bursts of up to burst
// bytes (at least 1). Zero or less bytesPerSecond means no limit.
func NewRateLimit(bytesPerSecond int64, burst int) *RateLimit {
	burst = max(burst, 1)
	limit := asLimit(bytesPerSecond)
	return &RateLimit{limiter: rate.NewLimiter(limit, burst), burst: burst, full: limit}
}

func asLimit(bytesPerSecond int64) rate.Limit {
	if bytesPerSecond <= 0 {
		return rate.Inf
	}
	return rate.Limit(bytesPerSecond)
}

// SetRate changes the limit; senders already waiting keep their turn.
func (l *RateLimit) SetRate(bytesPerSecond int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.full = asLimit(bytesPerSecond)
	l.limiter.SetLimit(l.full)
}

// SlowStart makes the limit begin at a quarter of its rate, and reach all of it
// after d, whenever nothing was sent for a second. Who begins to receive has most
// to do besides. To be called before the limit is used.
func (l *RateLimit) SlowStart(d time.Duration) { l.slow = d }

// Beside makes the limit bytesPerSecond, if that is less, while busy returns true: it is
// called before each burst, must not block and not use the limit. This ends after most of
// sending without a rest of ten seconds: who receives is to come to the end. To be called
// before the limit is used.
func (l *RateLimit) Beside(bytesPerSecond int64, most time.Duration, busy func() bool) {
	l.beside, l.most, l.busy = asLimit(bytesPerSecond), most, busy
}

// adapt brings the limit to what it is at this time, beside others and in a slow start.
func (l *RateLimit) adapt() {
	if l.slow <= 0 && l.busy == nil {
		return
	}
	busy := l.busy != nil && l.busy()
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	idle := now.Sub(l.last)
	if idle >= restIdle {
		l.begun = now
	}
	if idle >= longIdle {
		l.sending = now
	}
	l.last = now
	limit := l.full
	if busy && now.Sub(l.sending) < l.most {
		limit = min(limit, l.beside)
	}
	if limit = easedLimit(limit, now.Sub(l.begun), l.slow); limit != l.limiter.Limit() {
		l.limiter.SetLimit(limit)
	}
}

// easedLimit is full after slow, a quarter of it at the beginning.
func easedLimit(full rate.Limit, since, slow time.Duration) rate.Limit {
	if since >= slow || full == rate.Inf {
		return full
	}
	return full * rate.Limit(0.25+0.75*float64(since)/float64(slow))
}

// used notes that the limit has let something pass.
func (l *RateLimit) used() {
	if l.slow > 0 || l.busy != nil {
		l.mu.Lock()
		l.last = time.Now()
		l.mu.Unlock()
	}
}

// Wait blocks until n bytes may pass or ctx is done. It also fails at once
// when the deadline of ctx comes before the turn of the n bytes.
func (l *RateLimit) Wait(ctx context.Context, n int) error {
	// The limiter refuses to wait for more than its burst at a time.
	for n > 0 && (l.busy != nil || l.limiter.Limit() != rate.Inf) {
		part := min(n, l.burst)
		l.adapt()
		if err := l.limiter.WaitN(ctx, part); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fmt.Errorf("snap: waiting for the send rate limit: %w", err)
		}
		l.used()
		n -= part
	}
	return nil
}

// ReadChunk is Reader.ReadChunk at the pace of l: it blocks until the chunk may
// be sent or ctx is done. A nil l does not limit.
func (l *RateLimit) ReadChunk(ctx context.Context, r *Reader, offset int64, max int) (Chunk, error) {
	c, err := r.ReadChunk(offset, max)
	return l.pass(ctx, c, err)
}

// ReadChunkInto is Reader.ReadChunkInto at the pace of l, as ReadChunk is.
func (l *RateLimit) ReadChunkInto(ctx context.Context, r *Reader, buf []byte, offset int64) (Chunk, error) {
	c, err := r.ReadChunkInto(buf, offset)
	return l.pass(ctx, c, err)
}

func (l *RateLimit) pass(ctx context.Context, c Chunk, err error) (Chunk, error) {
	if err != nil || l == nil {
		return c, err
	}
	if err := l.Wait(ctx, len(c.Data)); err != nil {
		return Chunk{}, err
	}
	return c, nil
}
