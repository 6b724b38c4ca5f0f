package snap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// TestPebbleCheckpoint makes an image of a live database, sends it to another
// node with an interruption, opens what arrived as a database there and
// compares the two, key by key.
func TestPebbleCheckpoint(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) (fs vfs.FS, dir string){
		"disk":   func(t *testing.T) (vfs.FS, string) { return vfs.Default, t.TempDir() },
		"memory": func(t *testing.T) (vfs.FS, string) { return vfs.NewMem(), "/node" },
	} {
		t.Run(name, func(t *testing.T) {
			fs, dir := open(t)
			rng := rand.New(rand.NewPCG(seed(t), 2))
			db := mustOpenDB(t, fs, fs.PathJoin(dir, "a", "db"))
			defer func() { mustClose(t, db) }()
			fill := func(n int) {
				for range n {
					k := fmt.Appendf(nil, "key-%06d", rng.IntN(20_000))
					v := fmt.Appendf(nil, "value %d %s", rng.Uint64(), strings.Repeat("v", rng.IntN(200)))
					if err := db.Set(k, v, pebble.NoSync); err != nil {
						t.Fatal(err)
					}
				}
				if err := db.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			fill(10_000)
			fill(5_000)

			a := mustOpenStore(t, fs, fs.PathJoin(dir, "a", "images"), Options{})
			b := mustOpenStore(t, fs, fs.PathJoin(dir, "b", "images"), Options{})
			var want map[string]string
			info, err := a.Create(context.Background(), func(dir string) (Meta, error) {
				if err := db.Checkpoint(dir); err != nil {
					return Meta{}, err
				}
				want = dump(t, db)
				return testMeta(77), nil
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("image of %d files, %d bytes", len(info.Files), info.Bytes)
			// The image stays what it is while the database goes on.
			fill(5_000)
			if err := db.Compact(context.Background(), []byte("a"), []byte("z"), false); err != nil {
				t.Fatal(err)
			}
			if err := a.Verify(info.ID); err != nil {
				t.Fatal(err)
			}

			r, err := a.Open(info.ID)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if err := a.Purge(0); err != nil {
				t.Fatal(err)
			}
			w, err := b.Receive(info.ID, r.Size())
			if err != nil {
				t.Fatal(err)
			}
			const chunk = 10_007
			half := int(r.Size() / chunk / 2)
			if err := errors.Join(send(r, w, chunk, half), w.Close()); err != nil {
				t.Fatal(err)
			}
			b = mustOpenStore(t, fs, fs.PathJoin(dir, "b", "images"), Options{})
			if w, err = b.Receive(info.ID, r.Size()); err != nil {
				t.Fatal(err)
			}
			if w.Offset() != int64(half*chunk) {
				t.Fatalf("resumed at %d, want %d", w.Offset(), half*chunk)
			}
			if err := send(r, w, chunk, -1); err != nil {
				t.Fatal(err)
			}
			got, err := w.Commit()
			if err != nil {
				t.Fatal(err)
			}
			if got.ID != info.ID || got.Index != 77 || got.Size != info.Size {
				t.Fatalf("received %+v, want %+v", got, info)
			}

			// Opening a database writes to its directory: install a copy.
			copied := fs.PathJoin(dir, "b", "db")
			if ok, err := vfs.Clone(fs, fs, b.Dir(got.ID), copied, vfs.CloneTryLink); !ok || err != nil {
				t.Fatal(ok, err)
			}
			db2 := mustOpenDB(t, fs, copied)
			defer func() { mustClose(t, db2) }()
			have := dump(t, db2)
			if len(have) != len(want) || len(want) == 0 {
				t.Fatalf("%d keys, want %d", len(have), len(want))
			}
			for k, v := range want {
				if have[k] != v {
					t.Fatalf("key %s is %q, want %q", k, have[k], v)
				}
			}
			if err := b.Verify(got.ID); err != nil {
				t.Fatalf("using a linked copy changed the image: %v", err)
			}
		})
	}
}

func mustOpenDB(t *testing.T, fs vfs.FS, dir string) *pebble.DB {
	t.Helper()
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	db, err := pebble.Open(dir, &pebble.Options{
		FS:                 fs,
		DisableWAL:         true,
		FormatMajorVersion: pebble.FormatNewest,
		Logger:             quiet{t},
	})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func mustClose(t *testing.T, db *pebble.DB) {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Error(err)
	}
}

// quiet drops what pebble reports about its routine work.
type quiet struct{ t *testing.T }

func (quiet) Infof(string, ...any)                {}
func (q quiet) Errorf(format string, args ...any) { q.t.Errorf(format, args...) }
func (q quiet) Fatalf(format string, args ...any) { q.t.Fatalf(format, args...) }

func dump(t *testing.T, db *pebble.DB) map[string]string {
	t.Helper()
	it, err := db.NewIter(nil)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for ok := it.First(); ok; ok = it.Next() {
		all[string(it.Key())] = string(it.Value())
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	return all
}
