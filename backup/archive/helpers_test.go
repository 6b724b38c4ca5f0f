package archive

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/klauspost/compress/zstd"

	"conveyor.etl/router/snap"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the randomised tests; 0 takes the clock")

// seed returns the seed of a randomised test and logs it.
func seed(t testing.TB) uint64 {
	s := *seedFlag
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d (repeat with -seed=%d)", s, s)
	return s
}

var all = []Compression{None, Gzip, Zstd}

// content is what an image holds, by file name.
type content map[string]string

var testContent = content{
	"000004.sst":      strings.Repeat("key and value ", 100),
	"000005.sst":      "",
	"000006.blob":     strings.Repeat("x", 512),
	"CURRENT":         "MANIFEST-000001",
	"MANIFEST-000001": strings.Repeat("edit", 40),
}

func testHeader() Header {
	return Header{ClusterID: "00f1e2d3c4b5a697", ClusterName: "test", Epoch: 2, Revision: 1234, Index: 77, Term: 3,
		StateHash: "aa55", Counts: map[string]uint64{"pipelines": 3, "sidecars": 9},
		CreatedUnixMsec: 1_700_000_000_123, RouterVersion: "1.2.3"}
}

// newImage makes an image of c on a file system of its own.
func newImage(t testing.TB, c content) *snap.Reader {
	t.Helper()
	fs := vfs.NewMem()
	s, err := snap.OpenStore(fs, "images", snap.Options{Now: func() time.Time { return time.Unix(1_700_000_000, 0) }})
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Create(context.Background(), func(dir string) (snap.Meta, error) {
		if err := fs.MkdirAll(dir, 0o700); err != nil {
			return snap.Meta{}, err
		}
		for _, name := range slices.Sorted(maps.Keys(c)) {
			if err := writeFile(fs, fs.PathJoin(dir, name), c[name]); err != nil {
				return snap.Meta{}, err
			}
		}
		return snap.Meta{Index: 77, Term: 3}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func writeFile(fs vfs.FS, path, text string) error {
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write([]byte(text))
	return errors.Join(err, f.Close())
}

// pack returns the bytes of an archive from offset on.
func pack(t testing.TB, img Image, c Compression, offset int64) []byte {
	t.Helper()
	a, err := NewArchive(context.Background(), img, testHeader(), c, offset)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	raw, err := io.ReadAll(a)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// frameOf returns b as one frame of zstd, an empty one too.
func frameOf(t testing.TB, b []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(b, nil)
}

// framesOf returns b as frames of n bytes each and what is left.
func framesOf(t testing.TB, b []byte, n int) (frames [][]byte) {
	for piece := range slices.Chunk(b, n) {
		frames = append(frames, frameOf(t, piece))
	}
	return frames
}

// everyForm returns an archive of testContent in every compression, and one that has
// many frames though it is small.
func everyForm(t testing.TB) map[string][]byte {
	img := newImage(t, testContent)
	forms := map[string][]byte{}
	for _, c := range all {
		forms[c.String()] = pack(t, img, c, 0)
	}
	forms["many frames"] = bytes.Join(framesOf(t, forms[None.String()], 777), nil)
	return forms
}

// extract unpacks raw into a new file system and returns what is there.
func extract(raw []byte, l Limits) (Header, content, error) {
	fs := vfs.NewMem()
	if err := fs.MkdirAll("backups", 0o700); err != nil {
		return Header{}, nil, err
	}
	h, info, err := Extract(context.Background(), bytes.NewReader(raw), l, fs, "backups/new")
	left, lerr := fs.List("backups")
	if lerr != nil {
		return h, nil, lerr
	}
	if err != nil {
		if len(left) != 0 {
			return h, nil, fmt.Errorf("left behind %q after %w", left, err)
		}
		return h, nil, err
	}
	if err := snap.Check(fs, "backups/new"); err != nil {
		return h, nil, fmt.Errorf("extracted, but not whole: %w", err)
	}
	c := content{}
	for _, f := range info.Files {
		file, err := fs.Open(fs.PathJoin("backups/new", f.Name))
		if err != nil {
			return h, nil, err
		}
		b, err := io.ReadAll(file)
		if err := errors.Join(err, file.Close()); err != nil {
			return h, nil, err
		}
		c[f.Name] = string(b)
	}
	return h, c, nil
}

// same reports whether what was extracted is what was packed.
func same(h Header, c content) bool {
	want := testHeader()
	want.Format = FormatVersion
	return maps.Equal(c, testContent) && fmt.Sprint(h) == fmt.Sprint(want)
}

// isRefusal reports whether err is one that a person can act on.
func isRefusal(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNotArchive) || errors.Is(err, ErrNewerFormat) || errors.Is(err, ErrTooLarge)
}
