package router

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

func read(t *testing.T, fs vfs.FS, name string) []byte {
	t.Helper()
	f, err := fs.Open(name)
	noError(t, err)
	defer f.Close()
	b, err := io.ReadAll(f)
	noError(t, err)
	return b
}

// What is written in pieces of all sizes is what is in the file, and what was synced
// is there after a crash.
func TestLargeWritesAreWhatWasWritten(t *testing.T) {
	r := randomness(t)
	for range 50 {
		mem := vfs.NewCrashableMem()
		fs := &largeWritesFS{mem}
		f, err := fs.Create("table", flushCategory)
		noError(t, err)
		dir, err := mem.OpenDir("")
		noError(t, err)
		noError(t, dir.Sync())
		var want []byte
		synced := 0
		for range 1 + r.Intn(20) {
			p := make([]byte, r.Intn(3*largeWrite/2))
			r.Read(p)
			want = append(want, p...)
			n, err := f.Write(p)
			if noError(t, err); n != len(p) {
				t.Fatalf("wrote %d of %d bytes", n, len(p))
			}
			clear(p) // the caller's again
			switch r.Intn(6) {
			case 0:
				noError(t, f.Sync())
				synced = len(want)
			case 1:
				noError(t, f.SyncData())
				synced = len(want)
			case 2:
				_, err := f.SyncTo(int64(len(want)))
				noError(t, err)
			}
		}
		if left := read(t, mem.CrashClone(vfs.CrashCloneCfg{}), "table"); len(left) < synced || !bytes.Equal(left[:synced], want[:synced]) {
			t.Fatalf("of %d bytes that were synced %d are left by a crash, or others", synced, len(left))
		}
		noError(t, f.Close())
		if got := read(t, mem, "table"); !bytes.Equal(got, want) {
			t.Fatalf("%d bytes were written, %d are there, or others", len(want), len(got))
		}
	}
}

// A write that fails after it was answered fails all that comes after it, the end
// included: nobody takes the file for complete.
func TestLargeWritesFailForGood(t *testing.T) {
	full := errors.New("no space")
	broken := false
	fs := &largeWritesFS{errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if broken && op.Kind == errorfs.OpFileWrite {
			broken = false // the next one would succeed
			return full
		}
		return nil
	}))}
	for what, call := range map[string]func(vfs.File) error{
		"Sync":     vfs.File.Sync,
		"SyncData": vfs.File.SyncData,
		"SyncTo":   func(f vfs.File) error { _, err := f.SyncTo(1); return err },
		"Write":    func(f vfs.File) error { _, err := f.Write(make([]byte, 2*largeWrite)); return err },
	} {
		f, err := fs.Create(what, compactionCategory)
		noError(t, err)
		_, err = f.Write([]byte("something"))
		noError(t, err)
		broken = true
		if err := call(f); !errors.Is(err, full) {
			t.Errorf("%s: %v, want that there is no space", what, err)
		}
		if _, err := f.Write([]byte("more")); !errors.Is(err, full) {
			t.Errorf("a write after a failed %s: %v", what, err)
		}
		if err := f.Sync(); !errors.Is(err, full) {
			t.Errorf("a sync after a failed %s: %v", what, err)
		}
		if err := f.Close(); !errors.Is(err, full) {
			t.Errorf("the end after a failed %s: %v", what, err)
		}
	}
}

// openFiles counts the tables that were created and not closed.
type openFiles struct {
	vfs.FS
	n atomic.Int64
}

type openFile struct {
	vfs.File
	n *atomic.Int64
}

func (o *openFiles) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := o.FS.Create(name, c)
	if err != nil || c != flushCategory {
		return f, err
	}
	o.n.Add(1)
	return openFile{f, &o.n}, nil
}

func (f openFile) Close() error {
	f.n.Add(-1)
	return f.File.Close()
}

// While the disk is full Pebble tries to flush again and again, and none of the tables it
// gives up stays open: they would hold the space that everybody waits for.
func TestFullDiskLeavesNoFilesOpen(t *testing.T) {
	var failures atomic.Int64
	failures.Store(40)
	full := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileWrite && strings.HasSuffix(op.Path, ".sst") && failures.Add(-1) >= 0 {
			return syscall.ENOSPC
		}
		return nil
	}))
	files := &openFiles{FS: full}
	o := Options{}
	d, err := openDatabase(files, "/db", "db", o.EnsureDefaults(), true)
	noError(t, err)
	fill(t, d, randomness(t), 100)
	for err = d.flush(); errors.Is(err, ErrNoSpace); err = d.flush() {
	}
	noError(t, err)
	noError(t, d.release())
	if left := failures.Load(); left >= 0 {
		t.Fatalf("%d of 40 writes did not fail", left+1)
	}
	if n := files.n.Load(); n != 0 {
		t.Fatalf("%d tables were never closed", n)
	}
}

// BenchmarkFlush measures the flush of 60,000 records of 300 bytes, which is about what
// the log holds between two truncations, onto the disk of the temporary directory.
func BenchmarkFlush(b *testing.B) {
	o := Options{MemTableBytes: 64 << 20}
	d, err := openDatabase(vfs.Default, b.TempDir()+"/db", "db", o.EnsureDefaults(), true)
	noError(b, err)
	b.Cleanup(func() { noError(b, d.release()) })
	r := rand.New(rand.NewSource(1))
	v := make([]byte, 300)
	for range b.N {
		b.StopTimer()
		for range 60_000 {
			r.Read(v)
			noError(b, d.db.Set(fmt.Appendf(nil, "c%015x", r.Uint64()>>4), v, pebble.NoSync))
		}
		b.StartTimer()
		noError(b, d.flush())
	}
}
