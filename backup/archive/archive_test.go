package archive

import (
	stdtar "archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"conveyor.etl/router/snap"
)

// What is packed comes out again, in every compression, and the header can be
// read without the rest.
func TestRoundTrip(t *testing.T) {
	img := newImage(t, testContent)
	for _, c := range all {
		t.Run(c.String(), func(t *testing.T) {
			raw := pack(t, img, c, 0)
			t.Logf("%d bytes", len(raw))
			h, got, err := extract(raw, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if !same(h, got) {
				t.Fatalf("got %+v with %d files", h, len(got))
			}
			_, info, err := Verify(context.Background(), bytes.NewReader(raw), Limits{})
			if err != nil || info.ID != img.Info().ID {
				t.Fatalf("verified as %s (%v), is %s", info.ID, err, img.Info().ID)
			}
			h, err = ReadHeader(context.Background(), iotest.OneByteReader(bytes.NewReader(raw)))
			if err != nil || h.Revision != 1234 {
				t.Fatalf("header alone: %+v, %v", h, err)
			}
			if c, err := ParseCompression(c.String()); err != nil || c.String() == "" {
				t.Fatal(err)
			}
		})
	}
}

// Any tar can unpack an archive, and its size is known before.
func TestOrdinaryTar(t *testing.T) {
	img := newImage(t, testContent)
	raw := pack(t, img, None, 0)
	a, err := NewArchive(context.Background(), img, testHeader(), None, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if a.RawSize() != int64(len(raw)) {
		t.Errorf("RawSize is %d, the archive has %d bytes", a.RawSize(), len(raw))
	}
	var names []string
	for r := stdtar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if want, ok := testContent[h.Name]; ok && want != string(b) {
			t.Errorf("%s holds %q", h.Name, b)
		}
		if h.Typeflag != stdtar.TypeReg || h.Mode != 0o600 || h.ModTime.Unix() != 1_700_000_000 {
			t.Errorf("%+v", h)
		}
		names = append(names, h.Name)
	}
	if len(names) != len(testContent)+3 || names[0] != headerName || names[1] != snap.ManifestName || names[len(names)-1] != checksumName {
		t.Errorf("entries %q", names)
	}
}

// The stream is a function of the image, so it can be resumed anywhere.
func TestResume(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	big := make([]byte, 700_000)
	for i := range big {
		big[i] = byte(rng.IntN(7))
	}
	img := newImage(t, content{"000001.sst": string(big), "000002.sst": string(big[:100_000])})
	for _, c := range all {
		t.Run(c.String(), func(t *testing.T) {
			whole := pack(t, img, c, 0)
			offsets := []int64{0, 1, int64(len(whole)) - 1, int64(len(whole))}
			for range 20 {
				offsets = append(offsets, rng.Int64N(int64(len(whole))))
			}
			for _, at := range offsets {
				if got := pack(t, img, c, at); !bytes.Equal(got, whole[at:]) {
					t.Fatalf("from %d on, %d bytes differ from the %d of the whole stream", at, len(got), len(whole)-int(at))
				}
			}
			for _, at := range []int64{int64(len(whole)) + 1, 1 << 40} {
				a, err := NewArchive(context.Background(), img, testHeader(), c, at)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := a.Read(make([]byte, 10)); !errors.Is(err, ErrOffset) {
					t.Fatalf("offset %d: %v", at, err)
				}
			}
			if _, err := NewArchive(context.Background(), img, testHeader(), c, -1); !errors.Is(err, ErrOffset) {
				t.Fatal(err)
			}
		})
	}
}

func TestArchiveErrors(t *testing.T) {
	img := newImage(t, testContent)
	ctx, cancel := context.WithCancel(context.Background())
	a, err := NewArchive(ctx, img, testHeader(), Zstd, 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("after close: %v", err)
	}
	wrong := testHeader()
	wrong.Index++
	if _, err := NewArchive(context.Background(), img, wrong, None, 0); err == nil {
		t.Error("the header is of another image")
	}
	wrong = testHeader()
	wrong.ClusterName = string(make([]byte, maxHeaderBytes))
	if _, err := NewArchive(context.Background(), img, wrong, None, 0); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a large header: %v", err)
	}
	for _, name := range []string{headerName, checksumName} {
		if _, err := NewArchive(context.Background(), newImage(t, content{name: "x"}), testHeader(), None, 0); err == nil {
			t.Errorf("a file named %s was packed", name)
		}
	}
	if _, err := NewArchive(context.Background(), img, testHeader(), 7, 0); err == nil {
		t.Error("compression 7")
	}
	if _, err := ParseCompression("lz4"); err == nil {
		t.Error("lz4")
	}
}
