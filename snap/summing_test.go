package snap

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// An image of a database that was written through Summing reads none of its
// tables, and every checksum in it is true.
func TestTablesAreSummedWhileTheyAreWritten(t *testing.T) {
	dir := t.TempDir()
	read := int64(0)
	counted := readCounter{vfs.Default, &read}
	cache := NewSumCache()
	s := mustOpenStore(t, counted, filepath.Join(dir, "images"), Options{Sums: cache})
	db, err := pebble.Open(filepath.Join(dir, "db"), &pebble.Options{
		FS: cache.Summing(counted), DisableWAL: true, FormatMajorVersion: pebble.FormatNewest,
		L0CompactionThreshold: 2,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for round := range 5 {
		for i := range 2000 {
			if err := db.Set([]byte{byte(i >> 8), byte(i)}, bytes.Repeat([]byte{byte(i), byte(round)}, 300), pebble.NoSync); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Flush(); err != nil {
			t.Fatal(err)
		}
		var had int64
		info, err := s.Create(context.Background(), func(dir string) (Meta, error) {
			err := db.Checkpoint(dir)
			had = read // compactions and the checkpoint itself read as they like
			return testMeta(uint64(round + 1)), err
		})
		if err != nil {
			t.Fatal(err)
		}
		if round == 4 {
			// No compaction is under way any more once this one is through.
			if err := db.Compact(context.Background(), []byte{0}, []byte{255}, false); err != nil {
				t.Fatal(err)
			}
			info, err = s.Create(context.Background(), func(dir string) (Meta, error) {
				err := db.Checkpoint(dir)
				had = read
				return testMeta(100), err
			})
			if err != nil {
				t.Fatal(err)
			}
			if read != had {
				t.Errorf("%d bytes of tables were read", read-had)
			}
		}
		if err := s.Verify(info.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// What was not synced, was written past its end or failed is not remembered, and
// what is removed for good is forgotten.
func TestOnlyWholeTablesAreSummed(t *testing.T) {
	dir := t.TempDir()
	cache := NewSumCache()
	fs := cache.Summing(vfs.Default)
	write := func(name string, end func(vfs.File) error) string {
		t.Helper()
		path := filepath.Join(dir, name)
		f, err := fs.Create(path, writeCategory)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.Write([]byte("some table"))
		if err = errors.Join(err, end(f), f.Close()); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("000001.sst", func(vfs.File) error { return nil })
	write("000002.sst", func(f vfs.File) error {
		err := f.Sync()
		_, werr := f.Write([]byte("and more"))
		return errors.Join(err, werr)
	})
	write("000003.sst", func(f vfs.File) error {
		_, err := f.SyncTo(4)
		return err
	})
	write("MANIFEST-000001", vfs.File.Sync)
	if n := len(cache.sums); n != 0 {
		t.Fatalf("%d checksums of unfinished files are remembered", n)
	}
	a := write("000004.sst", vfs.File.Sync)
	write("000005.blob", vfs.File.SyncData)
	if n := len(cache.sums); n != 2 {
		t.Fatalf("%d checksums are remembered, want 2", n)
	}
	linked := filepath.Join(dir, "000006.sst")
	if err := os.Link(a, linked); err != nil {
		t.Fatal(err)
	}
	if err := fs.Remove(a); err != nil {
		t.Fatal(err)
	}
	if n := len(cache.sums); n != 2 {
		t.Fatalf("%d checksums are remembered while another name is left, want 2", n)
	}
	if err := fs.Remove(linked); err != nil {
		t.Fatal(err)
	}
	if n := len(cache.sums); n != 1 {
		t.Fatalf("%d checksums are remembered, want 1", n)
	}
}
