package server

import (
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// returnEvery is how often it is looked whether a burst is over.
	returnEvery = 10 * time.Second
	// returnLeast is what is worth a collection out of turn.
	returnLeast = 128 << 20
	// returnLasts is for how long at least what is given back must not be needed
	// again, by the pace of the last returnEvery. So there is no more than about one
	// such collection in that time.
	returnLasts = time.Minute
)

// returnAfterBursts gives memory back to the system that a burst has left behind: a
// fleet that registers, a plan from nothing. It never returns.
//
// The runtime collects when the heap has grown and not when it rests, so what a burst
// has thrown away stays resident until the next one, or for minutes: on a leader of
// 100,000 sidecars a third of all it has.
func returnAfterBursts() {
	tick := time.NewTicker(returnEvery)
	defer tick.Stop()
	before, ok := readHeap()
	for range tick.C {
		now, known := readHeap()
		if ok && known && now.worthReturning(before) {
			debug.FreeOSMemory()
			now, known = readHeap()
		}
		before, ok = now, known
	}
}

// heapState is what the runtime tells of the heap, in bytes.
type heapState struct {
	objects uint64 // in use, garbage included
	live    uint64 // found alive by the last collection
	idle    uint64 // free, and resident still
	allocs  uint64 // since the process began
}

// readHeap returns false with a runtime that does not tell.
func readHeap() (heapState, bool) {
	read := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(read)
	for i := range read {
		if read[i].Value.Kind() != metrics.KindUint64 {
			return heapState{}, false
		}
	}
	return heapState{read[0].Value.Uint64(), read[1].Value.Uint64(), read[2].Value.Uint64(), read[3].Value.Uint64()}, true
}

// worthReturning decides; before is returnEvery ago.
func (h heapState) worthReturning(before heapState) bool {
	garbage := h.objects - min(h.objects, h.live)
	needed := (h.allocs - before.allocs) * uint64(returnLasts/returnEvery)
	return garbage+h.idle > max(returnLeast, needed)
}
