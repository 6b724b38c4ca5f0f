package snap

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

var streamed = content{
	"000001.sst": strings.Repeat("first table ", 9),
	"000002.sst": "",
	"000003.sst": strings.Repeat("third table ", 4),
	"000004.sst": "",
	"OPTIONS":    "x",
}

// source returns a reader of an image with the content streamed.
func source(t testing.TB) *Reader {
	t.Helper()
	s := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
	r, err := s.Open(mustCreate(t, s, 12, streamed).ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func mustHold(t testing.TB, s *Store, r *Reader, want content) {
	t.Helper()
	if err := s.Verify(r.Info().ID); err != nil {
		t.Fatal(err)
	}
	got, err := readImage(s, r.Info().ID)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Fatalf("received %v, want %v", got, want)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Fatalf("left over: %q", left)
	}
}

// TestReadChunk: any offset, any size, always the same stream.
func TestReadChunk(t *testing.T) {
	r := source(t)
	whole, err := readStream(r, 0)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(whole)) != r.Size() || r.Size() != r.Info().Size {
		t.Fatalf("the stream has %d bytes, Size says %d", len(whole), r.Size())
	}
	for offset := range whole {
		for _, n := range []int{1, 2, 13, 60, len(whole), 0} {
			c, err := r.ReadChunk(int64(offset), n)
			if err != nil {
				t.Fatal(err)
			}
			want := whole[offset:]
			if n > 0 {
				want = want[:min(n, len(want))]
			}
			if string(c.Data) != string(want) || c.Offset != int64(offset) ||
				c.CRC != crc32.Checksum(want, castagnoli) || c.Last != (offset+len(want) == len(whole)) {
				t.Fatalf("chunk at %d of %d: %+v, want %q", offset, n, c, want)
			}
		}
	}
	if _, err := r.ReadChunk(r.Size(), 1); !errors.Is(err, io.EOF) {
		t.Fatalf("at the end: %v", err)
	}
	for _, offset := range []int64{-1, r.Size() + 1} {
		if _, err := r.ReadChunk(offset, 1); !errors.Is(err, ErrOutOfOrder) {
			t.Fatalf("at %d: %v", offset, err)
		}
	}
}

// TestReaderFindsRot: a sender notices that its own copy is damaged.
func TestReaderFindsRot(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"flipped": func(b []byte) []byte { b[5] ^= 1; return b },
		"cut":     func(b []byte) []byte { return b[:10] },
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem()
			s := mustOpenStore(t, fs, imageDir, testOptions())
			r, err := s.Open(mustCreate(t, s, 12, streamed).ID)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			path := fs.PathJoin(r.Dir(), "000003.sst")
			b, err := readFile(fs, path)
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, fs, path, damage(b))
			if _, err := readStream(r, 10); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "000003.sst") {
				t.Fatalf("got %v, want ErrCorrupt naming the file", err)
			}
		})
	}
}

// TestChunkErrors: every way a chunk can be wrong is refused, takes nothing,
// and leaves the stream able to go on.
func TestChunkErrors(t *testing.T) {
	r := source(t)
	o := testOptions()
	o.MaxChunkBytes = 100
	s := mustOpenStore(t, posixFS{vfs.NewMem()}, imageDir, o)
	w, err := s.Receive(r.Info().ID, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	const held = 120
	if err := send(r, w, 60, 2); err != nil {
		t.Fatal(err)
	}
	sealed := func(offset int64, n int) Chunk {
		b := make([]byte, n)
		return Chunk{Offset: offset, Data: b, CRC: crc32.Checksum(b, castagnoli)}
	}
	good, err := r.ReadChunk(held, 30)
	if err != nil {
		t.Fatal(err)
	}
	flipped, wrongEnd := good, good
	flipped.Data = slices.Clone(good.Data)
	flipped.Data[3] ^= 0x40
	wrongEnd.Last = true
	beyond := sealed(held, 100)
	cases := []struct {
		name  string
		chunk Chunk
		want  error
	}{
		{"repeated", func() Chunk { c, _ := r.ReadChunk(60, 60); return c }(), ErrOutOfOrder},
		{"overlapping", func() Chunk { c, _ := r.ReadChunk(held-1, 60); return c }(), ErrOutOfOrder},
		{"gap", func() Chunk { c, _ := r.ReadChunk(held+1, 60); return c }(), ErrOutOfOrder},
		{"from the start", func() Chunk { c, _ := r.ReadChunk(0, 60); return c }(), ErrOutOfOrder},
		{"negative offset", sealed(-5, 5), ErrOutOfOrder},
		{"last offset there is", sealed(1<<63-1, 5), ErrOutOfOrder},
		{"empty", sealed(held, 0), ErrBadChunk},
		{"flipped bit", flipped, ErrBadChunk},
		{"end mark too early", wrongEnd, ErrBadChunk},
		{"over the chunk limit", sealed(held, 101), ErrTooLarge},
	}
	for _, c := range cases {
		err := w.Write(c.chunk)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
		var oe *OffsetError
		if errors.As(err, &oe) && (oe.Expected != held || oe.Got != c.chunk.Offset) {
			t.Errorf("%s: %+v, want expected offset %d", c.name, oe, held)
		}
		if w.Offset() != held {
			t.Fatalf("%s: the offset moved to %d", c.name, w.Offset())
		}
	}
	if _, err := w.Commit(); !errors.Is(err, ErrOutOfOrder) {
		t.Fatalf("commit before the end: %v", err)
	}
	for w.Offset() < r.Size()-50 {
		if err := send(r, w, 20, 1); err != nil {
			t.Fatal(err)
		}
	}
	beyond.Offset = w.Offset()
	if err := w.Write(beyond); !errors.Is(err, ErrTooLarge) {
		t.Fatalf("beyond the announced size: %v", err)
	}
	rest, err := r.ReadChunk(w.Offset(), 100)
	if err != nil || !rest.Last {
		t.Fatalf("%+v, %v", rest, err)
	}
	rest.Last = false
	if err := w.Write(rest); !errors.Is(err, ErrBadChunk) {
		t.Fatalf("missing end mark: %v", err)
	}
	if err := send(r, w, 100, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)
	for name, err := range map[string]error{
		"write":  w.Write(good),
		"commit": func() error { _, err := w.Commit(); return err }(),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after commit: %v", name, err)
		}
	}
	if err := errors.Join(w.Abort(), w.Close()); err != nil {
		t.Fatal(err)
	}
	mustHold(t, s, r, streamed)
	if _, err := s.Receive(r.Info().ID, r.Size()); !errors.Is(err, ErrExists) {
		t.Fatalf("receiving it again: %v", err)
	}
}

// TestResumeAfterEveryCut interrupts a receive after every number of chunks, in
// every way, and expects it to go on where it stood.
func TestResumeAfterEveryCut(t *testing.T) {
	r := source(t)
	rng := rand.New(rand.NewPCG(seed(t), 1))
	manifest := r.Size() - r.Info().Bytes
	const max = 11
	chunks := int((r.Size() + max - 1) / max)
	type cut func(t *testing.T, fs *vfs.MemFS, s *Store, w *Receiver, o Options) *Store
	crash := func(percent int) cut {
		return func(t *testing.T, fs *vfs.MemFS, s *Store, w *Receiver, o Options) *Store {
			after := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng})
			return mustOpenStore(t, posixFS{after}, imageDir, o)
		}
	}
	cuts := []struct {
		name string
		cut  cut
		// exact: not a byte may be sent twice.
		exact bool
	}{
		{"closed", func(t *testing.T, fs *vfs.MemFS, s *Store, w *Receiver, o Options) *Store {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if err := w.Write(Chunk{}); !errors.Is(err, ErrClosed) {
				t.Fatalf("write after close: %v", err)
			}
			return s
		}, true},
		{"process killed", func(t *testing.T, fs *vfs.MemFS, s *Store, w *Receiver, o Options) *Store {
			return mustOpenStore(t, posixFS{fs}, imageDir, o)
		}, true},
		{"power lost, nothing unsynced kept", crash(0), false},
		{"power lost, half kept", crash(50), false},
		{"power lost, all kept", crash(100), true},
	}
	for _, c := range cuts {
		for _, syncBytes := range []int64{1, 100, 1 << 20} {
			t.Run(fmt.Sprintf("%s/sync=%d", c.name, syncBytes), func(t *testing.T) {
				for sent := 0; sent <= chunks; sent++ {
					fs := vfs.NewCrashableMem()
					o := testOptions()
					o.SyncBytes = syncBytes
					s := mustOpenStore(t, posixFS{fs}, imageDir, o)
					w, err := s.Receive(r.Info().ID, r.Size())
					if err != nil {
						t.Fatal(err)
					}
					if err := send(r, w, max, sent); err != nil {
						t.Fatal(err)
					}
					before := w.Offset()
					s = c.cut(t, fs, s, w, o)
					if len(s.List()) != 0 {
						t.Fatalf("after %d chunks, half an image is listed", sent)
					}
					w, err = s.Receive(r.Info().ID, r.Size())
					if err != nil {
						t.Fatal(err)
					}
					got := w.Offset()
					want := before
					if before < manifest {
						want = 0
					}
					// Never ahead of what was sent, and after anything but a power
					// failure exactly there (the manifest counts as a whole).
					if got > before || c.exact && got != want {
						t.Fatalf("after %d chunks: resumed at %d, held %d, want %d", sent, got, before, want)
					}
					if err := send(r, w, max, -1); err != nil {
						t.Fatal(err)
					}
					if _, err := w.Commit(); err != nil {
						t.Fatalf("after %d chunks and a resume at %d: %v", sent, got, err)
					}
					mustHold(t, s, r, streamed)
				}
			})
		}
	}
}

// TestResumeSurvivesSyncedPower: what was fsynced before a power failure is not
// sent again.
func TestResumeSurvivesSyncedPower(t *testing.T) {
	src := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
	r, err := src.Open(mustCreate(t, src, 1, content{"big": strings.Repeat("x", 10_000)}).ID)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fs := vfs.NewCrashableMem()
	o := testOptions()
	o.SyncBytes = 1000
	s := mustOpenStore(t, posixFS{fs}, imageDir, o)
	w, err := s.Receive(r.Info().ID, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	for w.Offset() < r.Size() {
		if err := send(r, w, 100, 1); err != nil {
			t.Fatal(err)
		}
		after := mustOpenStore(t, posixFS{fs.CrashClone(vfs.CrashCloneCfg{})}, imageDir, testOptions())
		again, err := after.Receive(r.Info().ID, r.Size())
		if err != nil {
			t.Fatal(err)
		}
		if lost := w.Offset() - again.Offset(); lost < 0 || lost >= 1100 {
			t.Fatalf("of %d bytes, %d were lost; at most 1000 may be dirty", w.Offset(), lost)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedPartial damages a partial receive on disk, byte by byte, and
// expects the damaged part, and only sound data, to end up in the image.
func TestDamagedPartial(t *testing.T) {
	r := source(t)
	base := vfs.NewCrashableMem()
	s := mustOpenStore(t, posixFS{base}, imageDir, testOptions())
	w, err := s.Receive(r.Info().ID, r.Size())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(send(r, w, 40, int(r.Size()/40)), w.Close()); err != nil {
		t.Fatal(err)
	}
	dir := base.PathJoin(imageDir, receivingPrefix+r.Info().ID)
	imgDir := base.PathJoin(dir, receivedImage)
	paths := []string{base.PathJoin(dir, receivedJournal)}
	names, err := base.List(imgDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		paths = append(paths, base.PathJoin(imgDir, n))
	}
	for _, path := range paths {
		good, err := readFile(base, path)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i <= len(good); i++ {
			bad := slices.Clone(good[:i])
			if i < len(good) {
				bad = slices.Clone(good)
				bad[i] ^= 0x10
			} else if i > 0 {
				bad = bad[:i/2]
			}
			fs := base.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(0, 0))})
			overwrite(t, fs, path, bad)
			s := mustOpenStore(t, posixFS{fs}, imageDir, testOptions())
			info, err := receiveAll(s, r, 40)
			if err != nil {
				t.Fatalf("%s, byte %d damaged: %v", path, i, err)
			}
			if info.ID != r.Info().ID {
				t.Fatalf("got image %s", info.ID)
			}
			mustHold(t, s, r, streamed)
		}
	}
}
