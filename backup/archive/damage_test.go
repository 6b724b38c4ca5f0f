package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"conveyor.etl/router/snap"
)

// Cut anywhere, an archive is refused and nothing is left of it.
func TestTruncated(t *testing.T) {
	for name, raw := range everyForm(t) {
		t.Run(name, func(t *testing.T) {
			for n := range raw {
				_, _, err := extract(raw[:n], Limits{})
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNotArchive) {
					t.Fatalf("cut after %d of %d bytes: %v", n, len(raw), err)
				}
			}
		})
	}
}

// Damaged anywhere, an archive is refused or gives the same content: gzip has
// bytes that nobody reads.
func TestFlippedBytes(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for name, raw := range everyForm(t) {
		t.Run(name, func(t *testing.T) {
			harmless := 0
			for i := range raw {
				for _, mask := range []byte{1 << rng.IntN(8), 0xff} {
					bad := bytes.Clone(raw)
					bad[i] ^= mask
					h, got, err := extract(bad, Limits{})
					if err != nil && !isRefusal(err) {
						t.Fatalf("byte %d of %d: %v", i, len(raw), err)
					}
					if err == nil {
						harmless++
						if !same(h, got) {
							t.Fatalf("byte %d of %d: accepted with other content", i, len(raw))
						}
					}
				}
			}
			t.Logf("%d bytes, %d flips without effect", len(raw), harmless)
			if name == None.String() && harmless > 0 {
				t.Errorf("%d flips of a plain tar were not noticed", harmless)
			}
		})
	}
}

func TestTrailingBytes(t *testing.T) {
	img := newImage(t, testContent)
	squeeze := func(c Compression, b []byte) []byte {
		if c == Zstd {
			return frameOf(t, b)
		}
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		_, err := w.Write(b)
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	plain := pack(t, img, None, 0)
	inside := append(bytes.Clone(plain), make([]byte, 512)...)
	cases := map[string][]byte{
		"none, a zero":                append(bytes.Clone(plain), 0),
		"none, a block":               inside,
		"gzip, inside":                squeeze(Gzip, inside),
		"zstd, inside":                squeeze(Zstd, inside),
		"gzip, a zero":                append(pack(t, img, Gzip, 0), 0),
		"zstd, a zero":                append(pack(t, img, Zstd, 0), 0),
		"gzip, an empty member":       append(pack(t, img, Gzip, 0), squeeze(Gzip, nil)...),
		"zstd, an empty frame":        append(pack(t, img, Zstd, 0), squeeze(Zstd, nil)...),
		"zstd, a frame to be skipped": append(pack(t, img, Zstd, 0), 0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 'h', 'i'),
		"twice":                       append(bytes.Clone(plain), plain...),
	}
	for name, raw := range cases {
		if _, _, err := extract(raw, Limits{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// forgery builds tars that NewArchive would not.
type forgery struct{ bytes.Buffer }

func (f *forgery) add(name, text string) *forgery {
	f.Write(block(name, int64(len(text)), 1_700_000_000))
	f.WriteString(text)
	f.Write(make([]byte, padding(int64(len(text)))))
	return f
}

func (f *forgery) end() []byte {
	sum := fmt.Sprintf("%x\n", sha256.Sum256(f.Bytes()))
	f.add(checksumName, sum)
	f.Write(make([]byte, endLen))
	return f.Bytes()
}

func headerText(t *testing.T, change func(h *Header)) string {
	h := testHeader()
	h.Format = FormatVersion
	change(&h)
	raw, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func manifestOf(t *testing.T, img *snap.Reader) string {
	info := img.Info()
	raw := make([]byte, info.Size-info.Bytes)
	if _, err := img.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// rewritten seals a manifest after a change of its text, as an attacker would.
func rewritten(t *testing.T, manifest, from, to string) string {
	t.Helper()
	_, body, _ := strings.Cut(manifest, "\n")
	if !strings.Contains(body, from) {
		t.Fatalf("%q is not in %s", from, body)
	}
	body = strings.ReplaceAll(body, from, to)
	// The header line that package snap writes.
	line := fmt.Sprintf("conveyor-image format=00001 bytes=%010d", len(body))
	return fmt.Sprintf("%s crc32c=%08x\n%s", line, crc32.Checksum([]byte(line+body), castagnoli), body)
}

// What an attacker may try: consistent checksums everywhere, and names, kinds
// and sizes that must not be believed.
func TestForgeries(t *testing.T) {
	head := headerText(t, func(*Header) {})
	img := newImage(t, content{"000001.sst": "table"})
	manifest := manifestOf(t, img)
	two := manifestOf(t, newImage(t, content{"000001.sst": "table", "000002.sst": "table"}))
	good := func() *forgery { return new(forgery).add(headerName, head).add(snap.ManifestName, manifest) }
	if _, _, err := extract(good().add("000001.sst", "table").end(), Limits{}); err != nil {
		t.Fatalf("the forgery is no good: %v", err)
	}
	withKind := func(kind byte, link string) []byte {
		f := good()
		b := block("000001.sst", 5, 1_700_000_000)
		b[156] = kind
		copy(b[157:], link)
		copy(b[148:], "        ")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		f.Write(b)
		f.WriteString("table")
		f.Write(make([]byte, padding(5)))
		return f.end()
	}
	cases := []struct {
		name string
		raw  []byte
		want error
	}{
		{"empty", nil, ErrNotArchive},
		{"text", []byte(strings.Repeat("hello ", 1000)), ErrNotArchive},
		{"another tar", new(forgery).add("notes.txt", "hello").end(), ErrNotArchive},
		{"traversing entry", good().add("../../etc/passwd", "table").end(), ErrCorrupt},
		{"absolute entry", good().add("/etc/passwd", "table").end(), ErrCorrupt},
		{"duplicate entry", good().add("000001.sst", "table").add("000001.sst", "table").end(), ErrCorrupt},
		{"unknown entry", good().add("000001.sst", "table").add("000009.sst", "more").end(), ErrCorrupt},
		{"missing entry", good().end(), ErrCorrupt},
		{"other order", new(forgery).add(headerName, head).add(snap.ManifestName, two).add("000002.sst", "table").add("000001.sst", "table").end(), ErrCorrupt},
		{"no manifest", new(forgery).add(headerName, head).add("000001.sst", "table").end(), ErrCorrupt},
		{"symbolic link", withKind('2', "/etc/passwd"), ErrCorrupt},
		{"hard link", withKind('1', "/etc/passwd"), ErrCorrupt},
		{"directory", withKind('5', ""), ErrCorrupt},
		{"device", withKind('3', ""), ErrCorrupt},
		{"extended header", withKind('x', ""), ErrCorrupt},
		{"other length", good().add("000001.sst", "table!").end(), ErrCorrupt},
		{"other content", good().add("000001.sst", "tablf").end(), ErrCorrupt},
		{"traversing manifest", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, "000001.sst", "../../000001.sst")).add("../../000001.sst", "table").end(), ErrCorrupt},
		{"absolute manifest", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, "000001.sst", "/etc/passwd")).add("/etc/passwd", "table").end(), ErrCorrupt},
		{"duplicate in the manifest", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, two, "000002.sst", "000001.sst")).add("000001.sst", "table").add("000001.sst", "table").end(), ErrCorrupt},
		{"manifest in the manifest", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, "000001.sst", "MANIFEST")).add("MANIFEST", "table").end(), ErrCorrupt},
		{"checksum in the manifest", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, "000001.sst", "checksum")).add("checksum", "table").end(), ErrCorrupt},
		{"huge file", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, `"size":5`, `"size":999999999999`)).add("000001.sst", "table").end(), ErrTooLarge},
		{"absurd file", new(forgery).add(headerName, head).add(snap.ManifestName,
			rewritten(t, manifest, `"size":5`, `"size":9223372036854775807`)).add("000001.sst", "table").end(), ErrTooLarge},
		{"newer archive", new(forgery).add(headerName, headerText(t, func(h *Header) { h.Format = FormatVersion + 1 })).end(), ErrNewerFormat},
		{"format zero", new(forgery).add(headerName, headerText(t, func(h *Header) { h.Format = 0 })).end(), ErrCorrupt},
		{"header of another image", new(forgery).add(headerName, headerText(t, func(h *Header) { h.Index++ })).
			add(snap.ManifestName, manifest).add("000001.sst", "table").end(), ErrCorrupt},
		{"header that is none", new(forgery).add(headerName, "hello").end(), ErrCorrupt},
		{"huge header", new(forgery).add(headerName, strings.Repeat(" ", maxHeaderBytes+1)).end(), ErrTooLarge},
		{"time of another backup", new(forgery).add(headerName, headerText(t, func(h *Header) { h.CreatedUnixMsec = 5000 })).end(), ErrCorrupt},
	}
	for _, c := range cases {
		_, _, err := extract(c.raw, Limits{})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "left behind") {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// A small archive that would fill the disk is given up early.
func TestZipBomb(t *testing.T) {
	const size = 300 << 20
	zeroes := zeroImage{newImage(t, content{"000001.sst": "table"}), size, ""}
	zeroes.manifest = rewritten(t, manifestOf(t, zeroes.Reader), `"size":5`, fmt.Sprintf(`"size":%d`, size))
	for _, c := range []Compression{Gzip, Zstd} {
		a, err := NewArchive(context.Background(), zeroes, testHeader(), c, 0)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := io.ReadAll(a)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes would become %d", c, len(raw), size)
		if _, _, err := extract(raw, Limits{MaxRatio: 100}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: by ratio: %v", c, err)
		}
		if _, _, err := extract(raw, Limits{MaxBytes: size - 1}); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: by size: %v", c, err)
		}
	}
	// A bomb in front of the first check of a size: a header without end.
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(block(headerName, maxFileSize, 0))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := extract(out.Bytes(), Limits{}); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	// A window that would take a gigabyte of memory.
	huge := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0, 0x01, 0, 0}
	if _, _, err := extract(huge, Limits{}); !errors.Is(err, ErrNotArchive) && !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// zeroImage claims one file of zeroes.
type zeroImage struct {
	*snap.Reader
	size     int64
	manifest string
}

func (z zeroImage) Info() snap.Info {
	info := z.Reader.Info()
	info.Files = []snap.File{{Name: "000001.sst", Size: z.size}}
	info.Bytes, info.Size = z.size, int64(len(z.manifest))+z.size
	return info
}

func (z zeroImage) ReadAt(p []byte, offset int64) (int, error) {
	clear(p)
	if offset < int64(len(z.manifest)) {
		copy(p, z.manifest[offset:])
	}
	return len(p), nil
}

// The disk is full, or fails, at every operation in turn: the error is the
// disk's own and nothing is left.
func TestFailingDisk(t *testing.T) {
	img := newImage(t, testContent)
	raw := pack(t, img, Zstd, 0)
	for fail := 0; ; fail++ {
		mem := vfs.NewMem()
		if err := mem.MkdirAll("backups", 0o700); err != nil {
			t.Fatal(err)
		}
		n, hit := 0, false
		var mu sync.Mutex // files are stored beside each other
		fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if op.Kind.ReadOrWrite() == errorfs.OpIsRead || op.Kind == errorfs.OpRemoveAll {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if n++; n-1 == fail {
				hit = true
				return syscall.ENOSPC
			}
			return nil
		}))
		_, _, err := Extract(context.Background(), bytes.NewReader(raw), Limits{}, fs, "backups/new")
		if !hit {
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d operations", n)
			if n < 15 {
				t.Errorf("only %d operations were made to fail", n)
			}
			return
		}
		if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrCorrupt) {
			t.Fatalf("operation %d: %v", fail, err)
		}
		if left, err := mem.List("backups"); err != nil || len(left) > 0 {
			t.Fatalf("operation %d: %q left behind (%v)", fail, left, err)
		}
	}
}

// smallDisk is a disk with little room.
type smallDisk struct {
	vfs.FS
	free uint64
}

func (d smallDisk) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: d.free}, nil
}

func TestReserve(t *testing.T) {
	img := newImage(t, testContent)
	raw := pack(t, img, Zstd, 0)
	mem := vfs.NewMem()
	disk := smallDisk{mem, 10_000}
	_, _, err := Extract(context.Background(), bytes.NewReader(raw), Limits{ReserveBytes: 9_000}, disk, "new")
	if !errors.Is(err, snap.ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := mem.Stat("new"); err == nil {
		t.Fatal("a directory was made")
	}
	if _, _, err := Extract(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new"); err != nil {
		t.Fatal(err)
	}
	// What is there already is not touched.
	if _, _, err := Extract(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new"); err == nil {
		t.Fatal("extracted over an existing directory")
	}
	if err := snap.Check(mem, "new"); err != nil {
		t.Fatal(err)
	}
}

// A source that fails, or a caller who gives up, is not called corruption.
func TestFailingSource(t *testing.T) {
	img := newImage(t, testContent)
	for _, c := range all {
		raw := pack(t, img, c, 0)
		broken := errors.New("connection reset")
		for n := 0; n < len(raw); n += 7 {
			fs := vfs.NewMem()
			in := io.MultiReader(bytes.NewReader(raw[:n]), iotest.ErrReader(broken))
			if _, _, err := Extract(context.Background(), in, Limits{}, fs, "new"); !errors.Is(err, broken) || isRefusal(err) {
				t.Fatalf("%s, after %d bytes: %v", c, n, err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			in = io.MultiReader(bytes.NewReader(raw[:n]), readerFunc(func([]byte) (int, error) {
				cancel()
				return 0, nil
			}), bytes.NewReader(raw[n:]))
			if _, _, err := Extract(ctx, in, Limits{}, fs, "new"); !errors.Is(err, context.Canceled) {
				t.Fatalf("%s, cancelled after %d bytes: %v", c, n, err)
			}
			if left, err := fs.List(""); err != nil || len(left) > 0 {
				t.Fatalf("%q left behind (%v)", left, err)
			}
		}
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Other programs compress in other ways: several blocks, sizes in the frame.
func TestForeignCompression(t *testing.T) {
	img := newImage(t, testContent)
	plain := pack(t, img, None, 0)
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	if h, got, err := extract(enc.EncodeAll(plain, nil), Limits{}); err != nil || !same(h, got) {
		t.Error(err)
	}
	single, err := zstd.NewWriter(nil, zstd.WithSingleSegment(true), zstd.WithEncoderCRC(false))
	if err != nil {
		t.Fatal(err)
	}
	defer single.Close()
	if h, got, err := extract(single.EncodeAll(plain, nil), Limits{}); err != nil || !same(h, got) {
		t.Error(err)
	}
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	w.Name, w.Comment = "checkpoint.tar", "a name and a comment are allowed"
	_, err = w.Write(plain)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if h, got, err := extract(out.Bytes(), Limits{}); err != nil || !same(h, got) {
		t.Error(err)
	}
}

func FuzzExtract(f *testing.F) {
	img := newImage(f, testContent)
	for _, c := range all {
		f.Add(pack(f, img, c, 0))
	}
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00})
	f.Fuzz(func(t *testing.T, raw []byte) {
		h, got, err := extract(raw, Limits{MaxBytes: 1 << 20})
		if err != nil && !isRefusal(err) {
			t.Fatal(err)
		}
		if err == nil && (h.Index == 0 || got == nil) {
			t.Fatalf("accepted as %+v", h)
		}
	})
}
