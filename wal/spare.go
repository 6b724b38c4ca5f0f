package wal

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A segment that is only reserved (fallocate) costs a transaction of the file
// system's journal at every sync, which notes that more of its blocks hold data
// now. In one that was written with zeros before, a sync writes the data and
// nothing else: a third less time, and a tenth more commits a second. The
// underlying package reserves; but it takes a file that lies under the name of
// its next segment, 0.tmp and 1.tmp in turn, as it is. So spares puts written
// files there. The price is that the log is written twice, once as zeros.

// pipelineNames are the names under which the underlying package prepares the
// segments to come, in turn, beginning with the first at each start.
var pipelineNames = [...]string{"0.tmp", "1.tmp"}

// spareName is a file of zeros that is not complete yet. The ending keeps the
// underlying package from warning of it.
const spareName = "spare.tmp"

// A spare is written at 25 MB/s at most, several times what a log grows by, so
// that it never fills the disk's queue in front of the log's own syncs.
const (
	spareChunk = 256 << 10
	sparePause = 10 * time.Millisecond
)

// spares keeps one written segment ahead of a log that grows. It never touches a
// file the log may write to: a spare is complete and synced before it gets the
// name, and it gets it only when nothing lies there.
type spares struct {
	dir  string
	size int64
	lg   *slog.Logger

	grown atomic.Int64 // bytes appended since the last look
	wake  chan struct{}
	stop  chan struct{}
	done  chan struct{}
}

func startSpares(dir string, size int64, lg *slog.Logger) *spares {
	s := &spares{dir: dir, size: size, lg: lg, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go s.run()
	return s
}

// appended notes that the log grew by n bytes. It does not block.
func (s *spares) appended(n int64) {
	// A log that hardly grows needs no spare; several looks a segment find the
	// name free in time.
	if s.grown.Add(n) < s.size/8 {
		return
	}
	s.grown.Store(0)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// close ends the work and waits for it, at most as long as one chunk takes to
// write. What lies ready stays for the next start.
func (s *spares) close() {
	close(s.stop)
	<-s.done
}

func (s *spares) run() {
	defer close(s.done)
	for {
		select {
		case <-s.stop:
			return
		case <-s.wake:
		}
		// The log works without: it reserves its segments itself.
		if err := s.provide(); err != nil && !errors.Is(err, errStopped) {
			s.lg.Debug("no written segment could be prepared", "dir", s.dir, "error", err)
			if errors.Is(err, errUnsupported) {
				return
			}
		}
	}
}

var (
	errStopped     = errors.New("wal: stopped")
	errUnsupported = errors.New("wal: this file system cannot rename a file without replacing another")
)

// provide puts a spare under the one of the names that is free. Both are taken
// when nothing was used since the last time, and for the moment in which the
// underlying package has begun a segment that it has not renamed yet.
func (s *spares) provide() error {
	name, err := s.free()
	if name == "" || err != nil {
		return err
	}
	if err := writeZeros(filepath.Join(s.dir, spareName), s.size, s.pause); err != nil {
		return err
	}
	for {
		// Without replacing: the underlying package may have made the file itself
		// meanwhile, and then it is about to write a segment into it.
		err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(s.dir, spareName), unix.AT_FDCWD, filepath.Join(s.dir, name), unix.RENAME_NOREPLACE)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EEXIST) {
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) {
				// Some file systems cannot rename so. Without, there is no safe way, and
				// each attempt would write a whole segment for nothing.
				err = fmt.Errorf("%w: %w", errUnsupported, err)
			}
			return errors.Join(err, os.Remove(filepath.Join(s.dir, spareName)))
		}
		if name, err = s.free(); name == "" || err != nil {
			return errors.Join(err, os.Remove(filepath.Join(s.dir, spareName)))
		}
	}
}

func (s *spares) free() (string, error) {
	for _, name := range pipelineNames {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); errors.Is(err, os.ErrNotExist) {
			return name, nil
		} else if err != nil {
			return "", err
		}
	}
	return "", nil
}

func (s *spares) pause() error {
	select {
	case <-s.stop:
		return errStopped
	case <-time.After(sparePause):
		return nil
	}
}

// writeZeros makes a file of size zeros, synced, and removes it when it fails.
// pause, which may be nil, is called between chunks.
func writeZeros(path string, size int64, pause func() error) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			os.Remove(path)
		}
	}()
	return fillZeros(f, 0, size, pause)
}

// fillZeros writes zeros into f from one offset to another and syncs each chunk:
// a whole segment at once would hold up the syncs of the log.
func fillZeros(f *os.File, from, to int64, pause func() error) error {
	zeros := make([]byte, spareChunk)
	for from < to {
		n, err := f.WriteAt(zeros[:min(spareChunk, to-from)], from)
		if err != nil {
			return err
		}
		from += int64(n)
		if pause == nil {
			continue
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return err
		}
		if err := pause(); err != nil {
			return err
		}
	}
	return f.Sync()
}

// prefill makes the two segments a new log begins with written ones. dir holds
// one segment, and nobody has it open.
func prefill(dir string, size int64) error {
	segs, err := listSegments(dir)
	if err != nil {
		return err
	}
	path := segs[0].path
	end, err := endOfData(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(fillZeros(f, end, size, nil), f.Close()); err != nil {
		return err
	}
	return writeZeros(filepath.Join(dir, pipelineNames[0]), size, nil)
}

// endOfData returns where the last byte that is not zero ends. It holds little in
// memory: a node that has nothing to do would keep what a whole segment takes.
func endOfData(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var end, at int64
	for buf := make([]byte, 64<<10); ; {
		n, err := f.Read(buf)
		for k := n; k > 0; k-- {
			if buf[k-1] != 0 {
				end = at + int64(k)
				break
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) {
			return end, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// removeLeftovers removes what a crash left of segments to come, unless it can be
// used: the underlying package writes the head of its next segment into what it
// finds, and what it does not overwrite would be read as a record.
func removeLeftovers(dir string, size int64) error {
	if err := os.Remove(filepath.Join(dir, spareName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("wal: remove a leftover: %w", err)
	}
	for _, name := range pipelineNames {
		path := filepath.Join(dir, name)
		usable, err := isBlank(path, size)
		if err == nil && !usable {
			err = os.Remove(path)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("wal: remove a leftover: %w", err)
		}
	}
	return nil
}

// isBlank reports whether the file can be taken for a segment nothing was
// written to. The head of a segment is all that is ever written before it gets
// its own name, and fits the first page.
func isBlank(path string, size int64) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() != size {
		return false, err
	}
	head := make([]byte, min(64<<10, size))
	if _, err := io.ReadFull(f, head); err != nil {
		return false, err
	}
	for _, b := range head {
		if b != 0 {
			return false, nil
		}
	}
	return true, nil
}
