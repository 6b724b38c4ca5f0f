package snap

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"go.etcd.io/raft/v3/raftpb"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the randomised tests; 0 takes the clock")

// seed returns the seed of a randomised test and logs it.
func seed(t *testing.T) uint64 {
	s := *seedFlag
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d (repeat with -seed=%d)", s, s)
	return s
}

// content is what an image holds, by file name.
type content map[string]string

// posixFS makes a memory file system as unforgiving as a real one: RemoveAll
// removes file by file, with a chance to fail or crash between any two, each
// removal may reach the disk before a rename that came earlier, and a directory
// cannot be renamed onto another.
type posixFS struct{ vfs.FS }

func (p posixFS) RemoveAll(name string) error {
	st, err := p.Stat(name)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.IsDir() {
		names, err := p.List(name)
		if err != nil {
			return err
		}
		slices.Sort(names)
		for _, n := range names {
			if err := p.RemoveAll(p.PathJoin(name, n)); err != nil {
				return err
			}
			// CrashClone forgets removals that were not fsynced; a disk need not.
			if err := syncDir(vfs.Root(p.FS), name); err != nil {
				return err
			}
		}
	}
	return p.Remove(name)
}

func (p posixFS) Rename(from, to string) error {
	if st, err := p.Stat(to); err == nil && st.IsDir() {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: syscall.ENOTEMPTY}
	}
	return p.FS.Rename(from, to)
}

// inodeFS gives the files of a memory file system inodes, one for each path, so that who
// looks for what is still the same file finds it as on a disk.
type inodeFS struct{ posixFS }

type inodeInfo struct {
	vfs.FileInfo
	sys syscall.Stat_t
}

func (i *inodeInfo) Sys() any { return &i.sys }

func (f inodeFS) Stat(name string) (vfs.FileInfo, error) {
	return withInode(name)(f.posixFS.Stat(name))
}

func (f inodeFS) OpenReadWrite(name string, category vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	file, err := f.posixFS.OpenReadWrite(name, category, opts...)
	if err != nil {
		return nil, err
	}
	return &inodeFile{file, name}, nil
}

// inodeFile tells the same of itself as its path does.
type inodeFile struct {
	vfs.File
	name string
}

func (f *inodeFile) Stat() (vfs.FileInfo, error) { return withInode(f.name)(f.File.Stat()) }

func withInode(name string) func(vfs.FileInfo, error) (vfs.FileInfo, error) {
	return func(st vfs.FileInfo, err error) (vfs.FileInfo, error) {
		if err != nil {
			return nil, err
		}
		h := fnv.New64a()
		_, _ = h.Write([]byte(name))
		return &inodeInfo{st, syscall.Stat_t{Dev: 1, Ino: h.Sum64() | 1, Nlink: 1}}, nil
	}
}

// hookFS calls hook before every operation on fs; an error it returns is the
// result of the operation.
func hookFS(fs vfs.FS, hook func(op errorfs.Op) error) posixFS {
	return posixFS{errorfs.Wrap(fs, errorfs.InjectorFunc(hook))}
}

// testOptions counts seconds instead of reading the clock: ids, which contain
// the time of creation, are then the same in every run.
func testOptions() Options {
	var ticks atomic.Int64
	// Tests count operations, and let certain ones fail.
	return Options{Now: func() time.Time { return time.Unix(1_700_000_000+ticks.Add(1), 0) }, Inline: true}
}

func mustOpenStore(t testing.TB, fs vfs.FS, dir string, o Options) *Store {
	t.Helper()
	s, err := OpenStore(fs, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testMeta(index uint64) Meta {
	return Meta{
		Index:     index,
		Term:      3,
		ConfState: &raftpb.ConfState{Voters: []uint64{1, 2, 3}, Learners: []uint64{4}},
		Members:   []Member{{1, "a:1"}, {2, "b:1"}, {3, "c:1"}, {4, "d:1"}},
	}
}

// buildFiles returns a build function for Create that writes c.
func buildFiles(fs vfs.FS, meta Meta, c content) func(dir string) (Meta, error) {
	return func(dir string) (Meta, error) {
		if err := fs.MkdirAll(dir, 0o700); err != nil {
			return Meta{}, err
		}
		for _, name := range slices.Sorted(maps.Keys(c)) {
			f, err := fs.Create(fs.PathJoin(dir, name), vfs.WriteCategoryUnspecified)
			if err != nil {
				return Meta{}, err
			}
			_, err = f.Write([]byte(c[name]))
			if err := errors.Join(err, f.Close()); err != nil {
				return Meta{}, err
			}
		}
		return meta, nil
	}
}

func mustCreate(t testing.TB, s *Store, index uint64, c content) Info {
	t.Helper()
	info, err := s.Create(context.Background(), buildFiles(s.fs, testMeta(index), c))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// readImage reads image id of s through a Reader and through the directory,
// and checks that both agree.
func readImage(s *Store, id string) (content, error) {
	r, err := s.Open(id)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	stream, err := readStream(r, 97)
	if err != nil {
		return nil, err
	}
	c := content{}
	at := len(r.manifest)
	for _, f := range r.Info().Files {
		b, err := readFile(s.fs, s.fs.PathJoin(r.Dir(), f.Name))
		if err != nil {
			return nil, err
		}
		if got := stream[at : at+int(f.Size)]; !bytes.Equal(got, b) {
			return nil, fmt.Errorf("file %s: the stream has %q, the directory %q", f.Name, got, b)
		}
		at += int(f.Size)
		c[f.Name] = string(b)
	}
	return c, r.Close()
}

func readStream(r *Reader, max int) ([]byte, error) {
	var stream []byte
	for {
		c, err := r.ReadChunk(int64(len(stream)), max)
		if errors.Is(err, io.EOF) {
			return stream, nil
		}
		if err != nil {
			return nil, err
		}
		stream = append(stream, c.Data...)
	}
}

func readFile(fs vfs.FS, path string) ([]byte, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// syncFile makes the content of path durable.
func syncFile(fs vfs.FS, path string) error {
	f, err := fs.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// overwrite replaces the content of path.
func overwrite(t testing.TB, fs vfs.FS, path string, b []byte) {
	t.Helper()
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(slices.Clone(b)); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// state reads every image of s completely. It fails when one that is listed is
// not whole.
func state(s *Store) (map[string]content, error) {
	all := map[string]content{}
	for _, info := range s.List() {
		if err := s.Verify(info.ID); err != nil {
			return nil, fmt.Errorf("listed, but not whole: %w", err)
		}
		c, err := readImage(s, info.ID)
		if err != nil {
			return nil, fmt.Errorf("listed, but not readable: %w", err)
		}
		all[info.ID] = c
	}
	return all, nil
}

// sameState compares two results of state.
func sameState(a, b map[string]content) bool {
	return maps.EqualFunc(a, b, func(x, y content) bool { return maps.Equal(x, y) })
}

// leftovers returns the entries of the store's directory that are no image.
func leftovers(t testing.TB, s *Store) []string {
	t.Helper()
	names, err := s.fs.List(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, ".") })
}

// send copies the image of r to w from where w stands, at most max bytes at a
// time, until the end or until it has sent limit chunks (-1: no limit).
func send(r *Reader, w *Receiver, max, limit int) error {
	for ; limit != 0; limit-- {
		c, err := r.ReadChunk(w.Offset(), max)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := w.Write(c); err != nil {
			return err
		}
	}
	return nil
}

// receiveAll receives the whole image of r into s, resuming when s has a part.
func receiveAll(s *Store, r *Reader, max int) (Info, error) {
	w, err := s.Receive(r.Info().ID, r.Size())
	if err != nil {
		return Info{}, err
	}
	defer w.Close()
	if err := send(r, w, max, -1); err != nil {
		return Info{}, err
	}
	return w.Commit()
}
