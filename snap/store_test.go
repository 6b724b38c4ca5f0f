package snap

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

func ids(list []Info) (all []string) {
	for _, info := range list {
		all = append(all, info.ID)
	}
	return all
}

// TestStoreLifecycle walks through what a node does with its images.
func TestStoreLifecycle(t *testing.T) {
	fs := posixFS{vfs.NewMem()}
	s := mustOpenStore(t, fs, imageDir, testOptions())
	if got := s.List(); len(got) != 0 {
		t.Fatalf("a new store lists %v", got)
	}
	one := mustCreate(t, s, 10, content{"a": "one"})
	three := mustCreate(t, s, 30, content{"a": "three", "b": "more"})
	two := mustCreate(t, s, 20, content{"a": "two"})
	twin := mustCreate(t, s, 20, content{"a": "two"})
	if two.ID == twin.ID {
		t.Fatal("two images made at different times have one id")
	}
	want := []string{three.ID, twin.ID, two.ID, one.ID}
	if got := ids(s.List()); !slices.Equal(got, want) {
		t.Fatalf("list %q, want the newest first: %q", got, want)
	}
	if three.Bytes != 9 || three.Format != formatVersion || len(three.Members) != 4 {
		t.Fatalf("info %+v", three)
	}

	// A restart finds what Create returned.
	again := mustOpenStore(t, fs, imageDir, testOptions())
	if got := again.List(); !slices.Equal(ids(got), want) || !reflect.DeepEqual(got[0].Files, three.Files) ||
		!got[0].Created.Equal(three.Created) || got[0].Size != three.Size {
		t.Fatalf("after a restart: %+v", got)
	}

	if err := again.Purge(2); err != nil {
		t.Fatal(err)
	}
	if got := ids(again.List()); !slices.Equal(got, want[:2]) {
		t.Fatalf("after Purge(2): %q, want %q", got, want[:2])
	}
	if err := again.Delete(two.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("deleting a purged image: %v", err)
	}
	if _, err := again.Open(two.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("opening a purged image: %v", err)
	}
	if err := again.Verify(two.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("verifying a purged image: %v", err)
	}
	if err := again.Purge(-1); err == nil {
		t.Fatal("Purge(-1) must be refused")
	}
	if err := errors.Join(again.Delete(three.ID), again.Purge(0)); err != nil {
		t.Fatal(err)
	}
	if names, _ := fs.List(imageDir); len(names) != 0 {
		t.Fatalf("still on disk: %q", names)
	}
}

func TestInvalidIDs(t *testing.T) {
	s := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
	for _, id := range []string{"", ".", "..", "../x", "a/b", `a\b`, ".receiving-x", "a b", "a\x00", "ä", strings.Repeat("x", 129)} {
		_, open := s.Open(id)
		_, receive := s.Receive(id, 1000)
		for name, err := range map[string]error{
			"Open": open, "Receive": receive, "Delete": s.Delete(id), "Verify": s.Verify(id), "CheckID": CheckID(id),
		} {
			if !errors.Is(err, ErrInvalidID) {
				t.Errorf("%s(%q): got %v, want ErrInvalidID", name, id, err)
			}
		}
	}
	for _, id := range []string{"a", "A.b_c-9", "0", "-", "_", strings.Repeat("x", 128)} {
		if err := CheckID(id); err != nil {
			t.Errorf("CheckID(%q): %v", id, err)
		}
	}
}

// TestCreateRefusals: what cannot become an image leaves nothing behind.
func TestCreateRefusals(t *testing.T) {
	boom := errors.New("boom")
	cases := []struct {
		name  string
		build func(fs vfs.FS) func(dir string) (Meta, error)
		want  error
		text  string
	}{
		{"build fails", func(fs vfs.FS) func(string) (Meta, error) {
			return func(dir string) (Meta, error) {
				_, err := buildFiles(fs, testMeta(1), content{"a": "b"})(dir)
				return Meta{}, errors.Join(err, boom)
			}
		}, boom, ""},
		{"nothing built", func(fs vfs.FS) func(string) (Meta, error) {
			return func(string) (Meta, error) { return testMeta(1), nil }
		}, nil, "list what was built"},
		{"subdirectory", func(fs vfs.FS) func(string) (Meta, error) {
			return func(dir string) (Meta, error) {
				return testMeta(1), fs.MkdirAll(fs.PathJoin(dir, "sub"), 0o700)
			}
		}, nil, "not a plain file"},
		{"hidden file", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, testMeta(1), content{".x": ""})
		}, nil, "dot"},
		{"reserved name", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, testMeta(1), content{"MANIFEST": ""})
		}, nil, "reserved"},
		{"no index", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, Meta{Term: 1}, content{"a": ""})
		}, nil, "index 0"},
		{"foreign format", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, Meta{Index: 1, Term: 1, Format: 2}, content{"a": ""})
		}, nil, "format 2"},
		{"too many files", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, testMeta(1), content{"a": "", "b": "", "c": "", "d": ""})
		}, ErrTooLarge, "4 files"},
		{"too many bytes", func(fs vfs.FS) func(string) (Meta, error) {
			return buildFiles(fs, testMeta(1), content{"a": strings.Repeat("x", 60), "b": strings.Repeat("x", 60)})
		}, ErrTooLarge, "100 bytes"},
		{"manifest too large", func(fs vfs.FS) func(string) (Meta, error) {
			m := testMeta(1)
			m.Members = []Member{{1, strings.Repeat("x", 900)}}
			return buildFiles(fs, m, content{"a": ""})
		}, ErrTooLarge, "manifest"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			fs := vfs.NewMem()
			o := testOptions()
			o.MaxFiles, o.MaxImageBytes, o.MaxManifestBytes = 3, 100, 800
			s := mustOpenStore(t, fs, imageDir, o)
			before := fs.String()
			_, err := s.Create(context.Background(), c.build(fs))
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v, want %v with %q", err, c.want, c.text)
			}
			if now := fs.String(); now != before {
				t.Fatalf("left behind:\n%s", now)
			}
		})
	}
}

func TestCreateCancelled(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpenStore(t, fs, imageDir, testOptions())
	ctx, cancel := context.WithCancel(context.Background())
	build := buildFiles(fs, testMeta(1), content{"a": "b"})
	_, err := s.Create(ctx, func(dir string) (Meta, error) {
		cancel()
		return build(dir)
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if len(s.List()) != 0 || len(leftovers(t, s)) != 0 {
		t.Fatalf("a cancelled Create left %v, %q", s.List(), leftovers(t, s))
	}
}

// TestDamagedDirectories: what cannot be used is not listed, explained, left
// alone, and can be deleted.
func TestDamagedDirectories(t *testing.T) {
	fs := posixFS{vfs.NewMem()}
	s := mustOpenStore(t, fs, imageDir, testOptions())
	good := mustCreate(t, s, 1, content{"a": "good"})
	renamed := mustCreate(t, s, 2, content{"a": "renamed by hand"})
	if err := fs.Rename(s.Dir(renamed.ID), s.Dir("mine")); err != nil {
		t.Fatal(err)
	}
	for name, manifest := range map[string][]byte{
		"newer": forge(formatVersion+1, `{}`),
		"torn":  forgeFiles(fileJSON{"a", 1, "00000000"})[:80],
	} {
		if err := fs.MkdirAll(s.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		overwrite(t, fs, fs.PathJoin(s.Dir(name), manifestName), manifest)
	}
	if err := fs.MkdirAll(s.Dir("bare"), 0o700); err != nil {
		t.Fatal(err)
	}
	overwrite(t, fs, s.Dir("file"), []byte("not a directory"))
	overwrite(t, fs, s.Dir(".hidden"), []byte("of no concern"))

	s = mustOpenStore(t, fs, imageDir, testOptions())
	if got := ids(s.List()); !slices.Equal(got, []string{good.ID}) {
		t.Fatalf("list %q, want only %q", got, good.ID)
	}
	for name, want := range map[string]error{
		"newer": ErrNewerFormat, "torn": ErrCorrupt, "bare": ErrCorrupt, "mine": ErrCorrupt, "file": ErrNotFound,
	} {
		_, err := s.Open(name)
		if !errors.Is(err, want) {
			t.Errorf("Open(%s): got %v, want %v", name, err, want)
		}
		if err := s.Verify(name); !errors.Is(err, want) {
			t.Errorf("Verify(%s): got %v, want %v", name, err, want)
		}
		if err := s.Delete(name); (err != nil) != errors.Is(want, ErrNotFound) {
			t.Errorf("Delete(%s): %v", name, err)
		}
	}
	names, err := fs.List(imageDir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	if want := []string{".hidden", good.ID, "file"}; !slices.Equal(names, want) {
		t.Fatalf("on disk %q, want %q", names, want)
	}
}

// TestCheckWithoutStore: a copy of an image can be checked under any name.
func TestCheckWithoutStore(t *testing.T) {
	fs := vfs.NewMem()
	s := mustOpenStore(t, fs, imageDir, testOptions())
	info := mustCreate(t, s, 4, content{"a": "b"})
	if ok, err := vfs.Clone(fs, fs, s.Dir(info.ID), "/copy"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := Check(fs, "/copy"); err != nil {
		t.Fatal(err)
	}
	if got, err := Inspect(fs, "/copy"); err != nil || got.ID != info.ID || got.Index != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := Check(fs, "/nowhere"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v, want ErrNotFound", err)
	}
}

// TestPinDefersDelete: a pinned image keeps its files until the last Close.
func TestPinDefersDelete(t *testing.T) {
	fs := posixFS{vfs.NewMem()}
	s := mustOpenStore(t, fs, imageDir, testOptions())
	info := mustCreate(t, s, 1, content{"a": "kept"})
	first, err := s.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(info.ID); err != nil {
		t.Fatal(err)
	}
	if len(s.List()) != 0 {
		t.Fatal("a deleted image is listed")
	}
	if _, err := s.Open(info.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("opening a deleted image: %v", err)
	}
	if err := s.Delete(info.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("deleting it again: %v", err)
	}
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	if err := Check(fs, second.Dir()); err != nil {
		t.Fatalf("gone under the second reader: %v", err)
	}
	if stream, err := readStream(second, 0); err != nil || int64(len(stream)) != second.Size() {
		t.Fatalf("reading a deleted, pinned image: %d bytes, %v", len(stream), err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Stat(s.Dir(info.ID)); !isNotExist(err) {
		t.Fatalf("still on disk after the last close: %v", err)
	}
	if _, err := second.ReadChunk(0, 1); !errors.Is(err, ErrClosed) {
		t.Fatalf("reading a closed reader: %v", err)
	}
}

// TestOpenDuringDelete opens an image in the middle of every file operation of
// its deletion: it is there or not, never damaged.
func TestOpenDuringDelete(t *testing.T) {
	var during func()
	fs := hookFS(vfs.NewMem(), func(errorfs.Op) error {
		if f := during; f != nil {
			during = nil
			f()
			during = f
		}
		return nil
	})
	s := mustOpenStore(t, fs, imageDir, testOptions())
	info := mustCreate(t, s, 1, content{"a": "b"})
	opened := 0
	during = func() {
		opened++
		r, err := s.Open(info.ID)
		if err == nil {
			err = r.Close()
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			t.Errorf("operation %d: %v", opened, err)
		}
	}
	if err := s.Delete(info.ID); err != nil {
		t.Fatal(err)
	}
	if opened == 0 {
		t.Fatal("nothing was tried")
	}
}

// TestReceiveCallsOffDeletion: an image that waits for its deletion is whole,
// so a peer that offers it is told that it is here.
func TestReceiveCallsOffDeletion(t *testing.T) {
	s := mustOpenStore(t, posixFS{vfs.NewMem()}, imageDir, testOptions())
	info := mustCreate(t, s, 1, content{"a": "wanted"})
	r, err := s.Open(info.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(info.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Receive(info.ID, info.Size); !errors.Is(err, ErrExists) {
		t.Fatalf("got %v, want ErrExists", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(info.ID); err != nil {
		t.Fatal(err)
	}
}

// TestPinsAgainstPurge creates and purges images while readers check that
// every image they managed to open stays whole until they close it.
func TestPinsAgainstPurge(t *testing.T) {
	fs := posixFS{vfs.NewMem()}
	s := mustOpenStore(t, fs, imageDir, testOptions())
	const images = 60
	made := func(i uint64) content { return content{"n": fmt.Sprint(i), "pad": strings.Repeat("p", int(i))} }
	done := make(chan struct{})
	var readers, writers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				for _, info := range s.List() {
					got, err := readImage(s, info.ID)
					if errors.Is(err, ErrNotFound) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					if want := made(info.Index); !maps.Equal(got, want) {
						t.Errorf("image %s holds %v, want %v", info.ID, got, want)
						return
					}
					if err := s.Verify(info.ID); err != nil && !errors.Is(err, ErrNotFound) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for w := range uint64(2) {
		writers.Go(func() {
			for i := range uint64(images / 2) {
				index := i*2 + w + 1
				if _, err := s.Create(context.Background(), buildFiles(fs, testMeta(index), made(index))); err != nil {
					t.Error(err)
				}
				if err := s.Purge(2); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	if err := s.Purge(2); err != nil {
		t.Fatal(err)
	}
	if got := s.List(); len(got) != 2 || got[0].Index != images {
		t.Fatalf("left: %q", ids(got))
	}
	if names, _ := fs.List(imageDir); len(names) != 2 {
		t.Fatalf("on disk: %q", names)
	}
}

func TestOptionsReportEveryFault(t *testing.T) {
	_, err := OpenStore(vfs.NewMem(), imageDir, Options{
		MaxManifestBytes: 1, MaxFiles: -1, MaxImageBytes: -1, MaxChunkBytes: -1, MaxPartials: -1, MaxPartialAge: -1, SyncBytes: -1,
	})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, name := range []string{"MaxManifestBytes", "MaxFiles", "MaxImageBytes", "MaxChunkBytes", "MaxPartials", "MaxPartialAge", "SyncBytes"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is missing from: %v", name, err)
		}
	}
}
