package server

import (
	"runtime"
	"runtime/debug"
	"testing"
)

func TestFloorPercent(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct{ live, scanned uint64 }{{20 * mb, 0}, {25 * mb, mb}, {20 * mb, 15 * mb}, {63 * mb, 0}} {
		percent := uint64(floorPercent(c.live, c.scanned))
		// What the runtime makes of it: mgcpacer.go, commit.
		goal := c.live + (c.live+c.scanned)*percent/100
		if goal > heapFloor || goal < heapFloor-(c.live+c.scanned)/50 {
			t.Errorf("with %d bytes alive and %d scanned the heap is collected at %d, want %d", c.live, c.scanned, goal, heapFloor)
		}
	}
	for _, c := range []struct{ live, scanned uint64 }{{heapFloor / 2, 0}, {heapFloor, mb}, {heapRoom, 0}, {20 * mb, 1 << 30}} {
		if p := floorPercent(c.live, c.scanned); p != goDefaultPercent {
			t.Errorf("with %d bytes alive and %d scanned the percentage is %d, want Go's default", c.live, c.scanned, p)
		}
	}
	for live, want := range map[uint64]int{heapRoom * 5 / 4: 80, 2 * heapRoom: 50, 1 << 40: 50} {
		if p := floorPercent(live, 0); p != want {
			t.Errorf("with %d bytes alive the percentage is %d, want %d", live, p, want)
		}
	}
	// However much is scanned, the heap grows by what it may grow by without.
	for _, c := range []struct{ live, scanned, room uint64 }{
		{300 * mb, 150 * mb, heapRoom}, {600 * mb, 300 * mb, 300 * mb}, {100 * mb, 100 * mb, 100 * mb}, {100 * mb, 900 * mb, 250 * mb},
	} {
		got := (c.live + c.scanned) * uint64(floorPercent(c.live, c.scanned)) / 100
		if got < c.room || got > c.room+(c.live+c.scanned)/100 {
			t.Errorf("with %d bytes alive and %d scanned the heap grows by %d, want %d", c.live, c.scanned, got, c.room)
		}
	}
	for _, live := range []uint64{0, 1, mb} {
		if p := floorPercent(live, 0); p != maxFloorPercent {
			t.Errorf("with %d bytes alive the percentage is %d, want at most %d", live, p, maxFloorPercent)
		}
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
