package router

import (
	"errors"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// Entry is one committed log entry: the commands packed into it. Commands are
// only read during Apply.
type Entry struct {
	Index, Term uint64
	Commands    [][]byte
	// Local is set when somebody on this node waits for the results.
	Local bool
}

// FSM is the replicated state: a pure function of the command log. It never
// reads clocks, randomness, environment or network. Apply, ApplyMembership and
// Install are for one goroutine; everything else is safe at any time.
type FSM struct {
	fs   vfs.FS
	root string
	o    Options
	hub  *Hub

	// applyMu is held by whatever changes the state. It guards the fields down
	// to broken.
	applyMu  sync.Mutex
	handlers map[reflect.Type]handler
	clock    *commandpb.Clock // of the newest applied entry
	hot      *hotCache
	marks    *markIndex
	overlay  map[string]*cell
	broken   error // set by a failed Apply: memory and disk may differ

	// records serves the reads of Latest.
	records *recordCache

	// mu guards cur, pos and closed. It is never held during IO.
	mu     sync.RWMutex
	cur    *database
	pos    Position
	closed bool

	revision, epoch, base atomic.Uint64

	// settle does what Install put off until the node has caught up; nil when it
	// was never called. It may be called more than once, by whoever holds applyMu
	// and by Options.Installed.
	settle func()
	// retiring counts replaced databases that are being closed.
	retiring sync.WaitGroup

	sums  sumHistory
	stage staging
	undo  atomic.Pointer[UndoPoint]

	// awaited are views of indexes to come; guarded by applyMu. hashing is held
	// while the whole state is hashed.
	awaited []*awaitedView
	hashing sync.Mutex
}

// Open opens the state in dir, or begins one at o.Bootstrap, durably, when
// there is none. It removes what an interrupted Open or Install left behind.
func Open(f vfs.FS, dir string, o Options) (*FSM, error) {
	o = o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if err := makeDir(f, dir); err != nil {
		return nil, fmt.Errorf("router: create %s: %w", dir, err)
	}
	name, err := readMarker(f, dir)
	if err != nil {
		return nil, fmt.Errorf("router: %w", err)
	}
	if name == "" {
		if name, err = createFirst(f, dir, o); err != nil {
			return nil, err
		}
	}
	d, err := openDatabase(f, f.PathJoin(dir, name), name, o, false)
	if err != nil {
		return nil, err
	}
	s := &FSM{
		fs: f, root: dir, o: o, handlers: commandTable(), overlay: map[string]*cell{},
		records: newRecordCache(o.RecordBytes),
	}
	if err := s.adopt(d); err != nil {
		return nil, errors.Join(err, d.release())
	}
	s.hub = newHub(o.HistoryBytes, s.revision.Load())
	// CURRENT may be visible without being durable, if a process (not the
	// power) died before it synced the directory.
	if err := errors.Join(syncDir(f, dir), sweep(f, dir, name)); err != nil {
		return nil, errors.Join(fmt.Errorf("router: remove leftovers in %s: %w", dir, err), d.release())
	}
	s.findUndo()
	// A crash may have come between the entry of a restore and its effect.
	if _, err := s.performSwap(); err != nil {
		return nil, errors.Join(fmt.Errorf("router: finish the restore in %s: %w", dir, err), s.cur.release())
	}
	return s, nil
}

// createFirst makes the first database and returns its name.
func createFirst(f vfs.FS, root string, o Options) (string, error) {
	left, err := databases(f, root)
	if err != nil {
		return "", fmt.Errorf("router: list %s: %w", root, err)
	}
	// A start that was cut short may be made again; a state whose CURRENT got
	// lost must not be taken for one, or acknowledged commits are forgotten.
	// Looking into the database does not tell them apart: half a creation is
	// as unreadable as damage.
	creating := f.PathJoin(root, creatingName)
	if _, err := f.Stat(creating); err != nil && len(left) > 0 {
		return "", fmt.Errorf("%w (found %s)", ErrLostMarker, f.PathJoin(root, dbName(left[len(left)-1])))
	}
	for _, n := range left {
		path := f.PathJoin(root, dbName(n))
		if err := f.RemoveAll(path); err != nil {
			return "", fmt.Errorf("router: remove %s, left by an interrupted first start: %w", path, err)
		}
	}
	// The directories must be durable before anything in them counts; an
	// earlier start may have died between making root and syncing its parent.
	err = errors.Join(syncDir(f, f.PathDir(root)), writeFile(f, creating, nil), syncDir(f, root))
	if err != nil {
		return "", fmt.Errorf("router: begin a state in %s: %w", root, err)
	}
	name := dbName(1)
	path := f.PathJoin(root, name)
	d, err := openDatabase(f, path, name, o, true)
	if err != nil {
		return "", err
	}
	b := d.db.NewBatch()
	if err = putHead(b, o.Bootstrap, newClock()); err == nil {
		err = b.Commit(pebble.NoSync)
	}
	if err == nil {
		err = d.flush()
	}
	if err = errors.Join(err, d.release()); err == nil {
		// The directory must be durable before CURRENT names it.
		err = syncDir(f, root)
	}
	if err == nil {
		err = writeMarker(f, root, name)
	}
	if err != nil {
		return "", fmt.Errorf("router: create the state in %s: %w", path, err)
	}
	return name, nil
}

// sweep removes databases other than the one in use and the traces of what was
// not finished. CURRENT is durable when it is called.
func sweep(f vfs.FS, root, name string) error {
	all, err := databases(f, root)
	if err != nil {
		return err
	}
	for _, n := range all {
		if other := dbName(n); other != name {
			if err := f.RemoveAll(f.PathJoin(root, other)); err != nil {
				return err
			}
		}
	}
	_ = f.Remove(f.PathJoin(root, markerName+".tmp"))
	creating := f.PathJoin(root, creatingName)
	if _, err := f.Stat(creating); err != nil {
		return nil
	}
	// Durably gone: together with a CURRENT lost later it would allow a fresh
	// start over this state.
	return errors.Join(f.Remove(creating), syncDir(f, root))
}

// adopt makes d the current database. It is for Open and Install.
func (s *FSM) adopt(d *database) error {
	pos, err := readPosition(d.db)
	if err != nil {
		return err
	}
	clock, err := readClock(d.db)
	if err == nil {
		err = fitSums(d.db, clock)
	}
	if err != nil {
		return err
	}
	s.clock = clock
	s.hot = newHotCache(s.o.HotBytes)
	s.marks = newMarkIndex()
	clear(s.overlay) // what a failed run left is of the old state
	s.records.blockAll()
	defer s.records.unblock()
	s.publishClock(clock)
	encoded, err := clock.MarshalVT()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.cur, s.pos = d, pos
	s.sums.now(pos.Index, clock, encoded)
	s.mu.Unlock()
	s.stage.moved.ring() // what is staged in another database concerns nobody now
	s.serveAwaited()
	return nil
}

// publishClock lets readers see the numbers of the newest state.
func (s *FSM) publishClock(c *commandpb.Clock) {
	s.epoch.Store(c.Epoch)
	s.base.Store(c.RevisionBase)
	s.revision.Store(c.Revision)
}

func readClock(r pebble.Reader) (*commandpb.Clock, error) {
	v, err := getCopy(r, key(nil).meta(metaClock))
	if err != nil {
		return nil, err
	}
	c := &commandpb.Clock{}
	if v == nil {
		return nil, fmt.Errorf("%w: it has no clock record", ErrCorrupt)
	}
	if err := c.UnmarshalVT(v); err != nil {
		return nil, fmt.Errorf("%w: clock record: %w", ErrCorrupt, err)
	}
	for len(c.Counts) < int(countKinds) {
		c.Counts = append(c.Counts, 0)
	}
	return c, nil
}

// acquire returns the current database with one more reference.
func (s *FSM) acquire() (*database, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	s.cur.refs.Add(1)
	return s.cur, nil
}

// Applied returns the position of the newest applied entry.
func (s *FSM) Applied() Position {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pos.clone()
}

// Revision returns the revision of the newest applied command that changed the
// state: its log index plus RevisionBase.
func (s *FSM) Revision() uint64 { return s.revision.Load() }

// Epoch returns how often the state was replaced by a backup.
func (s *FSM) Epoch() uint64 { return s.epoch.Load() }

// RevisionBase returns what is added to a log index to get a revision. It is 0
// until a backup of a further log is restored, and never gets less.
func (s *FSM) RevisionBase() uint64 { return s.base.Load() }

// Hub returns the change feed. It stays the same across Install.
func (s *FSM) Hub() *Hub { return s.hub }

// Durable returns the index up to which the state survives power loss. It is
// cheap: Pebble is asked only after a flush.
func (s *FSM) Durable() uint64 {
	d, err := s.acquire()
	if err != nil {
		return 0
	}
	defer d.release()
	i, err := d.durableIndex()
	if err != nil {
		s.o.Logger.Error("state: durable index cannot be read, the log is kept", "error", err)
	}
	return i
}

// Flush makes durable what is applied now and returns the new Durable index.
// It blocks on the disk; Apply may go on, and goes first: while it is called often, Flush
// takes some times as long. On a full disk it fails with ErrNoSpace and may be tried again.
func (s *FSM) Flush() (uint64, error) {
	d, err := s.acquire()
	if err != nil {
		return 0, err
	}
	defer d.release()
	applied := s.Applied().Index
	if i, err := d.durableIndex(); err == nil && i >= applied {
		return i, nil
	}
	if err := d.flushAtEase(); err != nil {
		return d.durable.Load(), err
	}
	return d.durableIndex()
}

// Written returns how many bytes of commands' changes were written since the state was
// opened, and about how many of them since what was flushed last: those that are written
// while a flush goes on count, those it flushes do not. Another state that takes the place
// of this one begins anew. It is cheap.
func (s *FSM) Written() (all, unflushed int64) {
	d, err := s.acquire()
	if err != nil {
		return 0, 0
	}
	defer func() { _ = d.release() }() // not the last reference, or an old database
	return int64(d.pace.written.Load()), d.pace.unflushed()
}

// Close flushes and closes the state. Open views stay readable; the files are
// released when the last of them is closed. After a failed flush the log still
// holds what is missing.
func (s *FSM) Close() error {
	s.applyMu.Lock()
	defer s.applyMu.Unlock()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	d := s.cur
	s.mu.Unlock()
	s.hub.close()
	err := errors.Join(d.flush(), d.release())
	if s.settle != nil {
		s.settle()
	}
	s.retiring.Wait()
	return err
}
