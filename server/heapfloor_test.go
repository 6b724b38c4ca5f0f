package server

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestFloorPercent(t *testing.T) {
	for _, live := range []uint64{4 << 20, 10 << 20, 25 << 20, 63 << 20} {
		goal := live + live*uint64(floorPercent(live))/100
		if goal > heapFloor || goal < heapFloor-live/50 {
			t.Errorf("with %d bytes alive the heap is collected at %d, want %d", live, goal, heapFloor)
		}
	}
	for _, live := range []uint64{heapFloor / 2, heapFloor, 1 << 40} {
		if p := floorPercent(live); p != 100 {
			t.Errorf("with %d bytes alive the percentage is %d, want Go's default", live, p)
		}
	}
	if p := floorPercent(0); p > 100*heapFloor/(4<<20) {
		t.Errorf("an unknown live heap gives %d percent", p)
	}
}

// The percentage follows the live heap, in both directions.
func TestFloorKeeper(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	f := &floorKeeper{percent: goDefaultPercent}
	collect := func() int {
		runtime.GC()
		f.adjust()
		return f.percent
	}
	small := collect()
	if small <= 100 {
		t.Fatalf("a small heap has %d percent", small)
	}
	ballast := make([]byte, heapFloor)
	if p := collect(); p != 100 {
		t.Fatalf("a heap above the floor has %d percent", p)
	}
	runtime.KeepAlive(ballast)
	ballast = nil
	if p := collect(); p <= 100 {
		t.Fatalf("a heap that became small has %d percent", p)
	}
}
