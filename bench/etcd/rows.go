package main

import (
	"context"
	"fmt"
	"strings"
)

// load is what is put on both systems alike.
type load struct {
	clients, conns int
	spread         bool // over all members instead of the leader
	read, stale    bool
	txn            int // etcd: puts in one transaction
	// Streams exist on the router alone.
	streams, inFlight, batch int
	offsets                  bool // commit offsets instead of checkpoints
}

func (l *load) targets(c *cluster, leader int) []string {
	if l.spread {
		return c.endpoints()
	}
	return []string{c.s.endpoint(c.o, leader)}
}

// row is one line of the table. Bounds are of router / etcd unless absolute.
type row struct {
	name, title string
	load        *load
	special     func(context.Context, *options, system, *results) error
	tuned       bool // run etcd with the router's timing as well
	// recovery measures on a cluster that is filled already and that the rows
	// share; of the router alone when own is set.
	recovery func(context.Context, *cluster, *results) error
	own      bool
	goals    []goal
}

// goal is one figure to reach.
type goal struct {
	figure   string // rate, p50, p99, cpu, or a figure of a special row
	absolute bool   // the router's own figure instead of the ratio
	atMost   bool
	must     float64
	aim      float64 // 0 = none
}

func atLeast(figure string, must, aim float64) goal {
	return goal{figure: figure, must: must, aim: aim}
}

func atMost(figure string, must, aim float64) goal {
	return goal{figure: figure, must: must, aim: aim, atMost: true}
}

func (g goal) own() goal { g.absolute = true; return g }

func allRows() []row {
	return []row{
		{name: "unary1", title: "unary commit, 1 client", load: &load{clients: 1, conns: 1},
			goals: []goal{atMost("p50", 0.8, 0.65)}},
		{name: "unary64", title: "unary commit, 64 clients on 8 connections, to the leader", load: &load{clients: 64, conns: 8},
			goals: []goal{atLeast("rate", 2, 2.5), atMost("p99", 0.5, 0), atMost("cpu", 0.45, 0)}},
		{name: "unary256", title: "unary commit, 256 on 16, to the leader", load: &load{clients: 256, conns: 16},
			goals: []goal{atLeast("rate", 2.4, 3), atMost("p99", 0.4, 0)}},
		{name: "spread64", title: "unary commit, 64 on 8, spread over all nodes", load: &load{clients: 64, conns: 8, spread: true},
			goals: []goal{atLeast("rate", 2, 2.5), atMost("p99", 0.5, 0)}},
		{name: "txn16", title: "etcd only: transactions of 16 puts, 64 clients on 8", load: &load{clients: 64, conns: 8, txn: 16}},
		{name: "offsets1", title: "8 streams, 64 offsets in flight each, 1 a message", load: &load{streams: 8, conns: 8, inFlight: 64, batch: 1, offsets: true},
			goals: []goal{atLeast("rate", 60_000, 0).own()}},
		{name: "stream1", title: "8 streams, 64 checkpoints of 256 bytes in flight each, 1 a message", load: &load{streams: 8, conns: 8, inFlight: 64, batch: 1},
			goals: []goal{atLeast("rate", 60_000, 0).own()}},
		{name: "offsets16", title: "8 streams, 64 offsets in flight each, 16 a message", load: &load{streams: 8, conns: 8, inFlight: 64, batch: 16, offsets: true},
			goals: []goal{atLeast("rate", 80_000, 100_000).own()}},
		{name: "stream16", title: "8 streams, 64 checkpoints of 256 bytes in flight each, 16 a message", load: &load{streams: 8, conns: 8, inFlight: 64, batch: 16},
			goals: []goal{atLeast("rate", 80_000, 100_000).own()}},
		{name: "offsets64", title: "8 streams, 256 offsets in flight each, 64 a message", load: &load{streams: 8, conns: 8, inFlight: 256, batch: 64, offsets: true},
			goals: []goal{atLeast("rate", 80_000, 100_000).own()}},
		{name: "stream64", title: "8 streams, 256 checkpoints of 256 bytes in flight each, 64 a message", load: &load{streams: 8, conns: 8, inFlight: 256, batch: 64},
			goals: []goal{atLeast("rate", 80_000, 100_000).own()}},
		{name: "read", title: "linearizable read, 64 clients on 8, leader", load: &load{clients: 64, conns: 8, read: true},
			goals: []goal{atLeast("rate", 1.5, 2)}},
		{name: "readall", title: "linearizable read, 64 clients on 8, all nodes", load: &load{clients: 64, conns: 8, read: true, spread: true},
			goals: []goal{atLeast("rate", 1.5, 2)}},
		{name: "stale", title: "stale read, 64 clients on 8, leader", load: &load{clients: 64, conns: 8, read: true, stale: true},
			goals: []goal{atLeast("rate", 1.6, 0)}},
		{name: "outage", title: "write outage after kill -9 of the leader", special: outage, tuned: true,
			goals: []goal{atMost("outage median ms", 400, 0).own(), atMost("outage max ms", 800, 0).own(), atMost("stuck beyond outage ms", 1000, 0).own()}},
		{name: "objects", title: "1,000,000 objects of 256 bytes", special: objects,
			goals: []goal{atMost("resident MB", 0.4, 0), atMost("all killed to read s", 0.2, 0), atMost("follower restart s", 0.25, 0)}},
		{name: "idle", title: "idle cluster, per member", special: idle,
			goals: []goal{atMost("idle cores", 0.03, 0).own(), atMost("idle MB", 60, 0).own()}},

		{name: "snapshot", title: "CreateSnapshot beside writes", recovery: snapshotRow, own: true,
			goals: []goal{atMost("create max ms", 150, 0).own(), atMost("write p99 during / before", 1.3, 0).own()}},
		{name: "stream", title: "StreamSnapshot on loopback", recovery: streamRow, own: true,
			goals: []goal{atLeast("zstd MB/s", 100, 0).own(), atMost("resident growth MB", 64*1.048576, 0).own()}},
		{name: "validate", title: "RestoreSnapshot validate_only", recovery: validateRow, own: true,
			goals: []goal{atMost("validate s", 10, 0).own()}},
		{name: "restore", title: "online RestoreSnapshot into the changed cluster, beside reads and writes", recovery: restoreRow, own: true,
			goals: []goal{atMost("restore s", 20, 0).own(), atMost("longest read gap ms", 1000, 0).own(), atMost("writes paused ms", 1000, 0).own()}},
		{name: "restart", title: "restart after kill -9 to a linearizable read, each node in turn", recovery: restartRow, own: true,
			goals: []goal{atMost("restart max s", 2, 0).own()}},
		{name: "catchup", title: "a follower the log does not reach back to, beside writes", recovery: catchupRow, own: true,
			goals: []goal{atMost("write p99 during / before", 1.5, 0).own()}},
		{name: "image", title: "a follower the log does not reach back to, on an idle cluster", recovery: imageRow, own: true,
			goals: []goal{atLeast("image MB/s", 150, 0).own()}},
		{name: "save", title: "snapshot of a running cluster to a file", recovery: saveRow,
			goals: []goal{atMost("save s", 0.5, 0)}},
		{name: "missed", title: "a follower that missed puts, on a cluster that is idle since", recovery: missedRow,
			goals: []goal{atMost("holds all s", 0.5, 0), atMost("reported behind that s", 0.5, 0).own()}},
		{name: "newcluster", title: "a new cluster from the file", recovery: newClusterRow,
			goals: []goal{atMost("restore and start s", 0.5, 0)}},
		{name: "learner", title: "an empty new node, on an idle cluster", recovery: learnerRow,
			goals: []goal{atMost("holds all s", 0.5, 0), atMost("reported behind that s", 0.5, 0).own(), atMost("voter s", 15, 0).own()}},
	}
}

func rowNames() []string {
	var out []string
	for _, r := range allRows() {
		out = append(out, r.name)
	}
	return out
}

// chooseRows picks rows by name; an empty text is all of them.
func chooseRows(text string) ([]row, error) {
	var out []row
	if text = strings.TrimSpace(text); text == "" || text == "recovery" {
		for _, r := range allRows() {
			if (r.recovery != nil) == (text == "recovery") {
				out = append(out, r)
			}
		}
		return out, nil
	}
	for name := range strings.SplitSeq(text, ",") {
		found := false
		for _, r := range allRows() {
			if r.name == strings.TrimSpace(name) {
				out, found = append(out, r), true
			}
		}
		if !found {
			return nil, fmt.Errorf("unknown row %q; there are %s", name, strings.Join(rowNames(), ", "))
		}
	}
	return out, nil
}
