package wal

import (
	"math/rand/v2"
	"path/filepath"
	"testing"
)

// TestEveryOldestSegmentStarts compacts and installs at random and looks after
// every step at the log as a start would find it. The oldest segment then begins
// anywhere: inside a stretch of entries, and before start records whose entries
// went with the segments before it.
func TestEveryOldestSegmentStarts(t *testing.T) {
	s := seed(t)
	rng := rand.New(rand.NewPCG(uint64(s), 1))
	dir := filepath.Join(t.TempDir(), "wal")
	l, _ := open(t, dir, Options{})
	term, commit := uint64(1), testStart.Index
	for step := range 1500 {
		first, _ := l.FirstIndex()
		last, _ := l.LastIndex()
		switch r := rng.IntN(40); {
		case r < 20: // entries, of which some wait to be committed
			ents := run(last+1, last+1+uint64(rng.IntN(3)), term, 10+rng.IntN(1500))
			must(t, l.Append(hard(term, 0, commit), ents, true))
		case r < 30: // the commit alone
			commit += uint64(rng.IntN(int(last-commit) + 1))
			must(t, l.Append(hard(term, 0, commit), nil, true))
		case r < 38 && commit >= first: // far behind the end, or close to it
			i := first + uint64(rng.IntN(int(commit-first)+1))
			must(t, l.Compact(i, conf(1, 2, 3)))
		case r == 38 && commit < last: // a new leader takes the uncommitted end back
			term++
			must(t, l.Append(hard(term, 0, commit), run(commit+1, commit+1, term, 100), true))
		case r == 39: // an image, past the end or over an end that never counted
			i := last + 1 + uint64(rng.IntN(50))
			if commit < last && rng.IntN(2) == 0 {
				term++
				i = commit + 1
			}
			commit = i
			must(t, l.InstallSnapshot(i, term, conf(1, 2, 3), hard(term, 0, i)))
		}
		first, _ = l.FirstIndex()
		last, _ = l.LastIndex()
		r, err := Verify(dir)
		if err != nil {
			t.Fatalf("step %d: a start would refuse the log [%d, %d]: %v", step, first, last, err)
		}
		if r.FirstIndex != first || r.LastIndex != last || r.HardState.GetCommit() != commit {
			t.Fatalf("step %d: a start would find [%d, %d] commit %d, the log has [%d, %d] commit %d",
				step, r.FirstIndex, r.LastIndex, r.HardState.GetCommit(), first, last, commit)
		}
		if step%100 == 99 {
			want, err := l.Entries(first, last+1, 1<<30)
			if first > last {
				want, err = nil, nil
			}
			must(t, err)
			must(t, l.Close())
			l, _ = open(t, dir, Options{})
			wantEntries(t, l, want)
		}
	}
}
