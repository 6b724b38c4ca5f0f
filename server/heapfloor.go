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
// have been shrunk and grow again: a twelfth of all servers' CPU, spent to save
// memory nobody was short of (docs/performance.md). With more than half of this
// alive, Go's own rule holds.
const heapFloor = 128 << 20

// heapRoom is what the heap may grow by between collections without a second
// thought; above it Go's rule to let it double is tightened, down to a half. A
// leader of 100,000 sidecars keeps 300 to 400 MB alive and makes little garbage:
// doubling would be memory for nothing.
const heapRoom = 192 << 20

// heapFloorOnce: the collector is one per process, whatever number of nodes is
// in it.
var heapFloorOnce sync.Once

// KeepHeapFloor lets the heap of this process grow to 128 MiB between
// collections, and gives back what a burst has left behind. It does nothing when GOGC is set: then somebody has decided.
// GOMEMLIMIT goes before it, as before GOGC.
func KeepHeapFloor() {
	if _, set := os.LookupEnv("GOGC"); set {
		return
	}
	heapFloorOnce.Do(func() {
		f := &floorKeeper{percent: goDefaultPercent}
		f.follow()
		go returnAfterBursts()
	})
}

const (
	goDefaultPercent = 100
	// A collection costs as much as is alive, and as is scanned: not for less than
	// this of either.
	leastPercent   = 50
	scannedPercent = 25
)

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
	read := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}, {Name: "/gc/scan/globals:bytes"},
	}
	metrics.Read(read)
	var sizes [3]uint64
	for i := range read {
		if read[i].Value.Kind() != metrics.KindUint64 {
			return // a runtime that does not tell keeps its own rule
		}
		sizes[i] = read[i].Value.Uint64()
	}
	percent := floorPercent(sizes[0], sizes[1]+sizes[2])
	// Setting it stops the world for a moment; small steps are not worth it.
	if d := percent - f.percent; d > f.percent/8 || -d > f.percent/8 {
		debug.SetGCPercent(percent)
		f.percent = percent
	}
}

// maxFloorPercent bounds what a heap that grows by leaps may reach before the
// percentage is next set: it follows collections, and can miss one.
const maxFloorPercent = 800

// floorPercent returns the percentage at which a heap with live bytes alive is
// collected at heapFloor, Go's default above, and less beyond heapRoom.
//
// The runtime applies the percentage to stacks and globals as well, so what is
// scanned counts here too: with 100,000 streams, whose stacks are as large as all that
// is alive, the heap would grow by half of these besides.
func floorPercent(live, scanned uint64) int {
	if live >= heapFloor/2 {
		all := live + scanned
		room := max(min(live, heapRoom), live*leastPercent/100, all*scannedPercent/100)
		return int((room*100 + all - 1) / all)
	}
	percent := (heapFloor - live) * 100 / max(live+scanned, 1)
	return int(min(max(percent, goDefaultPercent), maxFloorPercent))
}
