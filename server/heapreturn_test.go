package server

import (
	"runtime"
	"testing"
)

// Goal: memory goes back once a burst is over, not while it lasts, and not for little.
func TestWorthReturning(t *testing.T) {
	const mb = 1 << 20
	before := heapState{objects: 600 * mb, live: 300 * mb, idle: 50 * mb, allocs: 5000 * mb}
	for _, c := range []struct {
		name  string
		now   heapState
		worth bool
	}{
		{"a burst is over", heapState{objects: 610 * mb, live: 300 * mb, idle: 40 * mb, allocs: 5010 * mb}, true},
		{"it goes on", heapState{objects: 700 * mb, live: 300 * mb, idle: 40 * mb, allocs: 5100 * mb}, false},
		{"there is little to give back", heapState{objects: 400 * mb, live: 300 * mb, idle: 20 * mb, allocs: 5000 * mb}, false},
		{"what is free counts", heapState{objects: 300 * mb, live: 300 * mb, idle: 200 * mb, allocs: 5001 * mb}, true},
		{"more is alive than is in use", heapState{objects: 200 * mb, live: 300 * mb, idle: 0, allocs: 5001 * mb}, false},
	} {
		if got := c.now.worthReturning(before); got != c.worth {
			t.Errorf("%s: worth %v", c.name, got)
		}
	}
}

// The runtime tells what is asked of it: garbage is in use and not alive.
func TestReadHeap(t *testing.T) {
	runtime.GC()
	before, ok := readHeap()
	if !ok {
		t.Fatal("the runtime does not tell the state of the heap")
	}
	garbage := make([]byte, 8<<20)
	runtime.KeepAlive(garbage)
	now, _ := readHeap()
	if now.objects < before.objects+4<<20 || now.allocs < before.allocs+8<<20 || before.live == 0 {
		t.Fatalf("8 MiB later %+v is %+v", before, now)
	}
}
