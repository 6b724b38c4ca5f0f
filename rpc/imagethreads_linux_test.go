package rpc

import (
	"maps"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"golang.org/x/sys/unix"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/snap"
)

// niceOfThread returns the niceness of the calling thread.
func niceOfThread(t *testing.T) int {
	raw, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Error(err)
	}
	return 20 - raw
}

// watchThreads puts the images of n on a file system that notes how nice the threads
// are that write pieces of files and sync them. It returns what tells how many calls
// there were of each niceness.
func watchThreads(t *testing.T, n *fakeNode) func() map[int]int {
	var mu sync.Mutex
	calls := map[int]int{}
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		// The names are those of makeImage: the journal is begun, and synced, before.
		if op.Kind == errorfs.OpFileWriteAt || op.Kind == errorfs.OpFileSync && strings.Contains(op.Path, "file-") {
			calls[niceOfThread(t)]++
		}
		return nil
	}))
	store, err := snap.OpenStore(fs, "images", snap.Options{})
	if err != nil {
		t.Fatal(err)
	}
	n.fs, n.images = fs, store
	return func() map[int]int {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(calls)
	}
}

// Images are received and stored on threads that others are preferred to, whether
// they were asked for or not.
func TestImagesAreReceivedOnThreadsOfTheirOwn(t *testing.T) {
	usual := niceOfThread(t)
	if usual >= 19 {
		t.Skip("the tests have the lowest priority already")
	}
	check := func(t *testing.T, what string, seen map[int]int) {
		t.Helper()
		if len(seen) == 0 {
			t.Errorf("no %s were seen", what)
		}
		for nice, n := range seen {
			if nice <= usual {
				t.Errorf("%d %s on threads of niceness %d; that of others is %d", n, what, nice, usual)
			}
		}
	}
	t.Run("sent", func(t *testing.T) {
		checkLeaks(t)
		a, b := newStation(t, 1, nil), newStation(t, 2, nil)
		writes := watchThreads(t, b.node)
		introduce(a, b)
		image := a.node.makeImage(t, 100, 3<<20)
		if err := a.transport.SendImage(t.Context(), snapshotMessage(1, 2, image), image); err != nil {
			t.Fatal(err)
		}
		check(t, "writes of an image that is received", writes())
	})
	t.Run("asked for", func(t *testing.T) {
		checkLeaks(t)
		a, b := newStation(t, 1, nil), newStation(t, 2, nil)
		writes := watchThreads(t, b.node)
		introduce(a, b)
		a.node.makeImage(t, 100, 3<<20)
		_, err := FetchState(t.Context(), FetchOptions{Identity: b.id, MinIndex: 100, Store: b.node.images,
			Peers: []raftnode.Member{{ID: 1, Addr: a.id.PeerAddr}}})
		if err != nil {
			t.Fatal(err)
		}
		check(t, "writes of an image that was asked for", writes())
	})
	if n := niceOfThread(t); n != usual {
		t.Errorf("the threads of others have niceness %d now, it was %d", n, usual)
	}
}
