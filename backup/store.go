package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"golang.org/x/sync/errgroup"
)

const (
	// partBytes is the unit of an upload, of which two are in memory at a time.
	// Object stores take 10,000 parts, so this bounds a backup to 80 GB.
	partBytes   = 8 << 20
	uploadParts = 2
	copyBytes   = 256 << 10

	// cleanupTime is how long what a failed upload has stored may take to be
	// removed.
	cleanupTime = 30 * time.Second
	// listRequests is how many descriptions are read at a time by List.
	listRequests = 8
	// maxListed bounds the memory of List: 100,000 backups are 270 years of
	// daily ones.
	maxListed = 100_000
)

// Store is one place of backups. Its methods are safe for concurrent use and
// block for as long as the place takes; ctx ends them.
type Store struct {
	location Location
	bucket   *blob.Bucket
	now      func() time.Time
}

// Open opens the place that text names (see ParseLocation). A directory must
// exist. Close frees it.
func Open(ctx context.Context, text string) (*Store, error) { return open(ctx, text, false) }

// Create is Open for a place that is written to: a missing directory is made.
func Create(ctx context.Context, text string) (*Store, error) { return open(ctx, text, true) }

func open(ctx context.Context, text string, create bool) (*Store, error) {
	l, err := ParseLocation(text)
	if err != nil {
		return nil, err
	}
	if l.Scheme == "file" && !create {
		// The driver would say so less clearly.
		switch st, err := os.Stat(l.Path); {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("backup: the directory %s does not exist: %w", l.Path, ErrNotFound)
		case err == nil && !st.IsDir():
			return nil, fmt.Errorf("%w: %s is no directory", ErrInvalidURL, l.Path)
		}
	}
	b, err := l.bucket(ctx, create)
	if err != nil {
		return nil, fmt.Errorf("backup: open %s: %w", l, err)
	}
	return &Store{location: l, bucket: b, now: time.Now}, nil
}

// Close frees the connections of the store.
func (s *Store) Close() error { return s.bucket.Close() }

// Location returns the place of the store.
func (s *Store) Location() Location { return s.location }

func key(id, object string) string { return id + "/" + object }

// fail wraps an error of the driver.
func (s *Store) fail(what, id string, err error) error {
	return fmt.Errorf("backup: %s %s in %s: %w", what, id, s.location, err)
}

func missing(err error) bool { return gcerrors.Code(err) == gcerrors.NotFound }

// Put stores the backup that m describes, with the bytes of archive, and
// returns the description as it was stored: Put fills in SizeBytes, SHA256,
// Version and, when it is zero, CreatedAt.
//
// It reads archive to its end and holds two parts of 8 MiB in memory. On an
// error, also one of archive, or when ctx is done, what was stored is removed
// again; the error says so if that failed.
func (s *Store) Put(ctx context.Context, m Metadata, archive io.Reader) (Metadata, error) {
	return s.PutWith(ctx, m.BackupID, archive, func() (Metadata, error) { return m, nil })
}

// PutWith is Put for callers who learn what the backup is only from its bytes:
// describe is called once, when archive has ended in order. An error of it fails
// the whole. The id of what it returns is ignored.
func (s *Store) PutWith(ctx context.Context, id string, archive io.Reader, describe func() (Metadata, error)) (m Metadata, err error) {
	if err := CheckID(id); err != nil {
		return m, err
	}
	switch exists, err := s.bucket.Exists(ctx, key(id, MetadataName)); {
	case err != nil:
		return m, s.fail("look for", id, err)
	case exists:
		return m, fmt.Errorf("%w: %s in %s; nothing was written", ErrExists, id, s.location)
	}
	sum := sha256.New()
	size, err := s.write(ctx, key(id, ArchiveName), io.TeeReader(archive, sum))
	if err == nil && size == 0 {
		err = errors.New("the archive is empty")
	}
	if err != nil {
		return m, s.undo(ctx, id, err)
	}
	if m, err = describe(); err != nil {
		return m, s.undo(ctx, id, err)
	}
	m.BackupID = id
	m.SizeBytes = uint64(size)
	m.SHA256 = hex.EncodeToString(sum.Sum(nil))
	m.Version = metadataVersion
	if m.CreatedAt.IsZero() {
		m.CreatedAt = s.now()
	}
	m.CreatedAt = m.CreatedAt.UTC().Truncate(time.Millisecond)
	raw, err := m.encode()
	if err == nil {
		_, err = s.write(ctx, key(id, MetadataName), bytes.NewReader(raw))
	}
	if err != nil {
		return m, s.undo(ctx, id, err)
	}
	return m, nil
}

// undo removes what a failed Put has stored and returns its error.
func (s *Store) undo(ctx context.Context, id string, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	if rerr := s.remove(ctx, id); rerr != nil && !errors.Is(rerr, ErrNotFound) {
		err = errors.Join(err, fmt.Errorf("what was stored so far remains, and is no backup: %w", rerr))
	}
	return s.fail("store", id, err)
}

// write stores in as one object, durably, and returns its size.
func (s *Store) write(ctx context.Context, key string, in io.Reader) (size int64, err error) {
	// A writer whose context ends cannot take back the parts it has stored, and
	// nobody sees or deletes those. So an upload that is given up is ended in
	// order and deleted as an object; only one that hangs is torn off.
	wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(cleanupTime, cancel) })
	defer stop()
	w, err := s.bucket.NewWriter(wctx, key, &blob.WriterOptions{
		BufferSize:     partBytes,
		MaxConcurrency: uploadParts,
		// Named, or the driver guesses it from the content.
		ContentType: contentType(key),
	})
	if err != nil {
		return 0, err
	}
	size, err = io.CopyBuffer(struct{ io.Writer }{w}, untilDone{ctx, in}, make([]byte, copyBytes))
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err == nil && s.location.Scheme == "file" {
		err = s.settle(key)
	}
	return size, err
}

func contentType(key string) string {
	if strings.HasSuffix(key, ".json") {
		return "application/json"
	}
	return "application/octet-stream"
}

// untilDone reads until ctx is done.
type untilDone struct {
	ctx context.Context
	in  io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.in.Read(p)
}

// settle makes a file durable, and its names: the driver leaves that to the
// kernel, and a backup that is reported must outlive a power failure.
func (s *Store) settle(key string) error {
	path := filepath.Join(s.location.Path, filepath.FromSlash(key))
	for _, p := range []string{path, filepath.Dir(path), s.location.Path, filepath.Dir(s.location.Path)} {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		err = f.Sync()
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("fsync %s: %w", p, err)
		}
	}
	return nil
}

// Describe returns the metadata of backup id: ErrNotFound when there is
// nothing of it, ErrIncomplete when its upload was not finished.
func (s *Store) Describe(ctx context.Context, id string) (Metadata, error) {
	if err := CheckID(id); err != nil {
		return Metadata{}, err
	}
	r, err := s.bucket.NewReader(ctx, key(id, MetadataName), nil)
	if missing(err) {
		switch exists, err := s.bucket.Exists(ctx, key(id, ArchiveName)); {
		case err != nil:
			return Metadata{}, s.fail("look for", id, err)
		case exists:
			return Metadata{}, fmt.Errorf("%w: %s in %s has no %s: its upload was not finished; take another backup",
				ErrIncomplete, id, s.location, MetadataName)
		}
		return Metadata{}, fmt.Errorf("%w: %s in %s", ErrNotFound, id, s.location)
	}
	if err != nil {
		return Metadata{}, s.fail("describe", id, err)
	}
	raw, err := io.ReadAll(io.LimitReader(r, maxMetadataBytes+1))
	if err := errors.Join(err, r.Close()); err != nil {
		return Metadata{}, s.fail("describe", id, err)
	}
	if len(raw) > maxMetadataBytes {
		return Metadata{}, &DamagedError{ID: id, Object: MetadataName, Detail: fmt.Sprintf("it is longer than %d bytes", maxMetadataBytes)}
	}
	return decodeMetadata(id, raw)
}

// Delete removes backup id, or what there is of it. ErrNotFound when there is
// nothing.
func (s *Store) Delete(ctx context.Context, id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	if err := s.remove(ctx, id); err != nil {
		if errors.Is(err, ErrNotFound) {
			return err
		}
		return s.fail("delete", id, err)
	}
	return nil
}

// remove deletes the objects of id, the description first: from then on it is
// no backup, whatever becomes of the rest. Only what a backup consists of is
// deleted, and what the driver of files may have left of it.
func (s *Store) remove(ctx context.Context, id string) error {
	found := false
	for _, object := range []string{MetadataName, ArchiveName} {
		switch err := s.bucket.Delete(ctx, key(id, object)); {
		case err == nil:
			found = true
		case !missing(err):
			return err
		}
	}
	if s.location.Scheme == "file" {
		dir := filepath.Join(s.location.Path, id)
		leftovers, err := filepath.Glob(filepath.Join(dir, "fileblob*"))
		if err != nil {
			return err
		}
		for _, f := range leftovers {
			found = true
			if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		// It stays when somebody has put something into it.
		if os.Remove(dir) == nil {
			found = true
		}
	}
	if !found {
		return fmt.Errorf("%w: %s in %s", ErrNotFound, id, s.location)
	}
	return nil
}

// Listing is what a store holds.
type Listing struct {
	// Backups are sorted, the newest first.
	Backups []Metadata
	// Broken are those that cannot be used, by id.
	Broken []Broken
}

// Broken is something in a store that is no backup, though it may have been
// meant as one.
type Broken struct {
	ID string
	// Err matches ErrIncomplete or ErrDamaged.
	Err error
	// Modified is when the last of it was written.
	Modified time.Time
	Bytes    int64
}

// List reads the description of every backup. Names that can be no backup are
// left out.
func (s *Store) List(ctx context.Context) (Listing, error) {
	var ids []string
	for it := s.bucket.List(&blob.ListOptions{Delimiter: "/"}); ; {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return Listing{}, fmt.Errorf("backup: list %s: %w", s.location, err)
		}
		id := strings.TrimSuffix(o.Key, "/")
		if !o.IsDir || CheckID(id) != nil {
			continue
		}
		if ids = append(ids, id); len(ids) > maxListed {
			return Listing{}, fmt.Errorf("backup: %s holds more than %d backups; keep fewer, or in several places", s.location, maxListed)
		}
	}
	found := make([]Metadata, len(ids))
	broken := make([]*Broken, len(ids))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(listRequests)
	for i, id := range ids {
		g.Go(func() (err error) {
			found[i], err = s.Describe(gctx, id)
			if errors.Is(err, ErrIncomplete) || errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotFound) {
				broken[i], err = s.inspect(gctx, id, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return Listing{}, err
	}
	var l Listing
	for i := range ids {
		switch {
		case broken[i] != nil:
			l.Broken = append(l.Broken, *broken[i])
		case found[i].BackupID != "":
			l.Backups = append(l.Backups, found[i])
		}
	}
	slices.SortFunc(l.Backups, func(a, b Metadata) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.BackupID, b.BackupID)
	})
	return l, nil
}

// inspect says what there is of something that is no backup. It returns nil
// when it is gone, or has nothing to do with backups.
func (s *Store) inspect(ctx context.Context, id string, why error) (*Broken, error) {
	b := Broken{ID: id, Err: why}
	ours := false
	for it := s.bucket.List(&blob.ListOptions{Prefix: id + "/"}); ; {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, s.fail("list", id, err)
		}
		name := strings.TrimPrefix(o.Key, id+"/")
		if name != ArchiveName && name != MetadataName && !strings.HasPrefix(name, "fileblob") {
			continue
		}
		ours = true
		b.Bytes += o.Size
		if o.ModTime.After(b.Modified) {
			b.Modified = o.ModTime
		}
	}
	if !ours {
		return nil, nil
	}
	if errors.Is(why, ErrNotFound) {
		b.Err = fmt.Errorf("%w: %s in %s: its upload was not finished", ErrIncomplete, id, s.location)
	}
	return &b, nil
}
