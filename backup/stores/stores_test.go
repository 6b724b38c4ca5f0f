package stores_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"conveyor.etl/router/backup"
	_ "conveyor.etl/router/backup/stores"
)

// server is an S3 server on loopback, with a say in every request.
type server struct {
	backend *s3mem.Backend
	url     string
	// disturb may answer a request itself and return true.
	disturb atomic.Pointer[func(w http.ResponseWriter, r *http.Request) bool]
}

func newServer(t *testing.T) *server {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	s := &server{backend: s3mem.New()}
	if err := s.backend.CreateBucket("backups"); err != nil {
		t.Fatal(err)
	}
	inner := gofakes3.New(s.backend).Server()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if f := s.disturb.Load(); f != nil && (*f)(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(web.Close)
	s.url = "s3://backups/conveyor/prod?use_path_style=true&endpoint=" + url.QueryEscape(web.URL)
	return s
}

func (s *server) keys(t *testing.T) []string {
	t.Helper()
	l, err := s.backend.ListBucket("backups", nil, gofakes3.ListBucketPage{})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, o := range l.Contents {
		keys = append(keys, o.Key)
	}
	slices.Sort(keys)
	return keys
}

func open(t *testing.T, location string) *backup.Store {
	t.Helper()
	s, err := backup.Create(context.Background(), location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func random(n int) []byte {
	rng := rand.NewChaCha8([32]byte{1})
	b := make([]byte, n)
	_, _ = rng.Read(b) // never fails
	return b
}

// The whole life of backups in an object store, in several parts and with a
// transfer that breaks.
func TestS3(t *testing.T) {
	server := newServer(t)
	s := open(t, server.url)
	ctx := context.Background()
	archive := random(20<<20 + 17)
	m, err := s.Put(ctx, backup.Metadata{BackupID: "b-1", CreatedAt: time.Unix(1000, 0), Revision: 5}, iotest.HalfReader(bytes.NewReader(archive)))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"conveyor/prod/b-1/checkpoint.tar.zst", "conveyor/prod/b-1/metadata.json"}; !slices.Equal(server.keys(t), want) {
		t.Errorf("stored %q, want %q", server.keys(t), want)
	}
	if _, err := s.Put(ctx, backup.Metadata{BackupID: "b-1"}, strings.NewReader("x")); !errors.Is(err, backup.ErrExists) {
		t.Errorf("stored twice: %v", err)
	}
	if _, err := s.Put(ctx, backup.Metadata{BackupID: "b-2", CreatedAt: time.Unix(2000, 0)}, strings.NewReader("small")); err != nil {
		t.Fatal(err)
	}

	// The connection breaks after each half of what was asked for.
	breaks := 0
	cut := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, backup.ArchiveName) || breaks >= 3 {
			return false
		}
		breaks++
		object := httptest.NewRecorder()
		server.disturb.Store(nil)
		inner := gofakes3.New(server.backend).Server()
		inner.ServeHTTP(object, r)
		for k, v := range object.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(object.Code)
		_, _ = w.Write(object.Body.Bytes()[:object.Body.Len()/2])
		panic(http.ErrAbortHandler)
	}
	var again func(w http.ResponseWriter, r *http.Request) bool
	again = func(w http.ResponseWriter, r *http.Request) bool {
		defer server.disturb.Store(&again)
		return cut(w, r)
	}
	server.disturb.Store(&again)
	r, got, err := s.Get(ctx, "b-1")
	if err != nil {
		t.Fatal(err)
	}
	back, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil || !bytes.Equal(back, archive) || got.SHA256 != m.SHA256 {
		t.Fatalf("%d of %d bytes came back: %v", len(back), len(archive), err)
	}
	if breaks != 3 {
		t.Errorf("the transfer was broken %d times", breaks)
	}
	server.disturb.Store(nil)

	l, err := s.List(ctx)
	if err != nil || len(l.Backups) != 2 || l.Backups[0].BackupID != "b-2" || l.Backups[1].Revision != 5 {
		t.Fatalf("%+v, %v", l, err)
	}
	c, err := s.Cleanup(ctx, 1)
	if err != nil || len(c.Expired) != 1 || c.Expired[0].BackupID != "b-1" {
		t.Fatalf("%+v, %v", c, err)
	}
	if err := s.Delete(ctx, "b-2"); err != nil {
		t.Fatal(err)
	}
	if left := server.keys(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if _, err := s.Describe(ctx, "b-2"); !errors.Is(err, backup.ErrNotFound) {
		t.Error(err)
	}
}

// An upload that breaks, is given up or is refused leaves nothing behind.
func TestS3FailedPut(t *testing.T) {
	server := newServer(t)
	s := open(t, server.url)
	broken := errors.New("connection reset")
	for _, n := range []int{10, 20 << 20} {
		in := io.MultiReader(bytes.NewReader(random(n)), iotest.ErrReader(broken))
		if _, err := s.Put(context.Background(), backup.Metadata{BackupID: "x"}, in); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		in = io.MultiReader(bytes.NewReader(random(n)), canceller(cancel))
		if _, err := s.Put(ctx, backup.Metadata{BackupID: "x"}, in); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled after %d bytes: %v", n, err)
		}
		if left := server.keys(t); len(left) > 0 {
			t.Errorf("after %d bytes: left behind %q", n, left)
		}
	}
	refuse := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPut || !strings.HasSuffix(r.URL.Path, backup.MetadataName) {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	server.disturb.Store(&refuse)
	if _, err := s.Put(context.Background(), backup.Metadata{BackupID: "x"}, strings.NewReader("archive")); err == nil {
		t.Error("stored without a description")
	}
	if left := server.keys(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

type canceller func()

func (c canceller) Read(p []byte) (int, error) {
	c()
	return len(p), nil
}

// All drivers are there; only what needs no network can be asked of them here.
func TestDrivers(t *testing.T) {
	t.Setenv("AZURE_STORAGE_ACCOUNT", "account")
	t.Setenv("AZURE_STORAGE_KEY", "a2V5")
	t.Setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:1")
	for _, location := range []string{"azblob://container/x", "gs://bucket/x", "s3://bucket/x?region=eu-central-1"} {
		s, err := backup.Open(context.Background(), location)
		if err != nil {
			t.Errorf("%s: %v", location, err)
			continue
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
