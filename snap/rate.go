package snap

import (
	"context"
	"fmt"

	"golang.org/x/time/rate"
)

// RateLimit bounds how fast images are read for sending, so that a follower
// catching up does not take the disk and the network from the log. One
// RateLimit may be shared by all senders of a node; the bound then holds for
// them together. Its methods are safe for concurrent use.
type RateLimit struct {
	limiter *rate.Limiter
	burst   int
}

// NewRateLimit returns a limit of bytesPerSecond with bursts of up to burst
// bytes (at least 1). Zero or less bytesPerSecond means no limit.
func NewRateLimit(bytesPerSecond int64, burst int) *RateLimit {
	burst = max(burst, 1)
	return &RateLimit{rate.NewLimiter(asLimit(bytesPerSecond), burst), burst}
}

func asLimit(bytesPerSecond int64) rate.Limit {
	if bytesPerSecond <= 0 {
		return rate.Inf
	}
	return rate.Limit(bytesPerSecond)
}

// SetRate changes the limit; senders already waiting keep their turn.
func (l *RateLimit) SetRate(bytesPerSecond int64) { l.limiter.SetLimit(asLimit(bytesPerSecond)) }

// Wait blocks until n bytes may pass or ctx is done. It also fails at once
// when the deadline of ctx comes before the turn of the n bytes.
func (l *RateLimit) Wait(ctx context.Context, n int) error {
	// The limiter refuses to wait for more than its burst at a time.
	for n > 0 && l.limiter.Limit() != rate.Inf {
		part := min(n, l.burst)
		if err := l.limiter.WaitN(ctx, part); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return fmt.Errorf("snap: waiting for the send rate limit: %w", err)
		}
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
