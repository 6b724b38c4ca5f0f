package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// tableBytes is about the size of the tables a new state is built from.
const tableBytes = 64 << 20

// staging is what this replica has built from the stage. It is no state: it
// follows from the staged chunks and is built again after a restart.
type staging struct {
	// mu is held while a new state is built or swapped in.
	mu    sync.Mutex
	ready *prepared
	// moved wakes a Prepare that waits for the next chunk.
	moved bell
	// numbers guards last, the number of the newest database directory.
	numbers sync.Mutex
	last    uint64
}

// prepared is a database that holds the content of a stage and nothing else.
type prepared struct {
	identity string // of what it was made from
	name     string
	sums     []uint64
}

// identityOf tells stages apart by all that decides what is built from them.
func identityOf(s *commandpb.RestoreStage) string {
	return fmt.Sprintf("%d/%d/%s", s.Chunks, s.Records, encodeSource(s.Source))
}

// nextName returns the name of a database directory that is not used yet.
func (s *FSM) nextName() (string, error) {
	s.stage.numbers.Lock()
	defer s.stage.numbers.Unlock()
	all, err := databases(s.fs, s.root)
	if err != nil {
		return "", err
	}
	s.mu.RLock()
	n, _ := parseDBName(s.cur.name)
	s.mu.RUnlock()
	if len(all) > 0 {
		n = max(n, all[len(all)-1])
	}
	s.stage.last = max(s.stage.last, n) + 1
	return dbName(s.stage.last), nil
}

// Prepare builds the new state of a restore beside the live one, so that the swap
// only has to switch over. It begins with the first chunk and waits for the next
// one until the restore is sealed: what is built while chunks come need not be
// waited for afterwards. It reads and writes as much as the backup holds, may run
// while entries are applied, and may be repeated: what is ready stays. It fails
// with ErrNotStaged, also when the restore is abandoned or the state replaced
// meanwhile, with ErrBadChunk, which it does on every replica alike, or with a
// fault of this replica, such as ErrNoSpace. The caller cancels ctx before Close.
func (s *FSM) Prepare(ctx context.Context, operationID string) error {
	s.stage.mu.Lock()
	defer s.stage.mu.Unlock()
	d, err := s.acquire()
	if err != nil {
		return err
	}
	defer d.release()
	rec, err := readStage(d.db, metaStage)
	if err != nil {
		return err
	}
	if rec == nil || rec.OperationId != operationID {
		return fmt.Errorf("%w (%s)", ErrNotStaged, operationID)
	}
	if _, err := s.build(ctx, d, rec); err != nil {
		return err
	}
	// It may have been abandoned meanwhile.
	now := s.Latest()
	if rec, err = now.Stage(); err == nil && (rec == nil || rec.OperationId != operationID) {
		s.stage.discard(s)
		err = fmt.Errorf("%w (%s)", ErrNotStaged, operationID)
	}
	return err
}

// follow returns the stage that rec was read from d, once it has more chunks
// than rec, or is sealed.
func (s *FSM) follow(ctx context.Context, d *database, rec *commandpb.RestoreStage) (*commandpb.RestoreStage, error) {
	for {
		moved := s.stage.moved.wait()
		s.mu.RLock()
		same := s.cur == d
		s.mu.RUnlock()
		next, err := readStage(d.db, metaStage)
		switch {
		case err != nil:
			return nil, err
		case !same || !sameStage(next, rec):
			return nil, fmt.Errorf("%w (%s)", ErrNotStaged, rec.OperationId)
		case next.Chunks > rec.Chunks || next.Phase == commandpb.StagePhase_STAGE_PHASE_SEALED:
			return next, nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// sameStage reports whether now, which may be nil, is what became of rec.
func sameStage(now, rec *commandpb.RestoreStage) bool {
	return now != nil && now.OperationId == rec.OperationId && now.BegunAtMs == rec.BegunAtMs && now.Chunks >= rec.Chunks
}

// bell wakes everybody who waits for it.
type bell struct {
	mu sync.Mutex
	ch chan struct{}
}

// wait returns a channel that is closed by the next ring.
func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

func readStage(r pebble.Reader, name string) (*commandpb.RestoreStage, error) {
	k := key(nil).meta(name)
	v, err := getCopy(r, k)
	if v == nil || err != nil {
		return nil, err
	}
	return decodeRecord[commandpb.RestoreStage](k, v)
}

// discard removes what was built. mu is held.
func (g *staging) discard(s *FSM) {
	if g.ready == nil {
		return
	}
	// A leftover is harmless: Open sweeps what CURRENT does not name.
	if err := s.fs.RemoveAll(s.fs.PathJoin(s.root, g.ready.name)); err != nil {
		s.o.Logger.Warn("state: a prepared state could not be removed", "dir", g.ready.name, "error", err)
	}
	g.ready = nil
}

// abandoned removes what was built from a stage that is gone. A Prepare that is
// running finds out by itself.
func (g *staging) abandoned(s *FSM) {
	if g.mu.TryLock() {
		defer g.mu.Unlock()
		g.discard(s)
	}
}

// outdated removes what was built from a stage that d, which has just come into
// force, does not hold. The same stage is kept: it has been reported as prepared.
// A Prepare that is running finds out by itself.
func (g *staging) outdated(s *FSM, d *database) {
	if !g.mu.TryLock() {
		return
	}
	defer g.mu.Unlock()
	if g.ready == nil {
		return
	}
	rec, err := readStage(d.db, metaStage)
	if err == nil && (rec == nil || identityOf(rec) != g.ready.identity) {
		g.discard(s)
	}
}

// build makes the database of a stage, unless it is there, and waits for chunks
// until the stage is sealed. s.stage.mu is held.
func (s *FSM) build(ctx context.Context, d *database, rec *commandpb.RestoreStage) (*prepared, error) {
	g := &s.stage
	if g.ready != nil && g.ready.identity == identityOf(rec) {
		return g.ready, nil
	}
	g.discard(s)
	name, err := s.nextName()
	if err != nil {
		return nil, fmt.Errorf("router: prepare a restore: %w", err)
	}
	path := s.fs.PathJoin(s.root, name)
	p := &prepared{name: name}
	if err := s.buildAt(ctx, d, rec, path, p); err != nil {
		_ = s.fs.RemoveAll(path)
		if vfs.IsNoSpaceError(err) {
			err = fmt.Errorf("%w: %w", ErrNoSpace, err)
		}
		return nil, fmt.Errorf("router: prepare restore %s: %w", rec.OperationId, err)
	}
	g.ready = p
	return p, nil
}

func (s *FSM) buildAt(ctx context.Context, d *database, rec *commandpb.RestoreStage, path string, p *prepared) error {
	n, err := openDatabase(s.fs, path, p.name, s.o, true)
	if err != nil {
		return err
	}
	w := &tableWriter{fs: s.fs, dir: path, format: n.db.FormatMajorVersion().MaxTableFormat()}
	cache := pebble.NewCache(1 << 20)
	defer cache.Unref()
	w.options = pebbleOptions(s.fs, s.o, cache)
	w.options.EnsureDefaults()
	err = s.readStaged(ctx, d, rec, p, w.add)
	err = errors.Join(err, w.close())
	if err == nil && len(w.paths) > 0 {
		err = n.db.Ingest(ctx, w.paths)
	}
	if err == nil {
		err = n.db.Set(key(nil).meta(metaFormat), formatNumber(), pebble.NoSync)
	}
	if err == nil {
		err = n.flush()
	}
	if err = errors.Join(err, n.release()); err != nil {
		return err
	}
	return errors.Join(syncDir(s.fs, path), syncDir(s.fs, s.root))
}

// readStaged hands the staged records to fn, checks that they are what was
// announced, and completes p.
func (s *FSM) readStaged(ctx context.Context, d *database, rec *commandpb.RestoreStage, p *prepared, fn func(k, v []byte) error) error {
	p.sums = make([]uint64, sumKinds)
	var rows [256]uint64
	var order chunkOrder
	digest := newRecordDigest()
	var records uint64
	var plain []byte
	add := func(k, v []byte) error {
		if err := order.check(k); err != nil {
			return err
		}
		rows[k[0]]++
		records++
		if kind, ok := sumOf(k[0]); ok {
			p.sums[kind] += recordHash(xxhash.Sum64(k), v)
		}
		return fn(k, v)
	}
	for i := uint64(0); ; i++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i == rec.Chunks && rec.Phase != commandpb.StagePhase_STAGE_PHASE_SEALED {
			var err error
			if rec, err = s.follow(ctx, d, rec); err != nil {
				return err
			}
		}
		if i == rec.Chunks {
			break
		}
		data, closer, err := d.db.Get(key(nil).sequence(prefixStage, i))
		if err != nil && !errors.Is(err, pebble.ErrNotFound) {
			return err
		}
		if err != nil {
			// Gone together with its stage, or lost.
			if now, err := readStage(d.db, metaStage); err == nil && !sameStage(now, rec) {
				return fmt.Errorf("%w (%s)", ErrNotStaged, rec.OperationId)
			}
			return fmt.Errorf("%w: chunk %d of %d is missing", ErrCorrupt, i, rec.Chunks)
		}
		plain, err = readChunk(data, plain, add)
		digest.addPlain(plain)
		if err = errors.Join(err, closer.Close()); err != nil {
			return err
		}
	}
	p.identity = identityOf(rec)
	src := rec.Source
	if records != rec.Records {
		return fmt.Errorf("%w: there are %d records, %d were announced", ErrBadChunk, records, rec.Records)
	}
	if !bytes.Equal(digest.sum(), src.ContentHash) {
		return fmt.Errorf("%w: the content has the hash %x, announced was %x", ErrBadChunk, digest.sum(), src.ContentHash)
	}
	if err := checkRows(src.Clock, &rows); err != nil {
		return fmt.Errorf("%w: %w", ErrBadChunk, err)
	}
	for i, sum := range src.Clock.Sums {
		if k := sumKind(i); k != sumCheckpoints && dataTable(sumTables()[k].prefix) && sum != p.sums[i] {
			return fmt.Errorf("%w: the sum of the %s is not the one announced", ErrBadChunk, sumTables()[k].name)
		}
	}
	if len(src.Clock.Sums) > int(sumCheckpoints) {
		p.sums[sumCheckpoints] = src.Clock.Sums[sumCheckpoints]
	}
	return nil
}

// checkRows compares the counters of a clock with the rows there are.
func checkRows(c *commandpb.Clock, rows *[256]uint64) error {
	counted := func(k countKind) uint64 {
		if int(k) < len(c.Counts) {
			return c.Counts[k]
		}
		return 0
	}
	for _, x := range []struct {
		what       string
		is, counts uint64
	}{
		{"pipelines", rows[prefixPipeline], counted(countPipelines)},
		{"sidecars", rows[prefixSidecar], counted(countSidecars)},
		{"services", rows[prefixService], counted(countServices)},
		{"groups", rows[prefixGroup], counted(countGroups)},
		{"source offsets", rows[prefixSourceOffset], counted(countSourceOffsets)},
		{"watermarks", rows[prefixWatermark], counted(countWatermarks)},
		{"group offsets", rows[prefixGroupOffset], counted(countGroupOffsets)},
		{"assignments", rows[prefixAssignment], counted(countAssignments) + counted(countRevoked)},
		{"remembered requests", rows[prefixRequestQueue], c.RequestTail - c.RequestHead},
	} {
		if x.is != x.counts {
			return fmt.Errorf("there are %d %s, the counter says %d", x.is, x.what, x.counts)
		}
	}
	return nil
}

// tableWriter writes ascending records into tables that Pebble takes in whole.
type tableWriter struct {
	fs      vfs.FS
	dir     string
	format  sstable.TableFormat
	options *pebble.Options
	w       *sstable.Writer
	bytes   int
	paths   []string
}

func (t *tableWriter) add(k, v []byte) error {
	if t.w != nil && t.bytes >= tableBytes {
		if err := t.close(); err != nil {
			return err
		}
	}
	if t.w == nil {
		// No name that Pebble takes for one of its own.
		path := t.fs.PathJoin(t.dir, fmt.Sprintf("new-%06d.sst", len(t.paths)))
		f, err := t.fs.Create(path, vfs.WriteCategoryUnspecified)
		if err != nil {
			return err
		}
		// Written back as it goes: a sync of all of it in the end would hold up
		// those of the log.
		f = vfs.NewSyncingFile(f, vfs.SyncingFileOptions{BytesPerSync: t.options.BytesPerSync})
		t.w, t.bytes = sstable.NewWriter(objstorageprovider.NewFileWritable(f), t.options.MakeWriterOptions(0, t.format)), 0
		t.paths = append(t.paths, path)
	}
	t.bytes += len(k) + len(v)
	return t.w.Set(k, v)
}

// close ends the table that is being written, durably.
func (t *tableWriter) close() error {
	if t.w == nil {
		return nil
	}
	w := t.w
	t.w = nil
	return w.Close()
}
