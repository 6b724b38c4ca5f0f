package shelf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/snap"
)

// What can be wrong with a request. Nothing was changed.
var (
	// ErrNotFound: there is no snapshot of that id here.
	ErrNotFound = errors.New("shelf: no such snapshot")
	// ErrExists: there is one already.
	ErrExists = errors.New("shelf: the snapshot exists already")
	// ErrSuspect: the snapshot holds a state that is probably wrong.
	ErrSuspect = errors.New("shelf: the snapshot is not to be trusted")
	// ErrQuota: the snapshots would take more room than they may.
	ErrQuota = errors.New("shelf: no room for the snapshot")
)

const imagesDir = "images"

// Options holds the limits of a Shelf; EnsureDefaults fills zero values.
type Options struct {
	// Logger receives what the shelf repairs or lets go. Default: discarded.
	Logger *slog.Logger
	// Now is the clock. Default: time.Now.
	Now func() time.Time
	// MaxSnapshots is how many snapshots are kept. A new one takes the place of
	// the oldest that nobody is reading; the undo point is not counted. Default
	// 16.
	MaxSnapshots int
	// MaxBytes bounds the images together; a snapshot beyond is refused.
	// Default 64 GiB.
	MaxBytes int64
	// Images are the options of the image store.
	Images snap.Options
}

func (o *Options) ensureDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxSnapshots <= 0 {
		o.MaxSnapshots = 16
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = 64 << 30
	}
	o.Images.Logger, o.Images.Now = o.Logger, o.Now
}

// Shelf keeps the snapshots of one node. Its methods are safe for concurrent
// use.
type Shelf struct {
	fs     vfs.FS
	dir    string
	o      Options
	images *snap.Store

	// writeMu is held by whatever changes records on disk, and taken before mu.
	writeMu sync.Mutex

	// mu guards the fields below and is never held during IO.
	mu      sync.Mutex
	records map[string]*Record
	// busy holds the ids being made, so that two calls do not make the same.
	busy map[string]bool
	// reading counts the open readers of each id.
	reading map[string]int
}

// Open opens the snapshots in dir, creating it when it is absent, and removes
// what an interrupted call left behind.
func Open(f vfs.FS, dir string, o Options) (*Shelf, error) {
	o.ensureDefaults()
	images, err := snap.OpenStore(f, f.PathJoin(dir, imagesDir), o.Images)
	if err != nil {
		return nil, err
	}
	s := &Shelf{
		fs: f, dir: dir, o: o, images: images,
		records: map[string]*Record{}, busy: map[string]bool{}, reading: map[string]int{},
	}
	// What is listed must not vanish with the next power failure.
	if err := syncDir(f, dir); err != nil {
		return nil, fmt.Errorf("shelf: sync %s: %w", dir, err)
	}
	names, err := f.List(dir)
	if err != nil {
		return nil, fmt.Errorf("shelf: list %s: %w", dir, err)
	}
	have := map[string]bool{}
	for _, info := range images.List() {
		have[info.ID] = true
	}
	used := map[string]bool{}
	for _, name := range names {
		if strings.HasSuffix(name, ".tmp") && strings.HasPrefix(name, ".") {
			_ = f.Remove(f.PathJoin(dir, name))
			continue
		}
		id, ok := isRecord(name)
		if !ok {
			continue
		}
		r, err := readRecord(f, dir, name)
		if err != nil {
			// Not a reason to refuse to start: the state is elsewhere.
			o.Logger.Warn("ignoring the record of a snapshot that cannot be read", "snapshot", id, "err", err)
			continue
		}
		if r.Origin == Temporary {
			if err := removeRecord(f, dir, id); err != nil {
				return nil, fmt.Errorf("shelf: remove record %s: %w", id, err)
			}
			continue
		}
		if !have[r.Image] {
			o.Logger.Warn("removing the record of a snapshot whose image is gone", "snapshot", id, "image", r.Image)
			if err := removeRecord(f, dir, id); err != nil {
				return nil, fmt.Errorf("shelf: remove record %s: %w", id, err)
			}
			continue
		}
		used[r.Image] = true
		s.records[id] = &r
	}
	for id := range have {
		if used[id] {
			continue
		}
		o.Logger.Info("removing an image that no snapshot names", "image", id)
		if err := images.Delete(id); err != nil && !errors.Is(err, snap.ErrNotFound) {
			return nil, err
		}
	}
	return s, nil
}

// List returns the snapshots, the newest first.
func (s *Shelf) List() []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Record, 0, len(s.records))
	for _, r := range s.records {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b Record) int {
		switch {
		case a.CreatedMS != b.CreatedMS:
			if a.CreatedMS > b.CreatedMS {
				return -1
			}
			return 1
		default:
			return strings.Compare(a.ID, b.ID)
		}
	})
	return out
}

// Get returns the record of id; ErrNotFound when there is none.
func (s *Shelf) Get(id string) (Record, error) {
	if err := CheckID(id); err != nil {
		return Record{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.records[id]; r != nil {
		return *r, nil
	}
	return Record{}, fmt.Errorf("%w: %s", ErrNotFound, id)
}

// Reader is an open snapshot. It stays on disk until Close.
type Reader struct {
	*snap.Reader
	shelf  *Shelf
	record Record
	once   sync.Once
}

// Record describes the snapshot.
func (r *Reader) Record() Record { return r.record }

// Close lets the snapshot go.
func (r *Reader) Close() error {
	err := r.Reader.Close()
	r.once.Do(func() {
		r.shelf.mu.Lock()
		defer r.shelf.mu.Unlock()
		if r.shelf.reading[r.record.ID]--; r.shelf.reading[r.record.ID] == 0 {
			delete(r.shelf.reading, r.record.ID)
		}
	})
	return err
}

// Open opens snapshot id for reading; ErrSuspect when it is not to be trusted.
func (s *Shelf) Open(id string) (*Reader, error) {
	s.mu.Lock()
	rec := s.records[id]
	if rec == nil {
		s.mu.Unlock()
		if err := CheckID(id); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	r := *rec
	if r.Suspect != "" {
		s.mu.Unlock()
		return nil, fmt.Errorf("%w: %s: %s; delete it, and use one made on another node or before that", ErrSuspect, id, r.Suspect)
	}
	s.reading[id]++
	s.mu.Unlock()
	out := &Reader{shelf: s, record: r}
	image, err := s.images.Open(r.Image)
	if err != nil {
		s.mu.Lock()
		if s.reading[id]--; s.reading[id] == 0 {
			delete(s.reading, id)
		}
		s.mu.Unlock()
		return nil, err
	}
	out.Reader = image
	return out, nil
}

// reserve claims id for a call that makes it; the caller calls the function it
// returns when it is done.
func (s *Shelf) reserve(id string) (func(), error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.records[id] != nil || s.busy[id] {
		return nil, fmt.Errorf("%w: %s", ErrExists, id)
	}
	s.busy[id] = true
	return func() {
		s.mu.Lock()
		delete(s.busy, id)
		s.mu.Unlock()
	}, nil
}

// Create makes snapshot id of what build writes; see snap.Store.Create. describe
// fills in what only a look into the files can tell, given their directory.
func (s *Shelf) Create(ctx context.Context, id string, origin Origin,
	build func(dir string) (snap.Meta, error), describe func(dir string, r *Record) error) (Record, error) {
	return s.add(ctx, id, origin, describe, func(look func(string) error) (snap.Info, error) {
		return s.images.Create(ctx, func(dir string) (snap.Meta, error) {
			meta, err := build(dir)
			if err != nil {
				return meta, err
			}
			return meta, look(dir)
		})
	})
}

// Import makes snapshot id of the image that fill writes; see snap.Store.Import.
func (s *Shelf) Import(ctx context.Context, id string,
	fill func(dir string) error, describe func(dir string, r *Record) error) (Record, error) {
	return s.add(ctx, id, Uploaded, describe, func(look func(string) error) (snap.Info, error) {
		return s.images.Import(ctx, func(dir string) error {
			if err := fill(dir); err != nil {
				return err
			}
			return look(dir)
		})
	})
}

func (s *Shelf) add(ctx context.Context, id string, origin Origin, describe func(string, *Record) error,
	make func(look func(string) error) (snap.Info, error)) (Record, error) {
	done, err := s.reserve(id)
	if err != nil {
		return Record{}, err
	}
	defer done()
	now := s.o.Now().UnixMilli()
	r := Record{ID: id, Origin: origin, CreatedMS: now, ArrivedMS: now}
	info, err := make(func(dir string) error { return describe(dir, &r) })
	if err != nil {
		return Record{}, err
	}
	r.Image, r.Bytes, r.Index, r.Term = info.ID, info.Bytes, info.Index, info.Term
	if origin != Created {
		r.CreatedMS = info.Created.UnixMilli()
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	// The store may have had this image already, and the last snapshot that
	// named it may have been deleted since.
	pin, err := s.images.Open(r.Image)
	if err != nil {
		return Record{}, fmt.Errorf("shelf: snapshot %s was not kept, try again: %w", id, err)
	}
	defer pin.Close()
	if err := s.checkQuota(&r); err != nil {
		s.dropImage(r.Image)
		return Record{}, err
	}
	if err := writeRecord(s.fs, s.dir, &r); err != nil {
		s.dropImage(r.Image)
		return Record{}, fmt.Errorf("shelf: record snapshot %s: %w", id, err)
	}
	s.mu.Lock()
	s.records[id] = &r
	s.mu.Unlock()
	s.retire(id)
	return r, nil
}

// counts reports whether a snapshot is one that users keep.
func (r *Record) counts() bool { return r.Origin != Undo && r.Origin != Temporary }

// checkQuota refuses a snapshot that does not fit. Shared images count once.
func (s *Shelf) checkQuota(r *Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !r.counts() {
		return nil
	}
	sizes := map[string]int64{r.Image: r.Bytes}
	for _, have := range s.records {
		if have.counts() {
			sizes[have.Image] = have.Bytes
		}
	}
	var sum int64
	for _, n := range sizes {
		sum += n
	}
	if sum > s.o.MaxBytes {
		return fmt.Errorf("%w: with it the snapshots of this node would take %d bytes, %d are allowed; delete some, or raise the limit",
			ErrQuota, sum, s.o.MaxBytes)
	}
	return nil
}

// retire removes the oldest snapshots beyond MaxSnapshots that nobody reads.
// writeMu is held.
func (s *Shelf) retire(newest string) {
	list := s.List()
	slices.SortStableFunc(list, func(a, b Record) int { return cmp.Compare(b.ArrivedMS, a.ArrivedMS) })
	s.mu.Lock()
	kept := 0
	var old []string
	for _, r := range list {
		if !r.counts() {
			continue
		}
		if kept++; kept > s.o.MaxSnapshots && r.ID != newest && s.reading[r.ID] == 0 {
			old = append(old, r.ID)
		}
	}
	s.mu.Unlock()
	for _, id := range old {
		s.o.Logger.Info("removing the oldest snapshot: more are kept than is allowed", "snapshot", id, "max", s.o.MaxSnapshots)
		if _, err := s.remove(id); err != nil {
			s.o.Logger.Warn("cannot remove an old snapshot", "snapshot", id, "err", err)
		}
	}
}

// Delete removes snapshot id and reports whether there was one. Readers that
// are open go on.
func (s *Shelf) Delete(id string) (bool, error) {
	if err := CheckID(id); err != nil {
		return false, err
	}
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	return s.remove(id)
}

func (s *Shelf) remove(id string) (bool, error) {
	s.mu.Lock()
	r := s.records[id]
	s.mu.Unlock()
	if r == nil {
		return false, nil
	}
	if err := removeRecord(s.fs, s.dir, id); err != nil {
		return true, fmt.Errorf("shelf: remove snapshot %s: %w", id, err)
	}
	s.mu.Lock()
	delete(s.records, id)
	s.mu.Unlock()
	s.dropImage(r.Image)
	return true, nil
}

// dropImage deletes an image that no snapshot names any more. A failure leaves
// it to the next Open.
func (s *Shelf) dropImage(image string) {
	s.mu.Lock()
	for _, r := range s.records {
		if r.Image == image {
			s.mu.Unlock()
			return
		}
	}
	s.mu.Unlock()
	if err := s.images.Delete(image); err != nil && !errors.Is(err, snap.ErrNotFound) {
		s.o.Logger.Warn("cannot remove the image of a snapshot; the next start tries again", "image", image, "err", err)
	}
}

// Agree records that the state of this node was that of a majority at index, of an
// epoch: what was made of it until then can be trusted. It blocks on the disk for
// the snapshots that were made since it was last said.
func (s *Shelf) Agree(index, epoch uint64) error {
	return s.each(func(r *Record) bool {
		if r.Agreed || r.Suspect != "" || !r.own() || r.Index > index || r.Epoch != epoch {
			return false
		}
		r.Agreed = true
		return true
	})
}

// Doubt marks the snapshots of this node's own state as suspect, for why, that were
// made after the last word that it was right. It blocks on the disk.
func (s *Shelf) Doubt(why string) error {
	return s.each(func(r *Record) bool {
		if r.Agreed || r.Suspect != "" || !r.own() {
			return false
		}
		r.Suspect = why
		return true
	})
}

// own reports whether a snapshot was made of the state of this node.
func (r *Record) own() bool { return r.Origin == Created || r.Origin == Undo }

// each changes the records for which change returns true, one after the other.
func (s *Shelf) each(change func(r *Record) bool) error {
	for _, r := range s.List() {
		if next := r; !change(&next) {
			continue
		}
		if err := s.update(r.ID, func(r *Record) { change(r) }); err != nil && !errors.Is(err, ErrNotFound) {
			return err // one that was deleted meanwhile needs no word
		}
	}
	return nil
}

// update changes the record of snapshot id.
func (s *Shelf) update(id string, change func(r *Record)) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	s.mu.Lock()
	r := s.records[id]
	s.mu.Unlock()
	if r == nil {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	next := *r
	change(&next)
	if err := writeRecord(s.fs, s.dir, &next); err != nil {
		return fmt.Errorf("shelf: record snapshot %s: %w", id, err)
	}
	s.mu.Lock()
	s.records[id] = &next
	s.mu.Unlock()
	return nil
}

// SetContent records what only a look at everything in a snapshot tells: the hash
// of its content, and how many records there are of each kind.
func (s *Shelf) SetContent(id, hash string, counts map[string]uint64) error {
	return s.update(id, func(r *Record) { r.ContentHash, r.Counts = hash, counts })
}
