package shelf

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/snap"
)

// clock gives every snapshot another time.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { c.t = c.t.Add(time.Second); return c.t }

func open(t *testing.T, f vfs.FS, o Options) *Shelf {
	t.Helper()
	if o.Now == nil {
		o.Now = (&clock{time.UnixMilli(1_700_000_000_000)}).now
	}
	s, err := Open(f, "backups", o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put makes a snapshot with one file.
func put(t *testing.T, f vfs.FS, s *Shelf, id, content string) (Record, error) {
	t.Helper()
	return s.Create(t.Context(), id, Created, func(dir string) (snap.Meta, error) {
		if err := f.MkdirAll(dir, 0o755); err != nil {
			return snap.Meta{}, err
		}
		file, err := f.Create(f.PathJoin(dir, "000001.sst"), "test")
		if err != nil {
			return snap.Meta{}, err
		}
		_, err = file.Write([]byte(content))
		return snap.Meta{Index: 7, Term: 2}, errors.Join(err, file.Close())
	}, func(dir string, r *Record) error {
		r.Revision, r.ClusterName = 5, "c"
		return nil
	})
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ids(s *Shelf) string {
	var out string
	for _, r := range s.List() {
		out += r.ID + " "
	}
	return out
}

// What was made is found again by its id after a restart, and gone after Delete.
func TestSnapshotsAreKept(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{})
	must[Record](t)(put(t, f, s, "nightly", "a"))
	must[Record](t)(put(t, f, s, "weekly", "b"))
	if err := s.SetContent("nightly", "abcd", map[string]uint64{"pipelines": 2}); err != nil {
		t.Fatal(err)
	}
	if _, err := put(t, f, s, "nightly", "c"); !errors.Is(err, ErrExists) {
		t.Fatalf("a second nightly: %v", err)
	}
	s = open(t, f, Options{})
	if got := ids(s); got != "weekly nightly " {
		t.Fatalf("after a restart: %q", got)
	}
	r := must[*Reader](t)(s.Open("nightly"))
	if rec := r.Record(); rec.ContentHash != "abcd" || rec.Counts["pipelines"] != 2 || rec.Index != 7 || rec.Revision != 5 || rec.Bytes != 1 {
		t.Fatalf("record %+v", rec)
	}
	if existed := must[bool](t)(s.Delete("nightly")); !existed {
		t.Fatal("Delete says there was none")
	}
	// The reader goes on.
	if chunk, err := r.ReadChunk(r.Size()-1, 10); err != nil || string(chunk.Data) != "a" {
		t.Fatalf("reading a deleted snapshot: %q %v", chunk.Data, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if existed := must[bool](t)(s.Delete("nightly")); existed {
		t.Fatal("Delete says there was one")
	}
	if _, err := s.Open("nightly"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if got := ids(open(t, f, Options{})); got != "weekly " {
		t.Fatalf("after a restart: %q", got)
	}
}

// No id reaches another directory (W60).
func TestIDsAreChecked(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{})
	for _, id := range []string{"", ".", "..", "../x", "/etc", "a/b", ".hidden", "images", "a\x00b", fmt.Sprintf("%0200d", 1)} {
		if _, err := put(t, f, s, id, "a"); !errors.Is(err, snap.ErrInvalidID) {
			t.Errorf("create %q: %v", id, err)
		}
		if _, err := s.Delete(id); !errors.Is(err, snap.ErrInvalidID) {
			t.Errorf("delete %q: %v", id, err)
		}
		if _, err := s.Open(id); !errors.Is(err, snap.ErrInvalidID) {
			t.Errorf("open %q: %v", id, err)
		}
	}
}

// The oldest go when there are too many, but none that is being read; a snapshot
// beyond the quota is refused and leaves nothing.
func TestRetentionAndQuota(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{MaxSnapshots: 2, MaxBytes: 10})
	must[Record](t)(put(t, f, s, "a", "1"))
	r := must[*Reader](t)(s.Open("a"))
	must[Record](t)(put(t, f, s, "b", "2"))
	must[Record](t)(put(t, f, s, "c", "3"))
	if got := ids(s); got != "c b a " {
		t.Fatalf("a snapshot that is read was removed: %q", got)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	must[Record](t)(put(t, f, s, "d", "4"))
	if got := ids(s); got != "d c " {
		t.Fatalf("kept %q, want the two newest", got)
	}
	if _, err := put(t, f, s, "e", "0123456789"); !errors.Is(err, ErrQuota) {
		t.Fatalf("beyond the quota: %v", err)
	}
	if got := ids(s); got != "d c " {
		t.Fatalf("kept %q after a refusal", got)
	}
	names, err := f.List("backups/images")
	if err != nil || len(names) != 2 {
		t.Fatalf("images %v %v, want two", names, err)
	}
}

// Half of a snapshot, either half, is removed by the next start.
func TestHalvesAreRemoved(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{})
	must[Record](t)(put(t, f, s, "a", "1"))
	must[Record](t)(put(t, f, s, "b", "2"))
	if err := f.Remove("backups/a.json"); err != nil {
		t.Fatal(err)
	}
	rec := must[Record](t)(s.Get("b"))
	if err := f.RemoveAll("backups/images/" + rec.Image); err != nil {
		t.Fatal(err)
	}
	s = open(t, f, Options{})
	if got := ids(s); got != "" {
		t.Fatalf("kept %q", got)
	}
	if names, _ := f.List("backups/images"); len(names) != 0 {
		t.Fatalf("images left: %v", names)
	}
	if names, _ := f.List("backups"); len(names) != 1 {
		t.Fatalf("left: %v", names)
	}
}

// What is imported is compared with its manifest.
func TestImport(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{})
	must[Record](t)(put(t, f, s, "a", "content"))
	r := must[*Reader](t)(s.Open("a"))
	defer r.Close()
	fill := func(damage string) func(dir string) error {
		return func(dir string) error {
			if err := f.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			for _, name := range []string{"MANIFEST", "000001.sst"} {
				if err := vfs.Copy(f, f.PathJoin(r.Dir(), name), f.PathJoin(dir, name)); err != nil {
					return err
				}
			}
			if damage == "" {
				return nil
			}
			file, err := f.Create(f.PathJoin(dir, damage), "test")
			if err != nil {
				return err
			}
			_, err = file.Write([]byte("contenT"))
			return errors.Join(err, file.Close())
		}
	}
	nothing := func(string, *Record) error { return nil }
	for _, damage := range []string{"000001.sst", "000002.sst", "MANIFEST"} {
		if _, err := s.Import(t.Context(), "b", fill(damage), nothing); !errors.Is(err, snap.ErrCorrupt) {
			t.Errorf("damaged %s: %v", damage, err)
		}
	}
	got := must[Record](t)(s.Import(t.Context(), "b", fill(""), nothing))
	if got.Origin != Uploaded || got.Index != 7 {
		t.Fatalf("%+v", got)
	}
	// Both snapshots share one image, which stays as long as one of them.
	must[bool](t)(s.Delete("a"))
	b := must[*Reader](t)(s.Open("b"))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Import(ctx, "c", fill(""), nothing); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if names, _ := f.List("backups/images"); len(names) != 1 {
		t.Fatalf("images: %v", names)
	}
}

// Goal: when the state of a node turns out to be wrong, what was made of it since it
// was last known to be right is marked for good, and neither opened nor lost from
// the list; what came from elsewhere, or was made before, is not.
func TestSuspectSnapshots(t *testing.T) {
	f := vfs.NewMem()
	s := open(t, f, Options{})
	must[Record](t)(put(t, f, s, "before", "a"))
	for _, at := range [][2]uint64{{6, 0}, {7, 1}} {
		if err := s.Agree(at[0], at[1]); err != nil {
			t.Fatal(err)
		}
		if r := must[Record](t)(s.Get("before")); r.Agreed {
			t.Fatalf("a snapshot of entry 7 of epoch 0 can be trusted by what was so at %v", at)
		}
	}
	if err := s.Agree(7, 0); err != nil {
		t.Fatal(err)
	}
	must[Record](t)(put(t, f, s, "since", "b"))
	r := must[*Reader](t)(s.Open("before"))
	must[Record](t)(s.Import(t.Context(), "uploaded", func(dir string) error {
		err := f.MkdirAll(dir, 0o755)
		for _, name := range []string{"MANIFEST", "000001.sst"} {
			err = errors.Join(err, vfs.Copy(f, f.PathJoin(r.Dir(), name), f.PathJoin(dir, name)))
		}
		return err
	}, func(string, *Record) error { return nil }))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Doubt("its node went wrong"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, id := range []string{"before", "uploaded"} {
			if err := must[*Reader](t)(s.Open(id)).Close(); err != nil {
				t.Error(err)
			}
		}
		if _, err := s.Open("since"); !errors.Is(err, ErrSuspect) || !strings.Contains(err.Error(), "its node went wrong") {
			t.Errorf("a suspect snapshot is opened: %v", err)
		}
		// That the node is right again says nothing of what was made before.
		if err := s.Agree(100, 0); err != nil {
			t.Fatal(err)
		}
		if r := must[Record](t)(s.Get("since")); r.Suspect == "" || r.Agreed {
			t.Errorf("the mark is gone: %+v", r)
		}
		s = open(t, f, Options{})
	}
	if existed, err := s.Delete("since"); !existed || err != nil {
		t.Errorf("deleting it: %v %v", existed, err)
	}
}
