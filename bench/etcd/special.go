package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/bench"
)

// outage kills the leader again and again and measures, from the kill, the time
// until a write that began after it is acknowledged. Writers give each call
// 100 ms and try the next member at once when it fails, as a client library
// would. Beside them one caller per member sets no deadline: how long such a
// call hangs is the second figure.
func outage(ctx context.Context, o *options, s system, res *results) error {
	c, err := startCluster(ctx, o, s)
	if err != nil {
		return err
	}
	defer c.stop()
	var conns []*grpc.ClientConn
	for i := range members {
		conn, err := dialFast(s.endpoint(o, i))
		if err != nil {
			return err
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	var outages, beyond []float64
	for n := range o.kills {
		leader, err := s.leader(ctx, c)
		if err != nil {
			return err
		}
		gap, stuck, err := killOnce(ctx, c, conns, leader)
		if err != nil {
			return err
		}
		outages = append(outages, gap.Seconds()*1000)
		beyond = append(beyond, max(0, (stuck-gap).Seconds()*1000))
		fmt.Printf("kill %2d  %-12s outage %7.0f ms   longest call without a deadline %7.0f ms\n", n+1, s.name(), gap.Seconds()*1000, stuck.Seconds()*1000)
		if err := c.start(leader); err != nil {
			return err
		}
		if _, err := c.serves(ctx, leader, time.Now(), "x"); err != nil {
			return err
		}
		if !settle(ctx, time.Second) {
			return ctx.Err()
		}
	}
	slices.Sort(outages)
	res.figure("outage", s.name(), "outage median ms", outages[len(outages)/2])
	res.figure("outage", s.name(), "outage max ms", outages[len(outages)-1])
	res.figure("outage", s.name(), "stuck beyond outage ms", slices.Max(beyond))
	return nil
}

func settle(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// killOnce runs writers, kills the leader and returns the outage and the
// longest call without a deadline.
func killOnce(ctx context.Context, c *cluster, conns []*grpc.ClientConn, leader int) (gap, stuck time.Duration, err error) {
	const writers, deadline = 8, 100 * time.Millisecond
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	load, endLoad := context.WithCancel(ctx)
	defer endLoad()
	var killed atomic.Int64 // nanoseconds since the epoch
	first := make(chan time.Time, writers)
	warm := make(chan struct{}, writers)
	var running sync.WaitGroup
	for w := range writers {
		running.Go(func() {
			v, at, told, warmed := newValues(w), w%members, false, false
			for load.Err() == nil {
				began := time.Now()
				try, done := context.WithTimeout(load, deadline)
				err := c.s.put(try, conns[at], bench.Key(w), v.value())
				done()
				if err != nil {
					at = (at + 1) % members
					// A member that is gone fails at once; without a pause this
					// would be a busy loop on the machine that has to elect.
					settle(load, 2*time.Millisecond)
					continue
				}
				if !warmed {
					warmed = true
					warm <- struct{}{}
				}
				if k := killed.Load(); k != 0 && began.UnixNano() > k && !told {
					told = true
					first <- time.Now()
				}
			}
		})
	}
	for range writers {
		select {
		case <-warm:
		case <-ctx.Done():
			endLoad()
			running.Wait()
			return 0, 0, errors.New("not every writer got through before the kill")
		}
	}
	// The patient callers send without pause, so that one call of each is under
	// way when the leader dies.
	patient, endPatient := context.WithCancel(ctx)
	defer endPatient()
	var longest atomic.Int64
	var waiting sync.WaitGroup
	for i := range members {
		waiting.Go(func() {
			v := newValues(100 + i)
			for patient.Err() == nil {
				began := time.Now()
				err := c.s.put(ctx, conns[i], bench.Key(1000+i), v.value())
				if d := int64(time.Since(began)); killed.Load() != 0 && ctx.Err() == nil {
					for old := longest.Load(); d > old && !longest.CompareAndSwap(old, d); old = longest.Load() {
					}
				}
				if err != nil {
					settle(patient, 5*time.Millisecond)
				}
			}
		})
	}
	settle(ctx, 200*time.Millisecond)
	at := time.Now()
	killed.Store(at.UnixNano())
	c.kill(leader)
	select {
	case t := <-first:
		gap = t.Sub(at)
	case <-ctx.Done():
		err = errors.New("no write got through within a minute")
	}
	endLoad()
	running.Wait()
	// What was under way at the kill has to end by itself.
	endPatient()
	waiting.Wait()
	return gap, time.Duration(longest.Load()), err
}

// objects fills a cluster and measures its memory and how fast it comes back.
func objects(ctx context.Context, o *options, s system, res *results) error {
	c, err := startCluster(ctx, o, s)
	if err != nil {
		return err
	}
	defer c.stop()
	began := time.Now()
	if err := s.fill(ctx, c, o.objects); err != nil {
		return err
	}
	filled := time.Since(began)
	settle(ctx, 2*time.Second)
	_, resident, err := c.usage()
	if err != nil {
		return err
	}
	res.figure("objects", s.name(), "fill s", filled.Seconds())
	res.figure("objects", s.name(), "resident MB", float64(slices.Max(resident))/1e6)
	fmt.Printf("objects  %-8s %d filled in %.1f s, resident %v MB\n", s.name(), o.objects, filled.Seconds(), mega(resident))

	key := bench.Key(o.objects - 1)
	from := time.Now()
	for i := range members {
		_ = c.procs[i].Process.Kill()
	}
	for i := range members {
		<-c.ended[i]
		if err := c.start(i); err != nil {
			return err
		}
	}
	slowest, err := slowestOf(ctx, c, []int{0, 1, 2}, from, key)
	if err != nil {
		return err
	}
	res.figure("objects", s.name(), "all killed to read s", slowest.Seconds())

	settle(ctx, 2*time.Second)
	leader, err := s.leader(ctx, c)
	if err != nil {
		return err
	}
	follower := (leader + 1) % members
	c.kill(follower)
	from = time.Now()
	if err := c.start(follower); err != nil {
		return err
	}
	took, err := slowestOf(ctx, c, []int{follower}, from, key)
	if err != nil {
		return err
	}
	res.figure("objects", s.name(), "follower restart s", took.Seconds())
	fmt.Printf("objects  %-8s all killed to read everywhere %.2f s, one follower %.2f s\n", s.name(), slowest.Seconds(), took.Seconds())
	return nil
}

// slowestOf waits for the first linearizable read through each of the members.
func slowestOf(ctx context.Context, c *cluster, which []int, from time.Time, key string) (time.Duration, error) {
	took := make([]time.Duration, members)
	errs := make([]error, members)
	var asked sync.WaitGroup
	for _, i := range which {
		asked.Go(func() { took[i], errs[i] = c.serves(ctx, i, from, key) })
	}
	asked.Wait()
	return slices.Max(took), errors.Join(errs...)
}

func mega(bytes []int64) []int64 {
	var out []int64
	for _, b := range bytes {
		out = append(out, b/1e6)
	}
	return out
}

// idle watches a cluster nobody uses.
func idle(ctx context.Context, o *options, s system, res *results) error {
	c, err := startCluster(ctx, o, s)
	if err != nil {
		return err
	}
	defer c.stop()
	settle(ctx, 5*time.Second)
	before, _, err := c.usage()
	if err != nil {
		return err
	}
	began := time.Now()
	if !settle(ctx, o.idle) {
		return ctx.Err()
	}
	after, resident, err := c.usage()
	if err != nil {
		return err
	}
	cores := (after - before).Seconds() / time.Since(began).Seconds() / members
	res.figure("idle", s.name(), "idle cores", cores)
	res.figure("idle", s.name(), "idle MB", float64(slices.Max(resident))/1e6)
	fmt.Printf("idle     %-8s %.4f cores and %v MB a member\n", s.name(), cores, mega(resident))
	return nil
}
