package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func openFile(t *testing.T) (*Store, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sub", "backups")
	s, err := Create(context.Background(), "file://"+dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, dir
}

func tree(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if path != dir {
			names = append(names, strings.TrimPrefix(path, dir+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestPutAndGet(t *testing.T) {
	s, dir := openFile(t)
	ctx := context.Background()
	archive := make([]byte, 20<<20) // more than two parts
	for i := range archive {
		archive[i] = byte(i * i >> 8)
	}
	created := time.Date(2026, 3, 10, 12, 0, 0, 123_456_789, time.UTC)
	m, err := s.Put(ctx, Metadata{BackupID: "b-1", RouterEndpoint: "r:50051", CommitIndex: 7, Term: 2, Compression: "zstd",
		CreatedAt: created, ClusterID: "00aa", Epoch: 1, Revision: 9, StateHash: "ff", Counts: map[string]uint64{"pipelines": 1}}, bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"b-1", "b-1/checkpoint.tar.zst", "b-1/metadata.json"}; !slices.Equal(tree(t, dir), want) {
		t.Errorf("stored %q, want %q", tree(t, dir), want)
	}
	// The keys that existing tools read and write.
	raw, err := os.ReadFile(filepath.Join(dir, "b-1", "metadata.json"))
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]any
	if err := json.Unmarshal(raw, &keys); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{"backup_id": "b-1", "router_endpoint": "r:50051", "commit_index": 7.0, "term": 2.0,
		"size_bytes": float64(len(archive)), "created_at": "2026-03-10T12:00:00.123Z", "compression": "zstd", "version": "1.0"} {
		if keys[key] != want {
			t.Errorf("%s is %v, want %v", key, keys[key], want)
		}
	}
	r, got, err := s.Get(ctx, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	if got.SHA256 != m.SHA256 || len(m.SHA256) != 64 || !got.CreatedAt.Equal(m.CreatedAt) || got.Revision != 9 {
		t.Errorf("got %+v, stored %+v", got, m)
	}
	back, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(back, archive) {
		t.Fatalf("%d bytes came back of %d: %v", len(back), len(archive), err)
	}
	if _, err := s.Put(ctx, Metadata{BackupID: "b-1"}, strings.NewReader("other")); !errors.Is(err, ErrExists) {
		t.Errorf("stored twice: %v", err)
	}
	if err := s.Delete(ctx, "b-1"); err != nil {
		t.Fatal(err)
	}
	if left := tree(t, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := s.Delete(ctx, "b-1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	if _, err := s.Describe(ctx, "b-1"); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// A backup that another tool has made has fewer keys.
func TestForeignMetadata(t *testing.T) {
	s, dir := openFile(t)
	write(t, dir, "abc/checkpoint.tar.zst", "archive")
	write(t, dir, "abc/metadata.json", `{"backup_id":"abc","router_endpoint":"localhost:9090","commit_index":5,"term":1,
		"size_bytes":7,"created_at":"2026-03-10T12:00:00.123456789+00:00","compression":"zstd","version":"1.0","extra":1}`)
	r, m, err := s.Get(context.Background(), "abc")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "archive" || m.CommitIndex != 5 {
		t.Errorf("%q, %+v, %v", b, m, err)
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// An upload that breaks or is given up leaves nothing behind.
func TestFailedPut(t *testing.T) {
	s, dir := openFile(t)
	broken := errors.New("connection reset")
	for _, n := range []int{0, 1, 1 << 20, 9 << 20} {
		in := io.MultiReader(bytes.NewReader(make([]byte, n)), iotest.ErrReader(broken))
		if _, err := s.Put(context.Background(), Metadata{BackupID: "x"}, in); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		in = io.MultiReader(bytes.NewReader(make([]byte, n)), readerFunc(func(p []byte) (int, error) {
			cancel()
			return len(p), nil
		}))
		if _, err := s.Put(ctx, Metadata{BackupID: "x"}, in); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled after %d bytes: %v", n, err)
		}
		if left := tree(t, dir); len(left) > 0 {
			t.Errorf("after %d bytes: left behind %q", n, left)
		}
	}
	if _, err := s.Put(context.Background(), Metadata{BackupID: "x"}, strings.NewReader("")); err == nil {
		t.Error("an empty archive was stored")
	}
	for _, id := range []string{"", ".", "..", "a/b", "../x", ".hidden", "a b", "a\x00", strings.Repeat("a", 129), "é"} {
		if _, err := s.Put(context.Background(), Metadata{BackupID: id}, strings.NewReader("x")); !errors.Is(err, ErrInvalidID) {
			t.Errorf("id %q: put: %v", id, err)
		}
		if err := s.Delete(context.Background(), id); !errors.Is(err, ErrInvalidID) {
			t.Errorf("id %q: delete: %v", id, err)
		}
		if _, _, err := s.Get(context.Background(), id); !errors.Is(err, ErrInvalidID) {
			t.Errorf("id %q: get: %v", id, err)
		}
	}
	if left := tree(t, dir); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Damage on the store is noticed, at the latest at the end of the archive.
func TestDamagedStore(t *testing.T) {
	s, dir := openFile(t)
	ctx := context.Background()
	put := func() {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(dir, "b")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Put(ctx, Metadata{BackupID: "b"}, strings.NewReader("the archive")); err != nil {
			t.Fatal(err)
		}
	}
	read := func() error {
		r, _, err := s.Get(ctx, "b")
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.ReadAll(r)
		return err
	}
	put()
	if err := read(); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"the archivf", "the archiv", "the archive!", ""} {
		write(t, dir, "b/checkpoint.tar.zst", text)
		if err := read(); !errors.Is(err, ErrDamaged) {
			t.Errorf("archive %q: %v", text, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "b", ArchiveName)); err != nil {
		t.Fatal(err)
	}
	if err := read(); !errors.Is(err, ErrDamaged) {
		t.Errorf("no archive: %v", err)
	}
	put()
	good, err := os.ReadFile(filepath.Join(dir, "b", MetadataName))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{", string(good[:20]), strings.Replace(string(good), `"b"`, `"c"`, 1),
		strings.Replace(string(good), `"sha256": "`, `"sha256": "zz`, 1), `{"backup_id":"b"}`, strings.Repeat(" ", maxMetadataBytes+1)} {
		write(t, dir, "b/metadata.json", text)
		if err := read(); !errors.Is(err, ErrDamaged) {
			t.Errorf("description %.30q: %v", text, err)
		}
	}
	l, err := s.List(ctx)
	if err != nil || len(l.Backups) != 0 || len(l.Broken) != 1 || !errors.Is(l.Broken[0].Err, ErrDamaged) {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestListAndCleanup(t *testing.T) {
	s, dir := openFile(t)
	ctx := context.Background()
	now := time.Date(2026, 3, 10, 12, 0, 0, 0, time.UTC)
	s.now = func() time.Time { return now }
	order := rand.New(rand.NewPCG(1, 1)).Perm(12)
	for _, i := range order {
		_, err := s.Put(ctx, Metadata{BackupID: "b" + string(rune('a'+i)), CreatedAt: now.Add(time.Duration(i) * time.Hour)}, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
	}
	// Two uploads without an end, and things that are none of ours.
	write(t, dir, "old/checkpoint.tar.zst", "half")
	write(t, dir, "young/fileblob123", "half")
	write(t, dir, "notes/readme.txt", "mine")
	write(t, dir, "readme.txt", "mine")
	write(t, dir, "b c/metadata.json", "mine")
	write(t, dir, "rotten/metadata.json", "{")
	ago := func(name string, d time.Duration) {
		if err := os.Chtimes(filepath.Join(dir, name), now.Add(-d), now.Add(-d)); err != nil {
			t.Fatal(err)
		}
	}
	ago("old/checkpoint.tar.zst", 25*time.Hour)
	ago("young/fileblob123", 23*time.Hour)
	ago("rotten/metadata.json", 100*time.Hour)

	l, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Backups) != 12 || l.Backups[0].BackupID != "bl" || l.Backups[11].BackupID != "ba" {
		t.Fatalf("listed %d: %+v", len(l.Backups), l.Backups)
	}
	var broken []string
	for _, b := range l.Broken {
		broken = append(broken, b.ID)
	}
	if want := []string{"old", "rotten", "young"}; !slices.Equal(broken, want) {
		t.Errorf("broken are %q, want %q", broken, want)
	}
	for _, keep := range []int{0, -1} {
		if _, err := s.Cleanup(ctx, keep); err == nil {
			t.Errorf("keep %d was accepted", keep)
		}
	}
	c, err := s.Cleanup(ctx, 3)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Kept) != 3 || len(c.Expired) != 9 || c.Expired[0].BackupID != "bi" || len(c.Abandoned) != 1 || len(c.Skipped) != 2 {
		t.Errorf("%+v", c)
	}
	var dirs []string
	for _, name := range tree(t, dir) {
		if !strings.Contains(name, "/") {
			dirs = append(dirs, name)
		}
	}
	if want := []string{"b c", "bj", "bk", "bl", "notes", "readme.txt", "rotten", "young"}; !slices.Equal(dirs, want) {
		t.Errorf("left are %q, want %q", dirs, want)
	}
	if c, err = s.Cleanup(ctx, 3); err != nil || len(c.Expired)+len(c.Abandoned) > 0 {
		t.Errorf("again: %+v, %v", c, err)
	}
}

func TestParseLocation(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"/var/backups":                           "file:///var/backups",
		"file:///var/backups/":                   "file:///var/backups",
		"backups":                                "file://" + wd + "/backups",
		"file://backups":                         "file://" + wd + "/backups",
		"s3://bucket":                            "s3://bucket",
		"s3://bucket/":                           "s3://bucket",
		"s3://my-bucket/a/b=1/":                  "s3://my-bucket/a/b=1",
		"gs://my_bucket/x":                       "gs://my_bucket/x",
		"azblob://container/x.y":                 "azblob://container/x.y",
		"s3://b-b/x?region=eu&endpoint=http://m": "s3://b-b/x?endpoint=http%3A%2F%2Fm&region=eu",
	} {
		l, err := ParseLocation(text)
		if err != nil || l.String() != want {
			t.Errorf("%q is %q, want %q (%v)", text, l, want, err)
		}
		if again, err := ParseLocation(l.String()); err != nil || again.String() != want {
			t.Errorf("%q does not parse as itself: %q, %v", want, again, err)
		}
	}
	for _, text := range []string{"", "file://", "../x", "/a/../b", "file:///a/..", "ftp://x/y", "s3://", "s3:///x", "s3://bucket/../x",
		"s3://bucket/a//b", "s3://bucket/.x", "s3://bucket/./x", "s3://Bucket", "s3://bucket:80/x", "s3://bucket/a%2f..%2fb", "s3://bucket/%2e%2e",
		"s3://bucket/x#y", "s3://user:secret@bucket/x", "http://bucket", "/a\x00b", "s3://bucket/x?%zz", strings.Repeat("a", 3000), "mem://x", "s3://bucket/a b"} {
		_, err := ParseLocation(text)
		if !errors.Is(err, ErrInvalidURL) {
			t.Errorf("%q: %v", text, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error repeats the password: %v", text, err)
		}
	}
}

func TestOpen(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	if _, err := Open(ctx, filepath.Join(dir, "none")); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	write(t, dir, "file", "x")
	if _, err := Open(ctx, filepath.Join(dir, "file")); !errors.Is(err, ErrInvalidURL) {
		t.Error(err)
	}
	if len(tree(t, dir)) != 1 {
		t.Error("Open has made a directory")
	}
	// The drivers are known only where they were asked for.
	if _, err := Open(ctx, "s3://bucket/x"); err == nil || !strings.Contains(err.Error(), "without the driver") {
		t.Error(err)
	}
}
