package snap

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"
)

// forge returns a manifest with valid header and checksum around any body.
func forge(format int, body string) []byte {
	raw := fmt.Appendf(nil, headerFormat, format, len(body))
	crc := crc32.Update(crc32.Checksum(raw, castagnoli), castagnoli, []byte(body))
	return append(fmt.Appendf(raw, crcFormat, crc), body...)
}

func forgeFiles(files ...fileJSON) []byte {
	b, err := json.Marshal(manifestJSON{Index: 5, Term: 1, Files: files})
	if err != nil {
		panic(err)
	}
	return forge(formatVersion, string(b))
}

// TestEveryFlippedByteIsFound flips bits in, cuts and extends every file of an
// image, and expects both ways of checking it to notice.
func TestEveryFlippedByteIsFound(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpenStore(t, fs, imageDir, testOptions())
	info := mustCreate(t, s, 8, content{"a.sst": "some table", "empty": "", "z": "tail"})
	dir := s.Dir(info.ID)
	expect := func(what, file string) {
		t.Helper()
		for _, err := range []error{s.Verify(info.ID), Check(fs, dir)} {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: got %v, want ErrCorrupt", what, err)
				continue
			}
			if !strings.Contains(err.Error(), info.ID) || !strings.Contains(err.Error(), file) ||
				!strings.Contains(err.Error(), "delete it") {
				t.Errorf("%s: the error must name image, file and what to do: %v", what, err)
			}
		}
	}
	names, err := fs.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{manifestName, "a.sst", "empty", "z"}; !slices.Equal(names, want) {
		t.Fatalf("files %q, want %q", names, want)
	}
	for _, name := range names {
		path := fs.PathJoin(dir, name)
		good, err := readFile(fs, path)
		if err != nil {
			t.Fatal(err)
		}
		for i := range good {
			for _, mask := range []byte{0x01, 0x10, 0x20, 0x80, 0xff} {
				bad := slices.Clone(good)
				bad[i] ^= mask
				overwrite(t, fs, path, bad)
				expect(fmt.Sprintf("%s: byte %d ^ %#x", name, i, mask), name)
			}
			overwrite(t, fs, path, good[:i])
			expect(fmt.Sprintf("%s: cut to %d", name, i), name)
		}
		overwrite(t, fs, path, append(slices.Clone(good), 0))
		expect(name+": one byte too many", name)
		if err := fs.Remove(path); err != nil {
			t.Fatal(err)
		}
		expect(name+": missing", name)
		overwrite(t, fs, path, good)
		if err := s.Verify(info.ID); err != nil {
			t.Fatalf("restored, but: %v", err)
		}
	}
	overwrite(t, fs, fs.PathJoin(dir, "000009.sst"), []byte("stranger"))
	expect("a file too many", "000009.sst")
}

func TestManifestRoundTrip(t *testing.T) {
	o := new(Options).EnsureDefaults()
	in := &Info{
		Meta:    testMeta(1<<63 + 1),
		Created: time.UnixMilli(1_700_000_000_123),
		Files:   []File{{"a", 3, 0}, {"b", 0, 0xffffffff}, {"c.d-e_f", 1 << 39, 0x00000010}},
	}
	in.Format = formatVersion
	raw, err := encodeManifest(in)
	if err != nil {
		t.Fatal(err)
	}
	out, err := decodeManifest(raw, "x", o)
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(in.ConfState, out.ConfState) || !reflect.DeepEqual(in.Members, out.Members) ||
		!reflect.DeepEqual(in.Files, out.Files) || in.Index != out.Index || in.Term != out.Term ||
		!in.Created.Equal(out.Created) || out.Format != formatVersion {
		t.Fatalf("got %+v, want %+v", out, in)
	}
	if out.Bytes != 3+1<<39 || out.Size != out.Bytes+int64(len(raw)) {
		t.Fatalf("bytes %d, size %d", out.Bytes, out.Size)
	}
	if err := CheckID(out.ID); err != nil {
		t.Fatal(err)
	}
	again, err := encodeManifest(out)
	if err != nil || !bytes.Equal(again, raw) {
		t.Fatalf("decoding and encoding changed it: %v\n%s\n%s", err, again, raw)
	}
	in.ConfState, in.Members, in.Files = nil, nil, nil
	if raw, err = encodeManifest(in); err != nil {
		t.Fatal(err)
	}
	if out, err = decodeManifest(raw, "x", o); err != nil || out.ConfState != nil || out.Size != int64(len(raw)) {
		t.Fatalf("image without configuration and files: %+v, %v", out, err)
	}
}

// TestForgedManifests feeds manifests with a good checksum and bad content, as
// a faulty or hostile peer could send them, to the decoder and to a Receiver.
func TestForgedManifests(t *testing.T) {
	file := func(name string) []byte { return forgeFiles(fileJSON{name, 1, "00000000"}) }
	cases := []struct {
		name string
		raw  []byte
		want error
		text string
	}{
		{"newer format", forge(formatVersion+1, `{"anything": true}`), ErrNewerFormat, "use the newer program"},
		{"format zero", forge(0, `{}`), ErrCorrupt, "format 0"},
		{"not json", forge(1, `nonsense`), ErrCorrupt, ""},
		{"empty body", forge(1, ``), ErrCorrupt, ""},
		{"two documents", forge(1, `{"index":1,"term":1}{}`), ErrCorrupt, ""},
		{"no index", forge(1, `{"term":1}`), ErrCorrupt, "index 0"},
		{"no term", forge(1, `{"index":1}`), ErrCorrupt, "term 0"},
		{"negative index", forge(1, `{"index":-1,"term":1}`), ErrCorrupt, ""},
		{"bad configuration", forge(1, `{"index":1,"term":1,"conf_state":{"voters":"x"}}`), ErrCorrupt, "configuration"},
		{"unknown configuration", forge(1, `{"index":1,"term":1,"conf_state":{"witnesses":[1]}}`), ErrCorrupt, "configuration"},
		{"parent", file(".."), ErrCorrupt, "dot"},
		{"path up", file("../../etc/passwd"), ErrCorrupt, ""},
		{"subdirectory", file("a/b"), ErrCorrupt, ""},
		{"backslash", file(`a\b`), ErrCorrupt, ""},
		{"absolute", file("/etc/passwd"), ErrCorrupt, ""},
		{"nul", file("a\x00b"), ErrCorrupt, ""},
		{"newline", file("a\nb"), ErrCorrupt, ""},
		{"not ascii", file("é"), ErrCorrupt, ""},
		{"hidden", file(".x"), ErrCorrupt, "dot"},
		{"no name", file(""), ErrCorrupt, "empty"},
		{"long name", file(strings.Repeat("a", 256)), ErrCorrupt, "limit is 255"},
		{"the manifest itself", file("MANIFEST"), ErrCorrupt, "reserved"},
		{"twice", forgeFiles(fileJSON{"a", 1, "00000000"}, fileJSON{"a", 1, "00000000"}), ErrCorrupt, "sort"},
		{"unsorted", forgeFiles(fileJSON{"b", 1, "00000000"}, fileJSON{"a", 1, "00000000"}), ErrCorrupt, "sort"},
		{"negative size", forgeFiles(fileJSON{"a", -1, "00000000"}), ErrCorrupt, "size -1"},
		{"overflowing sizes", forgeFiles(fileJSON{"a", 1 << 62, "00000000"}, fileJSON{"b", 1 << 62, "00000000"}), ErrTooLarge, ""},
		{"short checksum", forgeFiles(fileJSON{"a", 1, "0000"}), ErrCorrupt, "checksum"},
		{"checksum of letters", forgeFiles(fileJSON{"a", 1, "zzzzzzzz"}), ErrCorrupt, "checksum"},
		{"too many files", forgeFiles(fileJSON{"a", 1, "00000000"}, fileJSON{"b", 1, "00000000"}, fileJSON{"c", 1, "00000000"}), ErrTooLarge, "3 files"},
		{"too large", forgeFiles(fileJSON{"a", 2000, "00000000"}), ErrTooLarge, "1000"},
	}
	opts := testOptions()
	opts.MaxFiles, opts.MaxImageBytes = 2, 1000
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o := opts
			_, err := decodeManifest(c.raw, "img", o.EnsureDefaults())
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("decode: got %v, want %v with %q", err, c.want, c.text)
			}
			fs := vfs.NewMem()
			s := mustOpenStore(t, fs, imageDir, opts)
			before := fs.String()
			w, err := s.Receive(imageID(c.raw, 5, 1), int64(len(c.raw))+1)
			if err != nil {
				t.Fatal(err)
			}
			err = w.Write(Chunk{Data: c.raw, CRC: crc32.Checksum(c.raw, castagnoli)})
			if err == nil {
				// A body of length zero is only seen when more comes.
				err = w.Write(Chunk{Offset: w.Offset(), Data: []byte{0}, CRC: crc32.Checksum([]byte{0}, castagnoli), Last: true})
			}
			if !errors.Is(err, c.want) {
				t.Fatalf("receive: got %v, want %v", err, c.want)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if now := fs.String(); now != before {
				t.Fatalf("the refused image left something behind:\n%s", now)
			}
		})
	}
}

// TestHeaderHasOneSpelling: every other spelling of the header is refused.
func TestHeaderHasOneSpelling(t *testing.T) {
	good := forge(1, `{"index":1,"term":1}`)
	for i := range good[:headerLen] {
		for b := range 256 {
			if byte(b) == good[i] {
				continue
			}
			bad := slices.Clone(good)
			bad[i] = byte(b)
			if _, err := decodeManifest(bad, "x", new(Options).EnsureDefaults()); !errors.Is(err, ErrCorrupt) &&
				!errors.Is(err, ErrTooLarge) {
				t.Fatalf("byte %d = %#x: got %v, want an error", i, b, err)
			}
		}
	}
}

func FuzzDecodeManifest(f *testing.F) {
	f.Add(forgeFiles(fileJSON{"a", 1, "00000000"}))
	f.Add(forge(1, `{"index":1,"term":1,"conf_state":{"voters":["1"]},"members":[{"id":1,"addr":"a:1"}]}`))
	f.Add(forge(2, `{}`))
	f.Add([]byte(`{"index":1,"term":1,"files":[{"name":"../x","size":1,"crc32c":"00000000"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		o := new(Options).EnsureDefaults()
		// Fuzzing would never guess a checksum: try the input as the body too.
		for _, raw := range [][]byte{b, forge(formatVersion, string(b))} {
			info, err := decodeManifest(raw, "x", o)
			if err != nil {
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrNewerFormat) {
					t.Fatalf("error of no kind: %v", err)
				}
				continue
			}
			if info.Size != int64(len(raw))+info.Bytes || info.Bytes < 0 || info.Index == 0 || CheckID(info.ID) != nil {
				t.Fatalf("accepted %+v", info)
			}
			for _, f := range info.Files {
				if strings.ContainsAny(f.Name, "/\\\x00") || f.Name == ".." || f.Size < 0 {
					t.Fatalf("accepted file %+v", f)
				}
			}
			again, err := encodeManifest(info)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := decodeManifest(again, "x", o); err != nil {
				t.Fatalf("written again, it is refused: %v\n%s", err, again)
			}
		}
	})
}

func FuzzDecodeJournal(f *testing.F) {
	j := journal{size: 100, begun: time.UnixMilli(5), spans: []span{{0, 40, 1}, {40, 60, 2}}}
	f.Add(j.encode())
	f.Add(j.encode()[:journalHeader+journalSpan+3])
	f.Fuzz(func(t *testing.T, b []byte) {
		j, ok := decodeJournal(b)
		if !ok {
			return
		}
		next := int64(0)
		for _, s := range j.spans {
			if s.offset != next || s.length == 0 || s.end() > j.size {
				t.Fatalf("span %+v at %d of %d", s, next, j.size)
			}
			next = s.end()
		}
	})
}

// TestJournalPrefix: a journal cut or damaged at any byte yields a prefix.
func TestJournalPrefix(t *testing.T) {
	j := journal{size: 100, begun: time.UnixMilli(5), spans: []span{{0, 40, 1}, {40, 50, 2}, {90, 10, 3}}}
	b := j.encode()
	whole := func(n int) int { return max(0, (n-journalHeader)/journalSpan) }
	for i := range b {
		got, ok := decodeJournal(b[:i])
		if ok != (i >= journalHeader) || len(got.spans) != whole(i) {
			t.Fatalf("cut to %d: %t, %d spans", i, ok, len(got.spans))
		}
		bad := slices.Clone(b)
		bad[i] ^= 4
		got, ok = decodeJournal(bad)
		if ok != (i >= journalHeader) || len(got.spans) != whole(i) {
			t.Fatalf("byte %d damaged: %t, %d spans", i, ok, len(got.spans))
		}
	}
}
