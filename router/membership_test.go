package router

import (
	"bytes"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

func mustBeAt(t *testing.T, s *FSM, want Position) {
	t.Helper()
	if got := s.Applied(); got.Index != want.Index || !bytes.Equal(got.ConfState, want.ConfState) || !bytes.Equal(got.Members, want.Members) {
		t.Fatalf("at entry %d with a membership of %d and %d bytes, want entry %d and %d and %d",
			got.Index, len(got.ConfState), len(got.Members), want.Index, len(want.ConfState), len(want.Members))
	}
}

// metaRecord returns what is stored under the name of a meta record.
func metaRecord(t *testing.T, s *FSM, name string) []byte {
	t.Helper()
	v, err := getCopy(s.cur.db, key(nil).meta(name))
	noError(t, err)
	return v
}

// Goal: what a batch writes of the position does not grow with the membership,
// which is there again after a restart and in an image.
func TestBatchesDoNotWriteTheMembership(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	// Longer than any that the group may have.
	large := Position{Index: 2, Term: 1, ConfState: bytes.Repeat([]byte("c"), 10_000), Members: bytes.Repeat([]byte("m"), 400_000)}
	noError(t, s.ApplyMembership(large))
	for large.Index < 100 {
		apply(t, s)
		large.Index++
	}
	if size := len(metaRecord(t, s, metaPosition)); size > 32 {
		t.Errorf("a batch writes a position of %d bytes", size)
	}
	// Ninety-eight memberships would have filled a memtable as often.
	if flushes := s.cur.db.Metrics().Flush.Count; flushes > 8 {
		t.Errorf("%d flushes after %d batches", flushes, large.Index)
	}
	mustBeAt(t, s, large)
	_, err := s.Flush()
	noError(t, err)
	_, err = s.Image("image")
	noError(t, err)
	noError(t, s.Close())
	s = open(t, fs, "state")
	mustBeAt(t, s, large)
	noError(t, s.Close())

	other := open(t, fs, "other")
	_, err = other.Install("image")
	noError(t, err)
	mustBeAt(t, other, large)
	noError(t, other.Close())
}

// Goal: a state that an earlier release wrote, with the membership in the position,
// is read, and rewritten by the first batch; its hash is that of a new one.
func TestPositionOfAnEarlierRelease(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	apply(t, s)
	hash := func() []byte {
		v := s.View()
		h, err := v.Hash()
		noError(t, err)
		noError(t, v.Close())
		return h
	}
	before, want := hash(), s.Applied()
	noError(t, s.cur.db.Set(key(nil).meta(metaPosition), want.append(nil), pebble.NoSync))
	noError(t, s.cur.db.Delete(key(nil).meta(metaMembership), pebble.NoSync))
	noError(t, s.cur.db.Set(key(nil).meta(metaFormat), []byte{0, 0, 0, 1}, pebble.NoSync))
	if !bytes.Equal(hash(), before) {
		t.Error("the hash depends on how the membership is kept")
	}
	_, err := s.Flush()
	noError(t, err)
	noError(t, s.Close())
	s = open(t, fs, "state")
	mustBeAt(t, s, want)
	apply(t, s)
	want.Index++
	_, err = s.Flush()
	noError(t, err)
	if len(metaRecord(t, s, metaMembership)) == 0 || len(metaRecord(t, s, metaPosition)) > 32 {
		t.Error("the first batch did not move the membership out of the position")
	}
	if got := metaRecord(t, s, metaFormat); !bytes.Equal(got, formatNumber()) {
		t.Errorf("the earlier release could read it: format %v", got)
	}
	noError(t, s.Close())
	s = open(t, fs, "state")
	mustBeAt(t, s, want)
	noError(t, s.Close())
}

// TestFormatIsRaised: the first batch on the state of an earlier release says that it
// is of this one, whatever it changes: the earlier one would not see what this one
// keeps there.
func TestFormatIsRaised(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	apply(t, s)
	noError(t, s.cur.db.Set(key(nil).meta(metaFormat), []byte{0, 0, 0, stateFormat - 1}, pebble.NoSync))
	_, err := s.Flush()
	noError(t, err)
	noError(t, s.Close())
	s = open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	apply(t, s)
	_, err = s.Flush()
	noError(t, err)
	if got := metaRecord(t, s, metaFormat); !bytes.Equal(got, formatNumber()) {
		t.Errorf("the earlier release could read it: format %v", got)
	}
}
