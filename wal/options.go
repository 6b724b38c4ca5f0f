package wal

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
)

// DefaultSegmentBytes is the size of a segment file unless Options say otherwise.
// A new log writes two of them in full before it is there (see spares).
const DefaultSegmentBytes = 16 << 20

// Points at which Options.FailPoint is called. What is on disk at "written but
// not synced" needs no point of its own: it is any mixture of the bytes before
// PointAppendBefore and at PointAppendSynced.
const (
	PointAppendBefore   = "append:before"    // nothing of the Append is written
	PointAppendSynced   = "append:synced"    // written, synced if asked, not yet readable
	PointInstallBefore  = "install:before"   // nothing of the InstallSnapshot is written
	PointInstallRecord  = "install:record"   // start record durable, hard state not written
	PointInstallSynced  = "install:synced"   // both durable, tail not yet reset
	PointCompactBefore  = "compact:before"   // nothing of the Compact is written
	PointCompactState   = "compact:state"    // hard state written, start record not
	PointCompactRecord  = "compact:record"   // start record durable, tail not yet cut
	PointSegmentRemove  = "segment:remove"   // before each removal of an old segment
	PointSegmentRemoved = "segment:removed"  // after each removal, directory not yet synced
	PointCreateStaged   = "create:staged"    // new log complete under its temporary name
	PointCreateRenamed  = "create:renamed"   // new log in place, parent directory not yet synced
	PointRepairBefore   = "repair:before"    // unfinished tail found, not yet cut
	PointRepairCut      = "repair:truncated" // tail cut, file not yet synced
)

// SyncInfo describes one durable write of the log.
type SyncInfo struct {
	// Duration covers writing the records and the fsync that followed.
	Duration time.Duration
	// Entries and Bytes (of entry payload) were made durable by this write.
	Entries int
	Bytes   int64
}

// Options configure a Log.
type Options struct {
	// Logger receives warnings of the log and, at debug level, its routine
	// events. Nil is silent.
	Logger *slog.Logger
	// SegmentBytes is the size at which a segment file ends; a segment exceeds
	// it by at most one Append. The size is kept by the underlying package for
	// the whole process: all Logs open at the same time must agree, Open
	// refuses otherwise.
	SegmentBytes int64
	// Sync is called after each durable write by the goroutine that wrote. It
	// must not block and not call the Log.
	Sync func(SyncInfo)
	// Remove removes the file at path, an old segment. It may leave the freeing of what
	// that took of the disk for later. Default: os.Remove.
	Remove func(path string) error
	// FailPoint is called with one of the Point constants; a returned error
	// fails the Log as a failed write would. Nil in production; tests use it to
	// stop the node at chosen points, or to copy the directory there.
	FailPoint func(point string) error
}

// EnsureDefaults fills unset fields.
func (o *Options) EnsureDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.SegmentBytes == 0 {
		o.SegmentBytes = DefaultSegmentBytes
	}
	if o.Sync == nil {
		o.Sync = func(SyncInfo) {}
	}
	if o.Remove == nil {
		o.Remove = os.Remove
	}
	if o.FailPoint == nil {
		o.FailPoint = func(string) error { return nil }
	}
}

// Validate reports every option that cannot work.
func (o *Options) Validate() error {
	var errs []error
	if o.SegmentBytes < 4<<10 || o.SegmentBytes > 4<<30 {
		errs = append(errs, fmt.Errorf("wal: SegmentBytes %d is outside 4 KiB to 4 GiB", o.SegmentBytes))
	}
	return errors.Join(errs...)
}

// segmentSize guards etcdwal.SegmentSizeBytes, a variable of the underlying
// package that every write reads. Assigning it while another Log is open is a
// data race and changes that Log's segments too; so it changes only while no
// Log is open in this process.
var segmentSize struct {
	sync.Mutex
	users int
}

func acquireSegmentSize(n int64) error {
	segmentSize.Lock()
	defer segmentSize.Unlock()
	if segmentSize.users > 0 && etcdwal.SegmentSizeBytes != n {
		return fmt.Errorf("wal: SegmentBytes %d differs from the %d of a log already open in this process; all must agree", n, etcdwal.SegmentSizeBytes)
	}
	if segmentSize.users == 0 {
		etcdwal.SegmentSizeBytes = n
	}
	segmentSize.users++
	return nil
}

func releaseSegmentSize() {
	segmentSize.Lock()
	segmentSize.users--
	segmentSize.Unlock()
}
