package snap

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// TestReceiveOfAnotherSize: a partial receive is only resumed when the stream
// is the same.
func TestReceiveOfAnotherSize(t *testing.T) {
	r := source(t)
	s := mustOpenStore(t, posixFS{vfs.NewMem()}, imageDir, testOptions())
	w, err := s.Receive(r.Info().ID, r.Size()+1)
	if err != nil {
		t.Fatal(err)
	}
	if err := send(r, w, 600, 1); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a manifest that does not fit the size: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if w, err = s.Receive("another-id", r.Size()); err != nil {
		t.Fatal(err)
	}
	if err := send(r, w, 600, 1); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), r.Info().ID) {
		t.Fatalf("a manifest of another image: %v", err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Fatalf("left over: %q", left)
	}
}

func TestReceiveLimits(t *testing.T) {
	r := source(t)
	mem := vfs.NewMem()
	o := testOptions()
	o.MaxManifestBytes, o.MaxImageBytes = 1000, 1000
	s := mustOpenStore(t, mem, imageDir, o)
	if _, err := s.Receive("x", 2001); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("too large: %v", err)
	}
	for _, size := range []int64{-1, 0, headerLen - 1} {
		if _, err := s.Receive("x", size); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("size %d: %v", size, err)
		}
	}
	mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: uint64(r.Size()) - 1})
	if _, err := s.Receive(r.Info().ID, r.Size()); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("no space: %v", err)
	}
	mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: uint64(r.Size())})
	if _, err := receiveAll(s, r, 100); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)

	mem.TestingSetDiskUsage(vfs.DiskUsage{})

	// A manifest that announces too much is refused at its header, before it is
	// gathered in memory.
	big := fmt.Appendf(nil, headerFormat+crcFormat, 1, 5000, 0)
	w, err := s.Receive("big", 2000)
	if err != nil {
		t.Fatal(err)
	}
	b := append(big, make([]byte, 20)...)
	if err := w.Write(Chunk{Data: b, CRC: crc32.Checksum(b, castagnoli)}); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("manifest too large: %v", err)
	}
}

// TestPartialsAreBounded: by number and age, in the process and at its start,
// and never at the cost of one that is going on.
func TestPartialsAreBounded(t *testing.T) {
	fs := posixFS{vfs.NewMem()}
	now := time.Unix(1_700_000_000, 0)
	o := Options{Now: func() time.Time { return now }, MaxPartials: 2, MaxPartialAge: time.Hour}
	s := mustOpenStore(t, fs, imageDir, o)
	begin := func(id string) (*Receiver, error) { return s.Receive(id, 1000) }
	expect := func(want ...string) {
		t.Helper()
		var names []string
		for _, n := range leftovers(t, s) {
			names = append(names, strings.TrimPrefix(n, receivingPrefix))
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			t.Fatalf("partial receives %q, want %q", names, want)
		}
	}
	a, err := begin("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := begin("a"); !errors.Is(err, ErrBusy) {
		t.Fatalf("the same image twice: %v", err)
	}
	b, err := begin("b")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := begin("c"); !errors.Is(err, ErrBusy) {
		t.Fatalf("one too many: %v", err)
	}
	expect("a", "b")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := begin("c")
	if err != nil {
		t.Fatalf("an idle one must make room: %v", err)
	}
	expect("a", "c")
	now = now.Add(time.Minute)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	d, err := begin("d")
	if err != nil {
		t.Fatal(err)
	}
	expect("c", "d")
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
	expect("c")
	now = now.Add(time.Hour + time.Second)
	e, err := begin("e")
	if err != nil {
		t.Fatal(err)
	}
	expect("e")
	now = now.Add(2 * time.Hour)
	if _, err := begin("f"); err != nil {
		t.Fatalf("e is going on, f may begin: %v", err)
	}
	expect("e", "f")
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}

	// A start applies the bounds too. e was begun two hours ago.
	s = mustOpenStore(t, fs, imageDir, o)
	expect("f")
	o.MaxPartials = 1
	now = now.Add(time.Minute)
	g, err := mustOpenStore(t, fs, imageDir, Options{Now: o.Now, MaxPartials: 9}).Receive("g", 1000)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpenStore(t, fs, imageDir, o)
	expect("g")
}

// TestCommitComparesTheDisk: what arrived in order but rotted on the way to
// Commit does not become an image, and the next attempt starts afresh.
func TestCommitComparesTheDisk(t *testing.T) {
	r := source(t)
	fs := posixFS{vfs.NewMem()}
	s := mustOpenStore(t, fs, imageDir, testOptions())
	dir := fs.PathJoin(s.partialDir(r.Info().ID), receivedImage)
	for _, name := range []string{manifestName, "000001.sst", "000003.sst", "stranger"} {
		w, err := s.Receive(r.Info().ID, r.Size())
		if err != nil {
			t.Fatal(err)
		}
		if w.Offset() != 0 {
			t.Fatalf("resumed at %d after a failed commit", w.Offset())
		}
		if err := send(r, w, 64, -1); err != nil {
			t.Fatal(err)
		}
		b, err := readFile(fs, fs.PathJoin(dir, name))
		if err != nil && !isNotExist(err) {
			t.Fatal(err)
		}
		b = append(b, 'x')
		b[0] ^= 1
		overwrite(t, fs, fs.PathJoin(dir, name), b)
		if _, err := w.Commit(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), name) {
			t.Fatalf("%s damaged: got %v, want ErrCorrupt naming it", name, err)
		}
		if len(s.List()) != 0 || len(leftovers(t, s)) != 0 {
			t.Fatalf("%s damaged: images %q, left over %q", name, ids(s.List()), leftovers(t, s))
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := receiveAll(s, r, 64); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)
}

// TestFailedSyncIsNotResumed: after a failed fsync the kernel may show data
// that never reached the disk, so none of it is trusted, even when it cannot be
// removed at once.
func TestFailedSyncIsNotResumed(t *testing.T) {
	for _, inline := range []bool{true, false} {
		t.Run(fmt.Sprintf("inline=%t", inline), func(t *testing.T) { failedSync(t, inline) })
	}
}

// failedSync lets syncs fail that are made by turns with what is received, or
// beside it.
func failedSync(t *testing.T, inline bool) {
	r := source(t)
	var failSync, failRemove atomic.Bool
	fs := hookFS(vfs.NewMem(), func(op errorfs.Op) error {
		if failSync.Load() && op.Kind == errorfs.OpFileSync || failRemove.Load() && op.Kind == errorfs.OpRemove {
			return errorfs.ErrInjected
		}
		return nil
	})
	o := testOptions()
	o.SyncBytes, o.Inline = 300, inline
	s := mustOpenStore(t, fs, imageDir, o)
	for _, failRemoves := range []bool{false, true, false} {
		w, err := s.Receive(r.Info().ID, r.Size())
		if err != nil {
			t.Fatal(err)
		}
		if w.Offset() != 0 {
			t.Fatalf("resumed at %d", w.Offset())
		}
		// Past the manifest, whose own fsync this test is not about.
		if err := send(r, w, 290, 1); err != nil {
			t.Fatal(err)
		}
		for w.info == nil {
			if err := send(r, w, 50, 1); err != nil {
				t.Fatal(err)
			}
		}
		failRemove.Store(failRemoves)
		failSync.Store(true)
		err = send(r, w, 20, -1)
		if err == nil {
			_, err = w.Commit()
		}
		if !errors.Is(err, errorfs.ErrInjected) {
			t.Fatalf("got %v", err)
		}
		if again := w.Write(Chunk{}); !errors.Is(again, errorfs.ErrInjected) {
			t.Fatalf("a failed receiver took more: %v", again)
		}
		failSync.Store(false)
		failRemove.Store(false)
	}
	if _, err := receiveAll(s, r, 20); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)
}

// TestSentContentIsCompared: bytes that the manifest does not speak of, sent with the
// checksums of chunks that they have, do not become an image: wherever one differs, and
// wherever the transfer was interrupted.
func TestSentContentIsCompared(t *testing.T) {
	r := source(t)
	rng := rand.New(rand.NewPCG(seed(t), 1))
	manifest := r.Size() - r.Info().Bytes
	for _, disk := range []bool{false, true} {
		t.Run(fmt.Sprintf("disk=%t", disk), func(t *testing.T) {
			s := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
			if disk {
				s = mustOpenStore(t, vfs.Default, filepath.Join(t.TempDir(), "images"), testOptions())
			}
			for wrong := manifest; wrong < r.Size(); wrong++ {
				cut := manifest + rng.Int64N(r.Size()-manifest)
				w, err := s.Receive(r.Info().ID, r.Size())
				if err != nil {
					t.Fatal(err)
				}
				resumed := false
				for err == nil && w.Offset() < r.Size() {
					if !resumed && w.Offset() >= cut {
						resumed = true
						if err = w.Close(); err != nil {
							t.Fatal(err)
						}
						if w, err = s.Receive(r.Info().ID, r.Size()); err != nil {
							t.Fatal(err)
						}
					}
					c, rerr := r.ReadChunk(w.Offset(), 1+rng.IntN(60))
					if rerr != nil {
						t.Fatal(rerr)
					}
					if at := wrong - c.Offset; at >= 0 && at < int64(len(c.Data)) {
						c.Data[at] ^= 1
						c.CRC = crc32.Checksum(c.Data, castagnoli)
					}
					err = w.Write(c)
				}
				if err == nil {
					_, err = w.Commit()
				}
				name := fileAt(r.Info(), wrong-manifest)
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), name) {
					t.Fatalf("byte %d differs, cut at %d: got %v, want ErrCorrupt naming %s", wrong, cut, err, name)
				}
				if len(s.List()) != 0 || len(leftovers(t, s)) != 0 {
					t.Fatalf("images %q, left over %q", ids(s.List()), leftovers(t, s))
				}
			}
			if _, err := receiveAll(s, r, 64); err != nil {
				t.Fatal(err)
			}
			mustHold(t, s, r, streamed)
		})
	}
}

// fileAt returns which file of an image a byte is in.
func fileAt(info Info, at int64) string {
	for _, f := range info.Files {
		if at -= f.Size; at < 0 {
			return f.Name
		}
	}
	return "none"
}

// TestReceivedTablesAreKnown: who makes an image of a state that was received reads none
// of its tables again.
func TestReceivedTablesAreKnown(t *testing.T) {
	r := source(t)
	s := mustOpenStore(t, vfs.Default, filepath.Join(t.TempDir(), "images"), testOptions())
	info, err := receiveAll(s, r, 64)
	if err != nil {
		t.Fatal(err)
	}
	// What takes a state over links to its files. An image of that would be refused by
	// who reads it, were a checksum wrong.
	again, err := s.Create(t.Context(), func(dir string) (Meta, error) {
		for _, f := range info.Files {
			if err := os.MkdirAll(dir, 0o750); err != nil {
				return Meta{}, err
			}
			if err := os.Link(filepath.Join(s.Dir(info.ID), f.Name), filepath.Join(dir, f.Name)); err != nil {
				return Meta{}, err
			}
		}
		if read, err := s.Warm(t.Context(), dir, nil); err != nil || read != 0 {
			t.Errorf("read %d bytes of tables that were just received: %v", read, err)
		}
		return Meta{Index: 13, Term: 3, ConfState: info.ConfState}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(again.ID); err != nil {
		t.Error(err)
	}
	for _, f := range info.Files {
		st, err := vfs.Default.Stat(filepath.Join(s.Dir(info.ID), f.Name))
		if err != nil {
			t.Fatal(err)
		}
		id, _ := identify(st)
		if _, durable, known := s.opts.Sums.get(id); known && !durable {
			t.Errorf("%s, which is durable, would be synced for the next image", f.Name)
		}
	}
}

// scarceFS has as much room as is said, and cannot preallocate if that is said.
type scarceFS struct {
	vfs.FS
	room            *uint64
	noPreallocation bool
}

func (f scarceFS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: *f.room}, nil
}

func (f scarceFS) OpenReadWrite(name string, c vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	file, err := f.FS.OpenReadWrite(name, c, opts...)
	if err != nil || !f.noPreallocation {
		return file, err
	}
	return unplanned{file}, nil
}

// unplanned is a file that cannot be preallocated.
type unplanned struct{ vfs.File }

func (unplanned) Preallocate(int64, int64) error { return errorfs.ErrInjected }

// TestPreallocatedRoomIsThere: what a file got of the disk before its content came needs
// no room once more when the receive is resumed; and a disk that gives nothing in advance
// does as well.
func TestPreallocatedRoomIsThere(t *testing.T) {
	big := content{"000001.sst": strings.Repeat("a large table ", 3*preallocateBytes/14)}
	src := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
	r, err := src.Open(mustCreate(t, src, 12, big).ID)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, without := range []bool{false, true} {
		room := uint64(r.Size())
		s := mustOpenStore(t, scarceFS{vfs.Default, &room, without}, filepath.Join(t.TempDir(), "images"), testOptions())
		w, err := s.Receive(r.Info().ID, r.Size())
		if err != nil {
			t.Fatal(err)
		}
		if err := send(r, w, preallocateBytes, 2); err != nil {
			t.Fatal(err)
		}
		held := w.Offset()
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(filepath.Join(s.partialDir(r.Info().ID), receivedImage, "000001.sst"))
		if err != nil {
			t.Fatal(err)
		}
		if room = uint64(r.Size() - held); st.Sys().(*syscall.Stat_t).Blocks*512 >= r.Info().Bytes {
			room = 4096 // all of it was given
		} else if !without {
			t.Log("this file system preallocates nothing")
		}
		if w, err = s.Receive(r.Info().ID, r.Size()); err != nil {
			t.Fatalf("resumed at %d of %d bytes with room for %d: %v", held, r.Size(), room, err)
		}
		if w.Offset() != held {
			t.Errorf("resumed at %d, held %d", w.Offset(), held)
		}
		if err := send(r, w, preallocateBytes, -1); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Commit(); err != nil {
			t.Fatal(err)
		}
		mustHold(t, s, r, big)
	}
}

// TestNothingIsWarmedBesideAReceive: tables that an image is about to replace are not
// read for their checksums.
func TestNothingIsWarmedBesideAReceive(t *testing.T) {
	r := source(t)
	s := mustOpenStore(t, vfs.Default, filepath.Join(t.TempDir(), "images"), testOptions())
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "000001.sst"), []byte("a table"), 0o640); err != nil {
		t.Fatal(err)
	}
	known := t.TempDir()
	if err := os.WriteFile(filepath.Join(known, "000002.sst"), []byte("known"), 0o640); err != nil {
		t.Fatal(err)
	}
	if read, err := s.Warm(t.Context(), known, nil); err != nil || read != 5 {
		t.Fatalf("read %d bytes: %v", read, err)
	}
	w, err := s.Receive(r.Info().ID, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	for range keepPasses + 1 {
		if read, err := s.Warm(t.Context(), dir, nil); err != nil || read != 0 {
			t.Fatalf("read %d bytes beside a receive: %v", read, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// However long that took, what was known before is not forgotten.
	if read, err := s.Warm(t.Context(), known, nil); err != nil || read != 0 {
		t.Fatalf("read %d bytes again, of a table that was known: %v", read, err)
	}
	if read, err := s.Warm(t.Context(), dir, nil); err != nil || read != 7 {
		t.Fatalf("read %d bytes after it: %v", read, err)
	}
}

// TestCommitComparesARealDisk: as TestCommitComparesTheDisk, where files have an
// identity, and were compared as soon as each was whole.
func TestCommitComparesARealDisk(t *testing.T) {
	r := source(t)
	s := mustOpenStore(t, vfs.Default, filepath.Join(t.TempDir(), "images"), testOptions())
	dir := filepath.Join(s.partialDir(r.Info().ID), receivedImage)
	for _, name := range []string{"000001.sst", "000003.sst"} {
		w, err := s.Receive(r.Info().ID, r.Size())
		if err != nil {
			t.Fatal(err)
		}
		if err := send(r, w, 64, -1); err != nil {
			t.Fatal(err)
		}
		if err := w.side.end(); err != nil {
			t.Fatal(err)
		}
		for i, f := range w.info.Files {
			if f.Size > 0 && w.sealed[i] == (fileIdentity{}) {
				t.Errorf("%s was not compared", f.Name)
			}
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o640); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Commit(); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), name) {
			t.Fatalf("%s damaged: got %v, want ErrCorrupt naming it", name, err)
		}
	}
	if _, err := receiveAll(s, r, 64); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)
}
