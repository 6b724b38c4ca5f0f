// Command etcd compares a router cluster with an etcd cluster: three real
// processes each, on real disks of this machine, in turn, with the same load
// over plain unary stubs and as many connections. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	router, etcd string
	data, out    string
	rows         string
	pairs        int
	duration     time.Duration
	warmup       time.Duration
	keys         int
	objects      int
	kills        int
	idle         time.Duration
	basePort     int
	limit        time.Duration
	// Of the recovery rows.
	etcdutl   string
	content   string
	systems   string
	writeRate float64
	readRate  float64
	// restoreWrites is writeRate of the restore row.
	restoreWrites float64
	creates       int
	missed        int
	behind        int
	catchups      int
	patience      time.Duration
	logLevel      string
	debug         bool
	keep          bool
}

func main() {
	var o options
	flag.StringVar(&o.router, "router", "bin/router", "router binary")
	flag.StringVar(&o.etcd, "etcd", "bin/etcd", "etcd binary")
	flag.StringVar(&o.data, "data", "data/bench", "directory for the clusters' data; emptied before and after")
	flag.StringVar(&o.out, "out", "data/bench-results", "directory for results.md and results.json")
	flag.StringVar(&o.rows, "rows", "", "rows to run, by name and comma; empty = all that compare loads, recovery = all about recovery: "+strings.Join(rowNames(), ","))
	flag.IntVar(&o.pairs, "pairs", 3, "alternating runs of each cluster")
	flag.DurationVar(&o.duration, "duration", 6*time.Second, "measurement of one load")
	flag.DurationVar(&o.warmup, "warmup", 2*time.Second, "load before it")
	flag.IntVar(&o.keys, "keys", 100_000, "distinct keys")
	flag.IntVar(&o.objects, "objects", 1_000_000, "objects of the size rows")
	flag.IntVar(&o.kills, "kills", 20, "leaders killed by the outage row")
	flag.DurationVar(&o.idle, "idle", 20*time.Second, "how long the idle row watches")
	flag.IntVar(&o.basePort, "base-port", 27100, "first of 60 ports on loopback")
	flag.DurationVar(&o.limit, "limit", 90*time.Minute, "end everything after this long")
	flag.StringVar(&o.etcdutl, "etcdutl", "bin/etcdutl", "etcdutl binary, for the recovery rows")
	flag.StringVar(&o.content, "content", contentText, "values of the recovery rows: text, random or repeat")
	flag.StringVar(&o.systems, "systems", "etcd,router", "systems the recovery rows run")
	flag.Float64Var(&o.readRate, "read-rate", 50, "linearizable reads a second through each member, beside a restore")
	flag.Float64Var(&o.restoreWrites, "restore-writes", 100, "writes a second beside a restore")
	flag.Float64Var(&o.writeRate, "write-rate", 1000, "writes a second beside what the recovery rows measure")
	flag.IntVar(&o.creates, "creates", 30, "snapshots made by the snapshot row")
	flag.IntVar(&o.missed, "missed", 100_000, "puts the follower of the missed row misses")
	flag.IntVar(&o.behind, "behind", 250_000, "objects written while the follower of the catchup row is away: more than the log keeps")
	flag.IntVar(&o.catchups, "catchups", 5, "catch-ups made by the catchup and image rows")
	flag.DurationVar(&o.patience, "patience", 30*time.Second, "how long a member may take to report that it has caught up")
	flag.StringVar(&o.logLevel, "log-level", "warn", "of the router's processes")
	flag.BoolVar(&o.debug, "debug", false, "the router's processes serve profiles, on the ports from base-port + 35")
	flag.BoolVar(&o.keep, "keep", false, "keep data and logs in the end")
	flag.Parse()
	// What the generator uses is taken from the servers. On one processor it needs a
	// fifth less, since no second thread is woken to find that there is nothing to do,
	// and at the highest rate here it has work for a third of one.
	runtime.GOMAXPROCS(1)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	if err := run(ctx, &o); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	rows, err := chooseRows(o.rows)
	if err != nil {
		return err
	}
	for _, p := range []*string{&o.router, &o.etcd, &o.etcdutl, &o.data, &o.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	for _, bin := range needed(o, rows) {
		if _, err := os.Stat(bin); err != nil {
			return fmt.Errorf("%w; build it with `make bench`", err)
		}
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	res := newResults(o)
	err = measure(ctx, o, rows, res)
	// What was measured before a failure is worth keeping.
	if writeErr := res.write(o.out); writeErr != nil {
		err = errors.Join(err, writeErr)
	}
	fmt.Println()
	fmt.Print(res.markdown())
	return err
}

// needed lists the binaries the rows start.
func needed(o *options, rows []row) []string {
	bins := []string{o.router, o.etcd}
	for _, r := range rows {
		if r.recovery != nil && strings.Contains(o.systems, "etcd") {
			return append(bins, o.etcdutl)
		}
		if r.recovery != nil {
			return []string{o.router}
		}
	}
	return bins
}

// measure runs the chosen rows. Loads alternate between the systems, a whole
// set of loads on a fresh cluster at a time, so that both meet the same moods
// of the machine.
func measure(ctx context.Context, o *options, rows []row, res *results) error {
	for pair := range o.pairs {
		systems := []system{newEtcd(o, false), newRouter(o)}
		if pair%2 == 1 { // who goes first alternates too
			systems[0], systems[1] = systems[1], systems[0]
		}
		for _, s := range systems {
			var loads []row
			for _, r := range rows {
				if r.load != nil {
					loads = append(loads, r)
				}
			}
			if len(loads) > 0 {
				if err := runLoads(ctx, o, s, loads, pair, res); err != nil {
					return fmt.Errorf("%s: %w", s.name(), err)
				}
			}
		}
	}
	for _, r := range rows {
		if r.special == nil {
			continue
		}
		systems := []system{newEtcd(o, false), newRouter(o)}
		if r.tuned {
			systems = append(systems, newEtcd(o, true))
		}
		for _, s := range systems {
			if err := r.special(ctx, o, s, res); err != nil {
				return fmt.Errorf("%s, row %s: %w", s.name(), r.name, err)
			}
		}
	}
	return measureRecovery(ctx, o, rows, res)
}

// runLoads starts a fresh cluster, fills it, and puts each load on it.
func runLoads(ctx context.Context, o *options, s system, loads []row, pair int, res *results) error {
	c, err := startCluster(ctx, o, s)
	if err != nil {
		return err
	}
	defer c.stop()
	needsKeys := false
	for _, r := range loads {
		needsKeys = needsKeys || r.load.read
	}
	if needsKeys {
		if err := s.fill(ctx, c, o.keys); err != nil {
			return err
		}
	}
	for _, r := range loads {
		if r.load.streams > 0 && !s.streams() || r.load.txn > 0 && s.streams() {
			continue
		}
		for attempt := 0; ; attempt++ {
			before, err := s.leader(ctx, c)
			if err != nil {
				return err
			}
			m, err := s.drive(ctx, c, before, r.load, o)
			if err != nil {
				return fmt.Errorf("row %s: %w", r.name, err)
			}
			after, err := s.leader(ctx, c)
			if err != nil {
				return err
			}
			// A load meant for the leader that hit a follower half of the time
			// measures something else.
			m.LeaderMoved = before != after
			if m.LeaderMoved && attempt == 0 {
				fmt.Printf("pair %d  %-14s %-8s the leader moved; once more\n", pair+1, r.name, s.name())
				continue
			}
			res.add(r.name, s.name(), *m)
			fmt.Printf("pair %d  %-14s %-8s %8.0f/s  p50 %7.2f ms  p99 %7.2f ms  max %8.2f ms  %6.1f us CPU/command  errors %d\n",
				pair+1, r.name, s.name(), m.Rate, m.P50, m.P99, m.Max, m.CPU, m.Errors)
			break
		}
	}
	return nil
}
