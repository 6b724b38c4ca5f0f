package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"

	"google.golang.org/grpc"

	"conveyor.etl/router/bench"
)

// The kinds of values the recovery rows fill the clusters with. How far values
// can be compressed decides how much there is to write and to send.
const (
	contentText   = "text"   // random hex digits: zstd halves them
	contentRandom = "random" // cannot be compressed
	contentRepeat = "repeat" // all but 8 bytes the same in all of a client
)

// content draws keys and values for one client, of the kind o wants.
type content struct {
	*values
	kind string
	raw  [128]byte
}

func newContent(o *options, i int) *content {
	v := newValues(i)
	v.Rand = rand.New(rand.NewPCG(2, uint64(i)))
	return &content{values: v, kind: o.content}
}

// value returns 256 bytes that differ from call to call.
func (c *content) value() []byte {
	switch c.kind {
	case contentRepeat:
		return c.values.value()
	case contentRandom:
		out := make([]byte, 256)
		c.bytes(out)
		return out
	}
	c.bytes(c.raw[:])
	return hex.AppendEncode(make([]byte, 0, 256), c.raw[:])
}

func (c *content) bytes(out []byte) {
	for i := 0; i < len(out); i += 8 {
		for j, n := 0, c.Uint64(); j < 8; j++ {
			out[i+j] = byte(n >> (8 * j))
		}
	}
}

// batches commits every key of from to to-1 once, in batches of 64: the way
// either system puts many.
func batches(ctx context.Context, c *cluster, from, to int) error {
	const clients, batch = 16, 64
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	conns, closeAll, err := bench.Dial([]string{c.s.endpoint(c.o, leader)}, 4)
	if err != nil {
		return err
	}
	defer closeAll()
	return each(clients, from, to, batch, func(i, from, to int, v *content) error {
		keys := make([]string, 0, to-from)
		data := make([][]byte, 0, to-from)
		for k := from; k < to; k++ {
			keys, data = append(keys, bench.Key(k)), append(data, v.value())
		}
		if err := c.s.(recoverer).putMany(ctx, conns[i%len(conns)], keys, data); err != nil {
			return fmt.Errorf("fill: %w", err)
		}
		return nil
	}, c.o)
}

// puts commits keys 0 to n-1, each by a call of its own, from 64 clients.
func puts(ctx context.Context, c *cluster, n int) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	conns, closeAll, err := bench.Dial([]string{c.s.endpoint(c.o, leader)}, 8)
	if err != nil {
		return err
	}
	defer closeAll()
	return each(64, 0, n, 1, func(i, k, _ int, v *content) error {
		return c.s.put(ctx, conns[i%len(conns)], bench.Key(k%c.o.objects), v.value())
	}, c.o)
}

// each hands out the numbers from from to to-1 to clients, batch at a time, and
// ends with the first error.
func each(clients, from, to, batch int, do func(client, from, to int, v *content) error, o *options) error {
	var next atomic.Int64
	var stopped atomic.Bool
	next.Store(int64(from))
	errs := make(chan error, clients)
	for i := range clients {
		v := newContent(o, i)
		go func() {
			for !stopped.Load() {
				end := int(next.Add(int64(batch)))
				if end-batch >= to {
					break
				}
				if err := do(i, end-batch, min(end, to), v); err != nil {
					stopped.Store(true)
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var failed error
	for range clients {
		failed = errors.Join(failed, <-errs)
	}
	return failed
}

// marker writes a record of its own through member i and returns its key: who
// holds it holds everything committed before.
func marker(ctx context.Context, c *cluster, i int, n int) (string, error) {
	conn, err := dialFast(c.s.endpoint(c.o, i))
	if err != nil {
		return "", err
	}
	defer closeConn(conn)
	key := fmt.Sprintf("mark-%011d", n)
	return key, c.s.put(ctx, conn, key, []byte("x"))
}

// withConn calls do with a connection to member i.
func withConn(c *cluster, i int, do func(conn *grpc.ClientConn) error) error {
	conn, err := dialFast(c.s.endpoint(c.o, i))
	if err != nil {
		return err
	}
	defer closeConn(conn)
	return do(conn)
}
