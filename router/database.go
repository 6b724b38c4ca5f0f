package router

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// stateFormat is the version of the key layout. A release refuses a state with
// a higher one. 2 keeps the membership apart from the position, which is written
// with every batch: a group that has had many members would pay for all of them
// each time. 3 has the table of handovers, without which a stage could get two
// owners.
const stateFormat = 3

// Position says which prefix of the log a state reflects and the group's
// configuration there. ConfState and Members are kept for the caller as they
// are.
type Position struct {
	Index, Term uint64
	ConfState   []byte
	Members     []byte
}

func (p Position) clone() Position {
	p.ConfState, p.Members = bytes.Clone(p.ConfState), bytes.Clone(p.Members)
	return p
}

func (p Position) append(b []byte) []byte {
	b = binary.AppendUvarint(b, p.Index)
	b = binary.AppendUvarint(b, p.Term)
	b = binary.AppendUvarint(b, uint64(len(p.ConfState)))
	b = append(b, p.ConfState...)
	b = binary.AppendUvarint(b, uint64(len(p.Members)))
	return append(b, p.Members...)
}

func decodePosition(b []byte) (p Position, err error) {
	number := func() (v uint64) {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			err = fmt.Errorf("%w: the applied position cannot be decoded", ErrCorrupt)
			b = nil
			return 0
		}
		b = b[n:]
		return v
	}
	blob := func() []byte {
		n := number()
		if n > uint64(len(b)) {
			err = fmt.Errorf("%w: the applied position cannot be decoded", ErrCorrupt)
			return nil
		}
		v := bytes.Clone(b[:n])
		b = b[n:]
		return v
	}
	p.Index, p.Term = number(), number()
	p.ConfState, p.Members = blob(), blob()
	return p, err
}

// database is one open Pebble directory. Views keep it open after an image has
// replaced it; the last one closes and removes it.
type database struct {
	db *pebble.DB
	// current: this release has written here, so that the membership is kept apart from
	// the position, and the number of the format says so. Of Apply.
	current bool
	fs      vfs.FS
	dir     string
	name    string // of dir below the root
	log     *slog.Logger

	refs     atomic.Int64
	obsolete atomic.Bool

	// held schedules the compactions, and pace is that of flushes and compactions;
	// nil for what is only read.
	held *heldCompactions
	pace *background

	// stale is set after each flush; the next Durable looks again.
	stale   atomic.Bool
	durable atomic.Uint64

	// ckptMemo is of this database: another one may have other checkpoints at the
	// same revision.
	ckptMemo atomic.Pointer[checkpointCount]

	// mu guards failure and trouble.
	mu      sync.Mutex
	failure error         // permanent
	trouble chan struct{} // closed and replaced at each background error
	last    error         // of the newest background error
}

// pebbleLogger passes Pebble's messages on.
type pebbleLogger struct{ log *slog.Logger }

func (l pebbleLogger) Infof(format string, args ...any) {
	l.log.Debug("pebble", "message", fmt.Sprintf(format, args...))
}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.log.Error("pebble", "message", fmt.Sprintf(format, args...))
}

// Fatalf is called when Pebble cannot write its manifest. It must not return:
// what is on disk is unknown from there on.
func (l pebbleLogger) Fatalf(format string, args ...any) {
	m := fmt.Sprintf(format, args...)
	l.log.Error("pebble: giving up", "message", m)
	panic("router: pebble: " + m)
}

// openDatabase opens dir, creating it when create is set.
func openDatabase(fs vfs.FS, dir, name string, o Options, create bool) (*database, error) {
	d, release, err := openHeld(fs, dir, name, o, create)
	if err != nil {
		return nil, err
	}
	release()
	return d, nil
}

// openHeld is openDatabase, but no compaction begins before release is called.
func openHeld(fs vfs.FS, dir, name string, o Options, create bool) (_ *database, release func(), err error) {
	d := &database{fs: fs, dir: dir, name: name, log: o.Logger, trouble: make(chan struct{})}
	d.refs.Store(1)
	d.stale.Store(true)
	// Pebble takes its memtables out of the cache: without room for the one that
	// is written and the one that is flushed, every read would find the indexes
	// and filters of the tables thrown out, and read them from disk again.
	cache := pebble.NewCache(o.CacheBytes + 2*o.MemTableBytes)
	defer cache.Unref()
	d.held, release = holdCompactions()
	d.pace = newBackground(o.MemTableBytes, d.held.holding)
	po := pebbleOptions(d.pace.files(&largeWritesFS{fs}), o, cache)
	po.ErrorIfNotExists = !create
	po.ErrorIfExists = create
	po.EventListener = &pebble.EventListener{
		// Called with Pebble's lock held: only leave a note.
		FlushBegin: func(pebble.FlushInfo) { d.pace.flushBegan() },
		FlushEnd: func(i pebble.FlushInfo) {
			d.stale.Store(true)
			d.held.flushed()
			d.pace.flushEnded(i.Err)
		},
		BackgroundError: func(err error) {
			if !errors.Is(err, pebble.ErrCancelledCompaction) {
				d.report(err)
			}
		},
		// Without this, Pebble calls Fatalf: a damaged block would end the
		// process with a stack trace, tools included.
		DataCorruption: func(i pebble.DataCorruptionInfo) {
			d.report(fmt.Errorf("%w: %s: %w", ErrCorrupt, i.Path, i.Details))
		},
	}
	po.Experimental.CompactionScheduler = d.held
	pdb, err := pebble.Open(dir, po)
	if err != nil {
		return nil, nil, fmt.Errorf("router: open state in %s: %w", dir, formatError(err))
	}
	d.db = pdb
	d.pace.opened(pdb)
	if create {
		return d, release, nil
	}
	if err := checkFormat(pdb); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("router: state in %s: %w", dir, err), pdb.Close())
	}
	v, err := getCopy(pdb, key(nil).meta(metaFormat))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("router: state in %s: %w", dir, err), pdb.Close())
	}
	d.current = bytes.Equal(v, formatNumber())
	return d, release, nil
}

// l0CompactionThreshold is how high L0 grows before it is compacted.
const l0CompactionThreshold = 8

// separateBytes is how large a value must be to get a place of its own.
const separateBytes = 64 << 10

func pebbleOptions(fs vfs.FS, o Options, cache *pebble.Cache) *pebble.Options {
	po := &pebble.Options{
		FS:                          fs,
		Cache:                       cache,
		Logger:                      pebbleLogger{o.Logger},
		DisableWAL:                  true,
		FormatMajorVersion:          pebble.FormatNewest,
		MemTableSize:                uint64(o.MemTableBytes),
		MemTableStopWritesThreshold: 4,
		// A compaction out of L0 rewrites most of the state, whose keys are spread
		// over all of it. Point reads look into filters first, so that some more
		// tables cost them little.
		L0CompactionThreshold: l0CompactionThreshold,
		L0StopWritesThreshold: 24,
		MaxOpenFiles:          512,
		// An image links, and who opens it opens, each table: with Pebble's 2 MiB
		// at the top a snapshot of a gigabyte is some hundred of both.
		TargetFileSizes: [7]int64{8 << 20, 8 << 20, 16 << 20, 32 << 20, 64 << 20, 64 << 20, 64 << 20},
		// What reads the damaged block gets the error.
		EventListener: &pebble.EventListener{DataCorruption: func(i pebble.DataCorruptionInfo) {
			o.Logger.Error("state: a file is damaged", "file", i.Path, "error", i.Details)
		}},
	}
	// The chunks of a restore, which are a megabyte each, stay out of compactions:
	// those would write each of them three or four times before it is used once.
	po.Experimental.ValueSeparationPolicy = func() pebble.ValueSeparationPolicy {
		return pebble.ValueSeparationPolicy{
			Enabled: true, MinimumSize: separateBytes, MaxBlobReferenceDepth: 10,
			RewriteMinimumAge: time.Minute, TargetGarbageRatio: 0.5,
		}
	}
	// Large values are chunks for the most part, and compressed already.
	profile := *sstable.SnappyCompression
	profile.ValueBlocks = sstable.NoCompression.ValueBlocks
	po.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.UniformDBCompressionSettings(&profile) })
	// Most reads ask whether a key exists, and for a new one the answer is no.
	for i := range po.Levels {
		po.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		po.Levels[i].BlockSize = 8 << 10
		// One index block a table: with Pebble's default every flushed table
		// gets a second index level, which a point read pays for each time.
		po.Levels[i].IndexBlockSize = 1 << 20
	}
	return po
}

// formatError recognises the refusal of a database written by a newer Pebble.
func formatError(err error) error {
	if err != nil && bytes.Contains([]byte(err.Error()), []byte("format major version")) {
		return fmt.Errorf("%w: %w", ErrNewerFormat, err)
	}
	return err
}

func formatNumber() []byte { return binary.BigEndian.AppendUint32(nil, stateFormat) }

func checkFormat(r pebble.Reader) error {
	v, err := getCopy(r, key(nil).meta(metaFormat))
	if err != nil {
		return err
	}
	if len(v) != 4 {
		return fmt.Errorf("%w: it has no format number", ErrCorrupt)
	}
	if f := binary.BigEndian.Uint32(v); f > stateFormat {
		return fmt.Errorf("%w: format %d, this release reads up to %d", ErrNewerFormat, f, stateFormat)
	}
	return nil
}

// getCopy returns a copy of k's value, nil when it is absent.
func getCopy(r pebble.Reader, k []byte) ([]byte, error) {
	v, closer, err := r.Get(k)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Not nil even when empty: nil means absent.
	out := append(make([]byte, 0, len(v)), v...)
	return out, closer.Close()
}

// readApplied reads the position without the membership there, unless a release
// that kept the two together has written it.
func readApplied(r pebble.Reader) (Position, error) {
	v, err := getCopy(r, key(nil).meta(metaPosition))
	if err != nil {
		return Position{}, err
	}
	if v == nil {
		return Position{}, fmt.Errorf("%w: it holds no applied position", ErrCorrupt)
	}
	return decodePosition(v)
}

// readPosition reads the position and the membership there.
func readPosition(r pebble.Reader) (Position, error) {
	p, err := readApplied(r)
	if err != nil || len(p.ConfState)+len(p.Members) > 0 {
		return p, err
	}
	v, err := getCopy(r, key(nil).meta(metaMembership))
	if err != nil || v == nil {
		return p, err
	}
	m, err := decodePosition(v)
	p.ConfState, p.Members = m.ConfState, m.Members
	return p, err
}

// applied is what of p every batch writes.
func (p Position) applied() []byte { return Position{Index: p.Index, Term: p.Term}.append(nil) }

// membership is what of p a change of the membership writes. It does not say at
// which index that was: the position does.
func (p Position) membership() []byte {
	return Position{ConfState: p.ConfState, Members: p.Members}.append(nil)
}

func (d *database) report(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if vfs.IsNoSpaceError(err) {
		// Pebble tries again, with new files, for as long as it takes.
		err = fmt.Errorf("%w: %w", ErrNoSpace, err)
	} else if d.failure == nil {
		d.failure = fmt.Errorf("router: the state can no longer be written, this replica must stop: %w", err)
	}
	d.last = err
	d.log.Error("state: background write failed", "dir", d.dir, "error", err)
	close(d.trouble)
	d.trouble = make(chan struct{})
}

// failed returns the permanent failure, if any.
func (d *database) failed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failure
}

func (d *database) troubles() (<-chan struct{}, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.trouble, d.failure
}

func (d *database) lastError() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.last
}

// flush makes everything written so far durable, or says why not. Somebody waits for it.
func (d *database) flush() error {
	defer d.pace.flushes.Hurry()()
	return d.flushAtEase()
}

// flushAtEase is flush for who can wait: writes go first.
func (d *database) flushAtEase() error {
	trouble, err := d.troubles()
	if err != nil {
		return err
	}
	done, err := d.db.AsyncFlush()
	if err != nil {
		return err
	}
	// Pebble retries a failed flush for ever and never answers, so its
	// background errors have to be watched as well.
	select {
	case <-done:
		return d.failed()
	case <-trouble:
		return d.lastError()
	}
}

// durableIndex returns the index that survives power loss.
func (d *database) durableIndex() (uint64, error) {
	// Clear the mark before looking: a flush that ends meanwhile sets it again.
	if !d.stale.Swap(false) {
		return d.durable.Load(), nil
	}
	it, err := d.db.NewIter(&pebble.IterOptions{OnlyReadGuaranteedDurable: true})
	if err != nil {
		d.stale.Store(true)
		return d.durable.Load(), err
	}
	k := key(nil).meta(metaPosition)
	var p Position
	if it.SeekGE(k) && bytes.Equal(it.Key(), k) {
		v, verr := it.ValueAndErr()
		if verr == nil {
			p, verr = decodePosition(v)
		}
		err = verr
	}
	if err = errors.Join(err, it.Close()); err != nil {
		d.stale.Store(true)
		return d.durable.Load(), err
	}
	for {
		old := d.durable.Load()
		if p.Index <= old {
			return old, nil
		}
		if d.durable.CompareAndSwap(old, p.Index) {
			return p.Index, nil
		}
	}
}

// hold takes one more reference, unless the last one is gone.
func (d *database) hold() bool {
	for {
		n := d.refs.Load()
		if n <= 0 {
			return false
		}
		if d.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// release drops one reference; the last one closes the database and, when an
// image has replaced it, removes its directory.
func (d *database) release() error {
	if d.refs.Add(-1) != 0 {
		return nil
	}
	if d.held != nil { // an image that is only read has none
		d.held.end()
		d.pace.closing()
	}
	err := d.db.Close()
	if d.obsolete.Load() {
		// A leftover is harmless: Open sweeps what CURRENT does not name.
		if rerr := d.fs.RemoveAll(d.dir); rerr != nil {
			d.log.Warn("state: replaced database could not be removed", "dir", d.dir, "error", rerr)
		}
	}
	return err
}
