package wal

import (
	"bytes"
	"errors"
	"math"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/raft/v3"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The appender writes while the truncator compacts, raft reads and an operator
// looks. What is read must be what was appended at that index.
func TestReadersWriterAndTruncator(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	const n = 300
	var synced atomic.Int64
	l.opts.Sync = func(i SyncInfo) { synced.Add(int64(i.Entries)) }
	compact := make(chan uint64, n)
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(compact)
		for i := uint64(2); i <= n; i++ {
			if err := l.Append(hard(1, 1, i-1), run(i, i, 1, 300), true); err != nil {
				t.Error(err)
				return
			}
			if got, _ := l.LastIndex(); got != i {
				t.Errorf("entry %d is not readable after its Append", i)
			}
			if i%20 == 0 {
				compact <- i - 10
			}
		}
	})
	wg.Go(func() {
		defer close(done)
		for i := range compact {
			if err := l.Compact(i, conf(1, 2, 3)); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			first, _ := l.FirstIndex()
			last, _ := l.LastIndex()
			ents, err := l.Entries(first, last+1, math.MaxUint64)
			if errors.Is(err, raft.ErrCompacted) || last < first {
				continue
			}
			if err != nil || cap(ents) != len(ents) {
				t.Errorf("%d..%d: %v, len %d cap %d", first, last, err, len(ents), cap(ents))
				return
			}
			for k, e := range ents {
				i := first + uint64(k)
				if e.GetIndex() != i || !bytes.Equal(e.GetData(), run(i, i, 1, 300)[0].GetData()) {
					t.Errorf("entry %d reads as %v", i, e)
					return
				}
			}
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := Dump(&bytes.Buffer{}, dir, DumpOptions{}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	wg.Wait()
	if synced.Load() != n-1 {
		t.Fatalf("the sync events count %d entries, want %d", synced.Load(), n-1)
	}
	wantEntries(t, l, run(291, n, 1, 300))
	must(t, l.Close())
	l, _ = open(t, dir, Options{})
	wantEntries(t, l, run(291, n, 1, 300))
}

// A commit that moves alone costs no sync, until a response rides on it.
func TestSyncOnlyWhenNeeded(t *testing.T) {
	syncs := 0
	l, _ := open(t, filepath.Join(t.TempDir(), "wal"), Options{Sync: func(SyncInfo) { syncs++ }})
	step := func(want int, err error) {
		t.Helper()
		must(t, err)
		if syncs != want {
			t.Fatalf("%d syncs, want %d", syncs, want)
		}
	}
	step(1, l.Append(hard(1, 1, 1), run(2, 5, 1, 10), true))
	step(1, l.Append(hard(1, 1, 3), nil, false))
	step(2, l.Append(hard(1, 1, 4), nil, true))
	step(2, l.Append(nil, nil, true))
	step(2, l.Append(hard(1, 1, 5), nil, false))
	step(3, l.Append(nil, nil, true))
	step(4, l.Append(hard(2, 0, 5), nil, false)) // a term is never left unsynced
}

func BenchmarkAppend(b *testing.B) {
	for _, bc := range []struct {
		name    string
		entries int
		size    int
	}{{"300B", 1, 300}, {"64KiB", 1, 64 << 10}, {"1MiB", 1, 1 << 20}, {"64x1KiB", 64, 1 << 10}} {
		b.Run(bc.name, func(b *testing.B) {
			l, _ := open(b, filepath.Join(b.TempDir(), "wal"), Options{SegmentBytes: DefaultSegmentBytes})
			b.SetBytes(int64(bc.entries * bc.size))
			b.ReportAllocs()
			next := uint64(2)
			for b.Loop() {
				b.StopTimer()
				ents := run(next, next+uint64(bc.entries)-1, 1, bc.size)
				b.StartTimer()
				if err := l.Append(hard(1, 1, next-1), ents, true); err != nil {
					b.Fatal(err)
				}
				next += uint64(bc.entries)
				if l.Bytes() > 64<<20 {
					b.StopTimer()
					must(b, l.Compact(next-1, testStart.ConfState))
					b.StartTimer()
				}
			}
			l.Close()
		})
	}
}
