package snap

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// readCounter counts the bytes read from tables.
type readCounter struct {
	vfs.FS
	read *int64
}

func (c readCounter) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	f, err := c.FS.Open(name, opts...)
	if err == nil && immutable(name) {
		f = countedFile{f, c.read}
	}
	return f, err
}

type countedFile struct {
	vfs.File
	read *int64
}

func (c countedFile) Read(p []byte) (int, error) {
	n, err := c.File.Read(p)
	*c.read += int64(n)
	return n, err
}

// linked returns a build function for Create that links the files of dir.
func linked(fs vfs.FS, from string, index uint64) func(dir string) (Meta, error) {
	return func(dir string) (Meta, error) {
		_, err := vfs.Clone(fs, fs, from, dir, vfs.CloneTryLink)
		return testMeta(index), err
	}
}

// An image reads only the tables that no image before and no Warm has read,
// and what it says of the others is true all the same.
func TestSumsAreRemembered(t *testing.T) {
	dir := t.TempDir()
	read := int64(0)
	fs := readCounter{vfs.Default, &read}
	live := filepath.Join(dir, "db")
	put := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(live, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(live, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cache := NewSumCache()
	s := mustOpenStore(t, fs, filepath.Join(dir, "images"), Options{Sums: cache})
	other := mustOpenStore(t, fs, filepath.Join(dir, "backups"), Options{Sums: cache})
	index := uint64(10)
	create := func(s *Store, wantRead int) {
		t.Helper()
		read = 0
		index++
		info, err := s.Create(context.Background(), linked(fs, live, index))
		if err != nil {
			t.Fatal(err)
		}
		if read != int64(wantRead) {
			t.Errorf("image %d: %d bytes of tables were read, want %d", index, read, wantRead)
		}
		if err := s.Verify(info.ID); err != nil {
			t.Error(err)
		}
	}
	put("000001.sst", strings.Repeat("a", 1000))
	put("000002.blob", strings.Repeat("b", 500))
	put("CURRENT", "one")
	create(s, 1500)
	create(s, 0)
	create(other, 0)
	put("000003.sst", strings.Repeat("c", 70))
	put("CURRENT", "two")
	create(s, 70)

	// Another file under an old name, of the same size, even at the same time.
	was, err := os.Stat(filepath.Join(live, "000001.sst"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(live, "000001.sst"), filepath.Join(live, "000009.sst")); err != nil {
		t.Fatal(err)
	}
	put("000001.sst", strings.Repeat("z", 1000))
	if err := os.Chtimes(filepath.Join(live, "000001.sst"), was.ModTime(), was.ModTime()); err != nil {
		t.Fatal(err)
	}
	create(s, 1000)

	// A table that was changed in place, which none ever is, is read again.
	if err := os.Remove(filepath.Join(live, "000009.sst")); err != nil {
		t.Fatal(err)
	}
	if err := s.Purge(0); err != nil {
		t.Fatal(err)
	}
	if err := other.Purge(0); err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Hour)
	put("000002.blob", strings.Repeat("B", 500))
	if err := os.Chtimes(filepath.Join(live, "000002.blob"), later, later); err != nil {
		t.Fatal(err)
	}
	create(s, 500)

	// Warmed tables are not read again, and warming twice reads nothing.
	put("000004.sst", strings.Repeat("d", 4000))
	if n, err := s.Warm(context.Background(), live, nil); err != nil || n != 4000 {
		t.Errorf("warmed %d bytes, %v", n, err)
	}
	if n, err := s.Warm(context.Background(), live, nil); err != nil || n != 0 {
		t.Errorf("warmed %d bytes again, %v", n, err)
	}
	create(s, 0)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	put("000005.sst", strings.Repeat("e", 100))
	if _, err := s.Warm(ctx, live, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := s.Warm(context.Background(), filepath.Join(dir, "none"), nil); err == nil {
		t.Error("warmed a directory that is not there")
	}
}

// A table that grows while it is read is not remembered.
func TestGrowingTableIsNotRemembered(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "000001.sst")
	if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := vfs.Default.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := NewSumCache()
	grow := growingFile{f, func() {
		w, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.WriteString(" a table")
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
	}}
	if _, _, err := c.sum(context.Background(), grow, "000001.sst", 4, make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if len(c.sums) != 0 {
		t.Fatal("half a table was remembered")
	}
}

// growingFile calls grow behind the first read.
type growingFile struct {
	vfs.File
	grow func()
}

func (g growingFile) Read(p []byte) (int, error) {
	n, err := g.File.Read(p)
	if n > 0 && g.grow != nil {
		g.grow()
	}
	return n, err
}

// Files in memory have no inode, so each is read every time.
func TestSumsInMemory(t *testing.T) {
	mem := vfs.NewMem()
	s := mustOpenStore(t, mem, "images", testOptions())
	for i, text := range []string{"one", "two", "six"} {
		if err := mem.RemoveAll("db"); err != nil {
			t.Fatal(err)
		}
		if _, err := buildFiles(mem, testMeta(1), content{"000001.sst": text})("db"); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Warm(context.Background(), "db", nil); n != 0 || err != nil {
			t.Fatal(n, err)
		}
		info, err := s.Create(context.Background(), linked(mem, "db", uint64(i+1)))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Verify(info.ID); err != nil {
			t.Fatal(err)
		}
	}
}

// What no pass needs is forgotten.
func TestSumsAreForgotten(t *testing.T) {
	c := NewSumCache()
	for i := range 1000 {
		c.begin()
		c.put(fileIdentity{ino: uint64(i + 1)}, 0, false)
		c.put(fileIdentity{ino: 1_000_000}, 7, true)
	}
	if len(c.sums) > keepPasses+2 {
		t.Errorf("%d checksums are kept", len(c.sums))
	}
	if crc, durable, ok := c.get(fileIdentity{ino: 1_000_000}); !ok || crc != 7 || !durable {
		t.Error("one in use was forgotten")
	}
}

// BenchmarkCreate makes images of a live database of some 300 MB: of one that
// nothing is known of, of one that was warmed, and again with a little more.
func BenchmarkCreate(b *testing.B) {
	dir := b.TempDir()
	db, err := pebble.Open(filepath.Join(dir, "db"), &pebble.Options{DisableWAL: true, FormatMajorVersion: pebble.FormatNewest, Logger: silent{}})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			b.Error(err)
		}
	}()
	rng := rand.New(rand.NewPCG(1, 2))
	value := make([]byte, 256)
	put := func(from, n int) {
		for i := range n {
			for j := range value {
				value[j] = byte(rng.Uint32())
			}
			if err := db.Set(fmt.Appendf(nil, "key-%010d", from+i), value, pebble.NoSync); err != nil {
				b.Fatal(err)
			}
		}
		if err := db.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	put(0, 1_150_000)
	run := func(name string, prepare func(s *Store, i int)) {
		b.Run(name, func(b *testing.B) {
			s := mustOpenStore(b, vfs.Default, filepath.Join(dir, "images"), Options{})
			index := uint64(1)
			for i := 0; b.Loop(); i++ {
				b.StopTimer()
				prepare(s, i)
				index++
				b.StartTimer()
				info, err := s.Create(context.Background(), func(dir string) (Meta, error) {
					return testMeta(index), db.Checkpoint(dir)
				})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				b.ReportMetric(float64(info.Bytes)/1e6, "MB")
				b.ReportMetric(float64(len(info.Files)), "files")
				if err := s.Purge(0); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
	warm := func(s *Store) {
		if _, err := s.Warm(context.Background(), filepath.Join(dir, "db"), nil); err != nil {
			b.Fatal(err)
		}
	}
	run("unknown", func(s *Store, _ int) { s.opts.Sums = NewSumCache() })
	run("warm", func(s *Store, _ int) { warm(s) })
	run("changed", func(s *Store, i int) {
		warm(s)
		put(2_000_000+i*10_000, 10_000)
	})
}

type silent struct{}

func (silent) Infof(string, ...any)              {}
func (silent) Errorf(string, ...any)             {}
func (silent) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
