package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"

	"conveyor.etl/router/bench"
)

// restartRow kills each member while clients write through another one.
func restartRow(ctx context.Context, c *cluster, res *results) error {
	var took []float64
	for i := range members {
		_, stop := writeProbe(ctx, c, (i+1)%members)
		settle(ctx, 2*time.Second)
		c.kill(i)
		from := time.Now()
		err := c.start(i)
		if err == nil {
			var d time.Duration
			d, err = c.serves(ctx, i, from, bench.Key(c.o.objects-1))
			took = append(took, d.Seconds())
		}
		stop()
		if err != nil {
			return err
		}
		settle(ctx, time.Second)
	}
	note(c, res, "restart", "restart median s", median(took))
	note(c, res, "restart", "restart max s", slices.Max(took))
	return nil
}

// catchupRow stops a follower until the log does not reach back to it, and starts it
// while clients write, several times: one catch-up has some thousands of writes beside
// it, of which a few stalls of the machine make the p99, so the writes of all of them are
// taken together. They are compared with those before, and with those while the follower
// is away: then no follower makes up for a slow moment of the other.
func catchupRow(ctx context.Context, c *cluster, res *results) error {
	var before, without, beside []time.Duration
	var rates, took []float64
	for range c.o.catchups {
		leader, err := c.s.leader(ctx, c)
		if err != nil {
			return err
		}
		if !calm(ctx, c) {
			return ctx.Err()
		}
		writes, stop := writeProbe(ctx, c, leader)
		before = append(before, undisturbed(ctx, writes)...)
		stop()
		follower := (leader + 1) % members
		if err := outrun(ctx, c, follower); err != nil {
			return err
		}
		writes, stop = writeProbe(ctx, c, leader)
		without = append(without, undisturbed(ctx, writes)...)
		// With writes going on, whoever is less than this behind keeps up.
		during, image, err := catchUp(ctx, c, leader, follower, uint64(c.o.writeRate/10))
		if err == nil {
			writes.reach(ctx, during.to)
		}
		stop()
		if err != nil {
			return err
		}
		b := writes.took(during)
		fmt.Printf("%-10s %-8s %.2f s, %.0f MB/s, write p99 %.1f ms during it\n", "catchup", c.s.name(),
			during.took().Seconds(), image/during.took().Seconds(), p99(b))
		beside = append(beside, b...)
		took = append(took, during.took().Seconds())
		rates = append(rates, image/during.took().Seconds())
	}
	note(c, res, "catchup", "caught up s", median(took))
	note(c, res, "catchup", "image MB/s", median(rates))
	note(c, res, "catchup", "writes during", float64(len(beside)))
	note(c, res, "catchup", "write p99 before ms", p99(before))
	note(c, res, "catchup", "write p99 without it ms", p99(without))
	note(c, res, "catchup", "write p99 during ms", p99(beside))
	note(c, res, "catchup", "write p99 during / before", p99(beside)/p99(before))
	note(c, res, "catchup", "write p99 during / without it", p99(beside)/p99(without))
	return nil
}

// undisturbed returns how long writes take when nothing else goes on, for five seconds.
func undisturbed(ctx context.Context, writes *probe) []time.Duration {
	settle(ctx, time.Second)
	s := span{from: time.Now()}
	settle(ctx, 5*time.Second)
	s.to = time.Now()
	writes.reach(ctx, s.to)
	return writes.took(s)
}

// imageRow is catchupRow while nobody writes.
func imageRow(ctx context.Context, c *cluster, res *results) error {
	var rates, took []float64
	for range c.o.catchups {
		leader, err := c.s.leader(ctx, c)
		if err != nil {
			return err
		}
		// For some seconds after an image the log is kept, whatever is written.
		if !settle(ctx, quiet) || !calm(ctx, c) {
			return ctx.Err()
		}
		follower := (leader + 1) % members
		if err := outrun(ctx, c, follower); err != nil {
			return err
		}
		during, image, err := catchUp(ctx, c, leader, follower, 0)
		if err != nil {
			return err
		}
		took = append(took, during.took().Seconds())
		rates = append(rates, image/during.took().Seconds())
	}
	note(c, res, "image", "caught up s", median(took))
	note(c, res, "image", "image MB/s", median(rates))
	return nil
}

// outrun stops member i and writes more than the log keeps.
func outrun(ctx context.Context, c *cluster, i int) error {
	c.kill(i)
	for done := 0; done < c.o.behind; done += c.o.objects {
		if err := batches(ctx, c, 0, min(c.o.objects, c.o.behind-done)); err != nil {
			return err
		}
	}
	if !calm(ctx, c) {
		return ctx.Err()
	}
	return nil
}

// catchUp starts member i, which an image has to be sent to, and returns how long it took
// from then until it is no more than near entries behind, and the size of the image in MB.
func catchUp(ctx context.Context, c *cluster, leader, i int, near uint64) (span, float64, error) {
	during := span{from: time.Now()}
	if err := c.start(i); err != nil {
		return during, 0, err
	}
	if err := awaitApplied(ctx, c, leader, i, near, time.Minute); err != nil {
		return during, 0, err
	}
	during.to = time.Now()
	image, err := newestImage(filepath.Join(c.dir, fmt.Sprint(i+1), "images"), during.from)
	return during, image / 1e6, err
}

// newestImage returns the size in bytes of the newest image in a router's directory of
// images, which is the one it was sent after since: one that was made of the state before
// would be smaller, since what was written meanwhile lies beside what it replaces.
func newestImage(dir string, since time.Time) (float64, error) {
	images, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var newest string
	made := since
	for _, image := range images {
		st, err := os.Stat(filepath.Join(dir, image.Name(), "MANIFEST"))
		if err == nil && st.ModTime().After(made) {
			newest, made = filepath.Join(dir, image.Name()), st.ModTime()
		}
	}
	if newest == "" {
		return 0, fmt.Errorf("no image came to %s: the log reached back to it", dir)
	}
	files, err := os.ReadDir(newest)
	if err != nil {
		return 0, err
	}
	var bytes int64
	for _, f := range files {
		st, err := f.Info()
		if err != nil {
			return 0, err
		}
		bytes += st.Size()
	}
	return float64(bytes), nil
}

var errPatience = errors.New("it never reported that it has caught up")

// awaitApplied waits until member i reports to have applied what the leader has
// committed, but for near entries.
func awaitApplied(ctx context.Context, c *cluster, leader, i int, near uint64, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return withConn(c, leader, func(from *grpc.ClientConn) error {
		return withConn(c, i, func(conn *grpc.ClientConn) error {
			for {
				try, done := context.WithTimeout(ctx, time.Second)
				_, committed, err := c.s.(recoverer).progress(try, from)
				if err == nil {
					var applied uint64
					applied, _, err = c.s.(recoverer).progress(try, conn)
					if err == nil && applied+near >= committed {
						done()
						return nil
					}
				}
				done()
				// Not more often: to answer, the router asks all its nodes, and what that
				// takes is taken from the catching up.
				if !settle(ctx, 25*time.Millisecond) {
					return errors.Join(errPatience, err)
				}
			}
		})
	})
}

// awaitHeld waits until member i answers a read of key from what it holds.
func awaitHeld(ctx context.Context, c *cluster, i int, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return withConn(c, i, func(conn *grpc.ClientConn) error {
		for {
			try, done := context.WithTimeout(ctx, time.Second)
			yes, err := c.s.(recoverer).has(try, conn, key, true)
			done()
			if yes {
				return nil
			}
			select {
			case <-c.ended[i]:
				raw, _ := os.ReadFile(filepath.Join(c.dir, fmt.Sprintf("%d.log", i+1)))
				return fmt.Errorf("member %d ended: %s", i+1, raw[max(0, len(raw)-2000):])
			case <-ctx.Done():
				return errors.Join(ctx.Err(), err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
}

// caughtUp starts member i on a cluster that nobody writes to any more and notes
// when it holds everything and how much later it says so.
func caughtUp(ctx context.Context, c *cluster, res *results, row string, leader, i int) (time.Time, error) {
	key, err := marker(ctx, c, leader, int(time.Now().UnixMilli()))
	if err != nil {
		return time.Time{}, err
	}
	settle(ctx, time.Second)
	from := time.Now()
	if err := c.start(i); err != nil {
		return from, err
	}
	if err := awaitHeld(ctx, c, i, key); err != nil {
		return from, err
	}
	held := time.Now()
	note(c, res, row, "holds all s", held.Sub(from).Seconds())
	err = awaitApplied(ctx, c, leader, i, 0, c.o.patience)
	if errors.Is(err, errPatience) {
		fmt.Printf("%-10s %-8s %v within %v\n", row, c.s.name(), err, c.o.patience)
		err = nil
	}
	note(c, res, row, "reported behind that s", time.Since(held).Seconds())
	return from, err
}

// missedRow lets a follower miss puts.
func missedRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	follower := (leader + 1) % members
	c.kill(follower)
	if err := puts(ctx, c, c.o.missed); err != nil {
		return err
	}
	settle(ctx, quiet)
	_, err = caughtUp(ctx, c, res, "missed", leader, follower)
	return err
}

// saveRow writes a snapshot of the leader to a file, several times.
func saveRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	return withConn(c, leader, func(conn *grpc.ClientConn) error {
		for _, compression := range c.compressions() {
			var took []float64
			for range 3 {
				began := time.Now()
				if err := c.s.(recoverer).save(ctx, conn, c.file(), compression); err != nil {
					return err
				}
				took = append(took, time.Since(began).Seconds())
				settle(ctx, time.Second)
			}
			name := "save s"
			if compression == "none" && c.s.streams() {
				name = "save uncompressed s"
			}
			note(c, res, "save", name, median(took))
			info, err := os.Stat(c.file())
			if err != nil {
				return err
			}
			note(c, res, "save", fmt.Sprintf("file (%s) MB", compression), float64(info.Size())/1e6)
		}
		return nil
	})
}

// file is where the snapshot of the cluster is saved.
func (c *cluster) file() string { return filepath.Join(c.dir, "saved") }

// compressions lists the ways the system can save, the usual one last.
func (c *cluster) compressions() []string {
	if c.s.streams() {
		return []string{"none", "zstd"}
	}
	return []string{"none"}
}

// newClusterRow puts a new cluster from the saved file in the place of this one.
func newClusterRow(ctx context.Context, c *cluster, res *results) error {
	key, err := marker(ctx, c, 0, int(time.Now().UnixMilli()))
	if err != nil {
		return err
	}
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	err = withConn(c, leader, func(conn *grpc.ClientConn) error { return c.s.(recoverer).save(ctx, conn, c.file(), "zstd") })
	if err != nil {
		return err
	}
	c.end()
	for i := range members + 1 {
		if err := os.RemoveAll(filepath.Join(c.dir, fmt.Sprint(i+1))); err != nil {
			return err
		}
	}
	settle(ctx, quiet)
	from := time.Now()
	for i := range members {
		cmd := c.s.(recoverer).restore(c.o, c.file(), filepath.Join(c.dir, fmt.Sprint(i+1)), i)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("restore of member %d: %w: %s", i+1, err, out)
		}
	}
	restored := time.Now()
	for i := range members {
		if err := c.start(i); err != nil {
			return err
		}
	}
	if _, err := slowestOf(ctx, c, []int{0, 1, 2}, restored, key); err != nil {
		return err
	}
	whole := time.Now()
	note(c, res, "newcluster", "restore of a member s", restored.Sub(from).Seconds()/members)
	note(c, res, "newcluster", "start to read everywhere s", whole.Sub(restored).Seconds())
	note(c, res, "newcluster", "restore and start s", whole.Sub(from).Seconds())
	return withConn(c, 0, func(conn *grpc.ClientConn) error {
		found, err := c.s.(recoverer).has(ctx, conn, key, false)
		if err == nil && !found {
			err = errors.New("the new cluster does not hold what was saved")
		}
		return err
	})
}

// learnerRow adds a fourth member to an idle cluster. It is the last row: the
// member stays.
func learnerRow(ctx context.Context, c *cluster, res *results) error {
	leader, err := c.s.leader(ctx, c)
	if err != nil {
		return err
	}
	err = c.s.(recoverer).join(ctx, c)
	if errors.Is(err, errNoJoin) {
		fmt.Printf("learner    %-8s left out: %v\n", c.s.name(), err)
		return nil
	}
	if err != nil {
		return err
	}
	from, err := caughtUp(ctx, c, res, "learner", leader, joiner)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.o.patience)
	defer cancel()
	return withConn(c, leader, func(conn *grpc.ClientConn) error {
		for {
			yes, err := c.s.(recoverer).promote(ctx, c, conn)
			if yes {
				note(c, res, "learner", "voter s", time.Since(from).Seconds())
				return nil
			}
			if !settle(ctx, 20*time.Millisecond) {
				fmt.Printf("learner    %-8s not promoted within %v: %v\n", c.s.name(), c.o.patience, err)
				return nil
			}
		}
	})
}
