package freeing

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hasty returns a Reaper that does not rest.
func hasty() *Reaper {
	r := New()
	r.restTimes = 0
	return r
}

// lazy returns a Reaper that rests until it is closed, once it has made a step.
func lazy() *Reaper {
	r := New()
	r.restTimes, r.maxRest = 1e9, time.Hour
	return r
}

// file makes a file of size bytes that are not zero.
func file(t *testing.T, dir, name string, size int) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, ok := spare(f); !ok || n < spareTimes*maxBytes {
		t.Skip("files of this file system, or on so full a disk, are removed as usual")
	}
	return path
}

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

// await waits until r has freed all but most bytes.
func await(t *testing.T, r *Reaper, most int64) {
	t.Helper()
	for give := time.Now().Add(30 * time.Second); r.Waiting() > most; {
		if time.Now().After(give) {
			t.Fatalf("%d bytes are not freed yet", r.Waiting())
		}
		<-time.After(time.Millisecond)
	}
}

// A removed file has no name at once, and its place on the disk is free by and by.
func TestRemove(t *testing.T) {
	r := hasty()
	defer r.Close()
	dir := t.TempDir()
	const size = 3*stepBytes + 5
	path := file(t, dir, "large", size)
	if err := r.Remove(path); err != nil {
		t.Fatal(err)
	}
	gone(t, path)
	await(t, r, 0)

	small := file(t, dir, "small", least-1)
	if err := r.Remove(small); err != nil {
		t.Fatal(err)
	}
	gone(t, small)
	if n := r.Waiting(); n != 0 {
		t.Errorf("%d bytes of a small file wait", n)
	}
	if err := r.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing it again: %v", err)
	}
	if err := r.Remove(dir); err != nil {
		t.Errorf("removing a directory, which is empty: %v", err)
	}
}

// It makes a step at a time, and Close leaves the rest to the system.
func TestSteps(t *testing.T) {
	r := lazy()
	defer r.Close()
	dir := t.TempDir()
	const size = 3*stepBytes + 5
	one, two := file(t, dir, "one", size), file(t, dir, "two", size)
	if err := r.FS(vfs.Default).RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	gone(t, one)
	gone(t, two)
	await(t, r, 2*size-stepBytes)
	if n := r.Waiting(); n != 2*size-stepBytes {
		t.Errorf("%d bytes wait after a step, not %d", n, 2*size-stepBytes)
	}
	r.Close()
	if n := r.Waiting(); n != 0 {
		t.Errorf("%d bytes wait after Close", n)
	}
}

// Who has a removed file open, or another name of it, keeps all of it.
func TestOthersKeepTheirFile(t *testing.T) {
	r := hasty()
	defer r.Close()
	dir := t.TempDir()
	const size = 2 * stepBytes
	want := bytes.Repeat([]byte{7}, size)

	path := file(t, dir, "open", size)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	linked, second := file(t, dir, "linked", size), filepath.Join(dir, "second")
	if err := os.Link(linked, second); err != nil {
		t.Fatal(err)
	}
	mapped := file(t, dir, "mapped", size)
	m, err := os.Open(mapped)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := unix.Mmap(int(m.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	m.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(raw) }()

	for _, p := range []string{path, linked, mapped} {
		if err := r.Remove(p); err != nil {
			t.Fatal(err)
		}
		gone(t, p)
	}
	await(t, r, 0)
	if got, err := io.ReadAll(f); err != nil || !bytes.Equal(got, want) {
		t.Errorf("who had it open reads %d bytes, the right ones: %v, %v", len(got), bytes.Equal(got, want), err)
	}
	if got, err := os.ReadFile(second); err != nil || !bytes.Equal(got, want) {
		t.Errorf("its second name has %d bytes, the right ones: %v, %v", len(got), bytes.Equal(got, want), err)
	}
	if !bytes.Equal(raw, want) {
		t.Error("who had it mapped reads something else now")
	}
}

// A name that was given to a file while its first one was removed keeps it, too.
func TestLinkedMeanwhile(t *testing.T) {
	r := hasty()
	defer r.Close()
	dir := t.TempDir()
	path, second := file(t, dir, "first", 2*stepBytes), filepath.Join(dir, "second")
	err := r.remove([]string{path}, func() error { return errors.Join(os.Link(path, second), os.Remove(path)) })
	if err != nil {
		t.Fatal(err)
	}
	await(t, r, 0)
	if st, err := os.Stat(second); err != nil || st.Size() != 2*stepBytes {
		t.Fatalf("%v, %v", st, err)
	}
}

// A removal that fails leaves the file as it was.
func TestFailedRemoval(t *testing.T) {
	r := hasty()
	defer r.Close()
	path := file(t, t.TempDir(), "kept", 2*stepBytes)
	broken := errors.New("broken")
	if err := r.remove([]string{path}, func() error { return broken }); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if n := r.Waiting(); n != 0 {
		t.Errorf("%d bytes wait", n)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 2*stepBytes {
		t.Fatalf("%v, %v", st, err)
	}
}

// A link to a file that is removed is no file to be cut.
func TestSymbolicLink(t *testing.T) {
	r := hasty()
	defer r.Close()
	dir := t.TempDir()
	path, link := file(t, dir, "file", 2*stepBytes), filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(link); err != nil {
		t.Fatal(err)
	}
	gone(t, link)
	await(t, r, 0)
	if st, err := os.Stat(path); err != nil || st.Size() != 2*stepBytes {
		t.Fatalf("%v, %v", st, err)
	}
}

// Of a directory all files go, and of a database those that it has no use for.
func TestFS(t *testing.T) {
	r := hasty()
	defer r.Close()
	fsys := r.FS(vfs.Default)
	if vfs.Root(fsys) != vfs.Default {
		t.Error("the file system below is hidden")
	}
	root := t.TempDir()
	dir := filepath.Join(root, "state", "db")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	file(t, dir, "a", 2*stepBytes)
	file(t, dir, "b", 2*stepBytes)
	file(t, filepath.Dir(dir), "c", 10)
	if err := fsys.RemoveAll(filepath.Dir(dir)); err != nil {
		t.Fatal(err)
	}
	gone(t, filepath.Dir(dir))
	if err := fsys.RemoveAll(filepath.Dir(dir)); err != nil {
		t.Errorf("removing what is gone: %v", err)
	}
	one := file(t, root, "one", 2*stepBytes)
	if err := fsys.Remove(one); err != nil {
		t.Fatal(err)
	}
	gone(t, one)
	if err := fsys.Remove(one); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing it again: %v", err)
	}
	await(t, r, 0)
}

// The bounds hold, and what is beyond them is removed as usual.
func TestBounds(t *testing.T) {
	r := lazy()
	dir := t.TempDir()
	for range maxFiles + 10 {
		if err := r.Remove(file(t, dir, "f", least)); err != nil {
			t.Fatal(err)
		}
	}
	r.mu.Lock()
	files := r.files
	r.mu.Unlock()
	if files > maxFiles {
		t.Errorf("%d files are open", files)
	}
	// A sparse one: no disk is needed for it.
	huge := filepath.Join(dir, "huge")
	if err := os.WriteFile(huge, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(huge, maxBytes+1); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(huge); err != nil {
		t.Fatal(err)
	}
	gone(t, huge)
	if n := r.Waiting(); n > maxBytes {
		t.Errorf("%d bytes wait", n)
	}
	r.Close()
	if n := r.Waiting(); n != 0 || r.files != 0 {
		t.Errorf("%d bytes of %d files wait after Close", n, r.files)
	}
	late := file(t, dir, "late", 2*stepBytes)
	if err := r.Remove(late); err != nil {
		t.Fatal(err)
	}
	gone(t, late)
	if n := r.Waiting(); n != 0 {
		t.Errorf("%d bytes wait of what was removed after Close", n)
	}
	r.Close()
}
