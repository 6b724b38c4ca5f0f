package archive

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/snap"
)

// tables makes a database of some 300 MB as the state of a cluster looks:
// readable keys and records of 256 bytes that compress by a half.
func tables(b *testing.B) *snap.Reader {
	b.Helper()
	dir := b.TempDir()
	db, err := pebble.Open(filepath.Join(dir, "db"), &pebble.Options{DisableWAL: true, FormatMajorVersion: pebble.FormatNewest, Logger: quiet{b}})
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
	for i := range 1_000_000 {
		for j := range 128 {
			value[j] = byte(rng.Uint32())
		}
		copy(value[128:], fmt.Sprintf(`{"service":"svc-%d","endpoint":"10.0.%d.%d:9000"}`, i, i%256, i/256%256))
		if err := db.Set(fmt.Appendf(nil, "default/pod-%08d", i), value, pebble.NoSync); err != nil {
			b.Fatal(err)
		}
	}
	if err := db.Flush(); err != nil {
		b.Fatal(err)
	}
	store, err := snap.OpenStore(vfs.Default, filepath.Join(dir, "images"), snap.Options{})
	if err != nil {
		b.Fatal(err)
	}
	info, err := store.Create(context.Background(), func(dir string) (snap.Meta, error) {
		return snap.Meta{Index: 77, Term: 3}, db.Checkpoint(dir)
	})
	if err != nil {
		b.Fatal(err)
	}
	r, err := store.Open(info.ID)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = r.Close() })
	return r
}

type quiet struct{ b *testing.B }

func (quiet) Infof(string, ...any)                {}
func (q quiet) Errorf(format string, args ...any) { q.b.Errorf(format, args...) }
func (q quiet) Fatalf(format string, args ...any) { q.b.Fatalf(format, args...) }

// stateBytes is what the tables hold before they compress it themselves.
const stateBytes = 1_000_000 * (256 + 20)

// BenchmarkArchive packs and checks an image of tables. MB/s counts the bytes of
// the image, state-MB/s those of the records in it.
func BenchmarkArchive(b *testing.B) {
	img := tables(b)
	for _, c := range all {
		b.Run("pack/"+c.String(), func(b *testing.B) {
			b.SetBytes(img.Info().Bytes)
			var out int64
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for b.Loop() {
				a, err := NewArchive(context.Background(), img, testHeader(), c, 0)
				if err != nil {
					b.Fatal(err)
				}
				if out, err = io.Copy(io.Discard, a); err != nil {
					b.Fatal(err)
				}
			}
			runtime.ReadMemStats(&after)
			b.ReportMetric(stateBytes*float64(b.N)/1e6/b.Elapsed().Seconds(), "state-MB/s")
			b.ReportMetric(float64(out)/float64(img.Info().Bytes), "ratio")
			b.ReportMetric(float64(after.TotalAlloc-before.TotalAlloc)/float64(b.N)/(1<<20), "MiB-allocated")
		})
		b.Run("unpack/"+c.String(), func(b *testing.B) {
			b.SetBytes(img.Info().Bytes)
			for b.Loop() {
				a, err := NewArchive(context.Background(), img, testHeader(), c, 0)
				if err != nil {
					b.Fatal(err)
				}
				if _, _, err := Verify(context.Background(), a, Limits{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
