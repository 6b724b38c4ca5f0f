package background

import (
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// nice returns the niceness of the calling thread.
func nice(t *testing.T) int {
	raw, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Error(err)
	}
	return 20 - raw
}

// Work in the background lets others go first, and who is not in it keeps its
// priority: no other goroutine ever runs on such a thread.
func TestOthersGoFirst(t *testing.T) {
	usual := nice(t)
	want := min(usual+niceness, mostNice)
	for range 20 {
		ran := false
		Do(func() {
			ran = true
			if got := nice(t); got != want {
				t.Errorf("work in the background has niceness %d, want %d", got, want)
			}
			// New threads are not made in the image of this one.
			var others sync.WaitGroup
			for range 4 {
				others.Go(func() {
					runtime.LockOSThread()
					if got := nice(t); got != usual {
						t.Errorf("a goroutine that was started by it has niceness %d, want %d", got, usual)
					}
				})
			}
			others.Wait()
		})
		if !ran {
			t.Fatal("Do returned before its work was done")
		}
		var after sync.WaitGroup
		for range 4 {
			after.Go(func() {
				runtime.LockOSThread()
				if got := nice(t); got != usual {
					t.Errorf("a goroutine after it has niceness %d, want %d", got, usual)
				}
			})
		}
		after.Wait()
	}
}
