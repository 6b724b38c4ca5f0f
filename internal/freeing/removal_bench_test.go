package freeing

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkRemoval syncs a small write a thousand times a second, as a log does, while
// sixteen files of 8 MiB are removed, in one go or by a Reaper, and tells how long the
// syncs took. The difference is there where the disk is told of free blocks: see
// `findmnt -no options -T $TMPDIR`. TMPDIR is to be on such a disk.
func BenchmarkRemoval(b *testing.B) {
	const files, size, lasts = 16, 8 << 20, 4 * time.Second
	for _, way := range []string{"none", "at-once", "reaper"} {
		b.Run(way, func(b *testing.B) {
			var took []time.Duration
			for range b.N {
				b.StopTimer()
				dir := b.TempDir()
				content := bytes.Repeat([]byte("conveyor"), size/8)
				var paths []string
				for i := range files {
					path := filepath.Join(dir, fmt.Sprint(i))
					writeSynced(b, path, content)
					paths = append(paths, path)
				}
				log := filepath.Join(dir, "log")
				writeSynced(b, log, content)
				f, err := os.OpenFile(log, os.O_WRONLY, 0)
				if err != nil {
					b.Fatal(err)
				}
				r := New()
				remove := map[string]func(string) error{"at-once": os.Remove, "reaper": r.Remove}[way]
				b.StartTimer()
				began := time.Now()
				removed := make(chan error, 1)
				go func() {
					for _, path := range paths {
						if remove == nil {
							break
						}
						if err := remove(path); err != nil {
							removed <- err
							return
						}
					}
					removed <- nil
				}()
				for at := int64(0); time.Since(began) < lasts; at += 300 {
					from := time.Now()
					if _, err := f.WriteAt(content[:300], at%size/2); err != nil {
						b.Fatal(err)
					}
					if err := unix.Fdatasync(int(f.Fd())); err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(from))
					<-time.After(time.Millisecond)
				}
				if err := <-removed; err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				r.Close()
				f.Close()
			}
			slices.Sort(took)
			b.ReportMetric(took[len(took)-1].Seconds()*1e3, "longest-ms")
			late, _ := slices.BinarySearch(took, 5*time.Millisecond)
			b.ReportMetric(float64(len(took)-late)/float64(b.N), "over-5ms/op")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func writeSynced(b *testing.B, path string, content []byte) {
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		b.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		b.Fatal(err)
	}
}
