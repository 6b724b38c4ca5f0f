package server

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

// heapFloor is the size up to which the Go heap may grow before a collection,
// however little of it is alive.
//
// By default Go collects whenever the heap has doubled. A node that keeps 25 MB
// alive and takes ten thousand commands a second then collects five times a
// second, and after each time the stacks of the goroutines that wait for calls
// have been shrunk and grow again: together a sixth of the leader's CPU, spent to save memory nobody was short
// of. With more than half of this alive, Go's own rule holds.
const heapFloor = 128 << 20

// heapFloorOnce: the collector is one per process, whatever number of nodes is
// in it.
var heapFloorOnce sync.Once

// KeepHeapFloor lets the heap of this process grow to 128 MiB between
// collections. It does nothing when GOGC is set: then somebody has decided.
// GOMEMLIMIT goes before it, as before GOGC.
func KeepHeapFloor() {
	if _, set := os.LookupEnv("GOGC"); set {
		return
	}
	heapFloorOnce.Do(func() {
		f := &floorKeeper{percent: goDefaultPercent}
		f.follow()
	})
}

const goDefaultPercent = 100

// floorKeeper sets the garbage collector's percentage anew after each
// collection.
type floorKeeper struct{ percent int }

// follow adjusts now and after every collection: the finalizer of an object that
// nothing refers to runs then.
func (f *floorKeeper) follow() {
	f.adjust()
	type sentinel struct{ f *floorKeeper }
	runtime.SetFinalizer(&sentinel{f}, func(s *sentinel) { s.f.follow() })
}

func (f *floorKeeper) adjust() {
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(live)
	if live[0].Value.Kind() != metrics.KindUint64 {
		return
	}
	percent := floorPercent(live[0].Value.Uint64())
	// Setting it stops the world for a moment; small steps are not worth it.
	if d := percent - f.percent; d > f.percent/8 || -d > f.percent/8 {
		debug.SetGCPercent(percent)
		f.percent = percent
	}
}

// floorPercent returns the percentage at which a heap with live bytes alive is
// collected at heapFloor, and never less than Go's default.
func floorPercent(live uint64) int {
	// Before the first collection nothing is known to be alive.
	live = max(live, 4<<20)
	if live >= heapFloor/2 {
		return goDefaultPercent
	}
	return int((heapFloor - live) * 100 / live)
}
