package snap

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"syscall"
	"time"
)

// partial is a receive that is going on or was interrupted.
type partial struct {
	// active: a Receiver is open, or the directory is being removed.
	active bool
	// since is when the receive was last begun or closed.
	since time.Time
	// spoiled: the directory could not be removed after a failed write. What
	// reads back from it may exist in memory only, so it must not be resumed.
	spoiled bool
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func (s *Store) partialDir(id string) string {
	return s.fs.PathJoin(s.dir, receivingPrefix+id)
}

// adoptPartial takes in a partial receive found by OpenStore.
func (s *Store) adoptPartial(id string) error {
	dir := s.partialDir(id)
	j, ok, err := readJournal(s.fs, s.fs.PathJoin(dir, receivedJournal))
	if err != nil {
		return err
	}
	if !ok || CheckID(id) != nil {
		s.opts.Logger.Info("removing a partial receive that cannot be resumed", "path", dir)
		if err := s.fs.RemoveAll(dir); err != nil {
			return fmt.Errorf("snap: remove leftover %s: %w", dir, err)
		}
		return nil
	}
	s.partials[id] = &partial{since: j.begun}
	return nil
}

// evictPartials removes idle partial receives: those that are too old, those
// whose image is here, and the ones idle for longest while there are too many.
// It spares keep.
func (s *Store) evictPartials(keep string) error {
	var stuck []*partial
	var errs []error
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		id := s.victimLocked(keep)
		if id == "" {
			break
		}
		p := s.partials[id]
		// Active, it is neither received nor chosen again meanwhile.
		p.active = true
		s.mu.Unlock()
		dir := s.partialDir(id)
		s.opts.Logger.Info("giving up a partial receive", "path", dir)
		err := s.fs.RemoveAll(dir)
		s.mu.Lock()
		if err != nil {
			errs = append(errs, fmt.Errorf("snap: remove partial receive %s: %w", dir, err))
			stuck = append(stuck, p)
			continue
		}
		delete(s.partials, id)
	}
	for _, p := range stuck {
		p.active, p.spoiled = false, true
	}
	return errors.Join(errs...)
}

func (s *Store) victimLocked(keep string) string {
	oldest := ""
	for id, p := range s.partials {
		if p.active || id == keep {
			continue
		}
		if s.images[id] != nil || s.opts.Now().Sub(p.since) > s.opts.MaxPartialAge {
			return id
		}
		if oldest == "" || p.since.Before(s.partials[oldest].since) ||
			p.since.Equal(s.partials[oldest].since) && id < oldest {
			oldest = id
		}
	}
	if len(s.partials) > s.opts.MaxPartials {
		return oldest
	}
	return ""
}

// Receive begins to receive image id, whose stream has size bytes, or resumes
// where an earlier attempt stopped, in this process or an earlier one:
// Receiver.Offset says where the sender must go on. What was received before
// is read back and compared first, which takes time in proportion to it.
//
// It returns ErrExists when the store has the image, ErrBusy when it is being
// received or too many are, ErrTooLarge and ErrNoSpace when it cannot fit. The
// caller must end the Receiver by Commit, Abort or Close.
func (s *Store) Receive(id string, size int64) (*Receiver, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	if size < headerLen {
		return nil, &CorruptError{Image: id, File: manifestName,
			Detail: fmt.Sprintf("a stream of %d bytes is too short for it", size)}
	}
	if size > s.opts.MaxManifestBytes+s.opts.MaxImageBytes {
		return nil, fmt.Errorf("%w: image %s has %d bytes, the limit is %d",
			ErrTooLarge, id, size, s.opts.MaxManifestBytes+s.opts.MaxImageBytes)
	}
	if s.revive(id) != nil {
		return nil, fmt.Errorf("%w: %s", ErrExists, id)
	}
	p, err := s.claim(id)
	if err != nil {
		return nil, err
	}
	r := &Receiver{
		store:   s,
		id:      id,
		size:    size,
		dir:     s.partialDir(id),
		partial: p,
		side:    aside{inline: s.opts.Inline},
	}
	r.imageDir = s.fs.PathJoin(r.dir, receivedImage)
	if err := r.begin(); err != nil {
		err = errors.Join(err, r.closeFilesLocked())
		s.release(id, p, isNotExist(s.statErr(r.dir)))
		return nil, err
	}
	return r, nil
}

// claim marks the partial receive of id as active and makes room for it.
func (s *Store) claim(id string) (*partial, error) {
	s.mu.Lock()
	p := s.partials[id]
	if p != nil && p.active {
		s.mu.Unlock()
		return nil, fmt.Errorf("%w: image %s is being received already", ErrBusy, id)
	}
	if p == nil {
		p = &partial{}
		s.partials[id] = p
	}
	p.active = true
	p.since = s.opts.Now()
	s.mu.Unlock()

	// An old partial that cannot be removed is logged, not returned: it is no
	// reason to refuse this image, unless its place is needed.
	if err := s.evictPartials(id); err != nil {
		s.opts.Logger.Warn("could not give up a partial receive", "err", err)
	}
	s.mu.Lock()
	count := len(s.partials)
	s.mu.Unlock()
	if count > s.opts.MaxPartials {
		s.release(id, p, isNotExist(s.statErr(s.partialDir(id))))
		return nil, fmt.Errorf("%w: the limit is %d", ErrBusy, s.opts.MaxPartials)
	}
	return p, nil
}

// receiving reports whether an image is being received.
func (s *Store) receiving() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.partials {
		if p.active {
			return true
		}
	}
	return false
}

func (s *Store) statErr(path string) error {
	_, err := s.fs.Stat(path)
	return err
}

// release ends the activity of p; gone says that its directory is removed.
func (s *Store) release(id string, p *partial, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.active = false
	p.since = s.opts.Now()
	if gone && s.partials[id] == p {
		delete(s.partials, id)
	}
}

// begin prepares the directory of r and finds out how much of it can be kept.
func (r *Receiver) begin() error {
	s := r.store
	j := journal{size: r.size, begun: s.opts.Now()}
	if !r.partial.spoiled {
		spans, err := r.survey()
		if err != nil {
			return err
		}
		j.spans = spans
	}
	if len(j.spans) == 0 {
		if err := s.fs.RemoveAll(r.dir); err != nil {
			return fmt.Errorf("snap: remove an unusable partial receive: %w", err)
		}
		s.mu.Lock()
		r.partial.spoiled = false
		s.mu.Unlock()
		r.manifest, r.info, r.sealed = nil, nil, nil
	} else {
		r.offset = j.spans[len(j.spans)-1].end()
	}
	r.seek()
	need := r.size - r.offset - r.reserved()
	if usage, err := s.fs.GetDiskUsage(s.dir); err == nil && usage.AvailBytes < uint64(need) {
		return fmt.Errorf("%w: image %s needs %d bytes more, %d are free; nothing more was received",
			ErrNoSpace, r.id, need, usage.AvailBytes)
	}
	if err := s.fs.MkdirAll(r.imageDir, 0o750); err != nil {
		return fmt.Errorf("snap: create directory %s: %w", r.imageDir, err)
	}
	var err error
	if r.journal, err = startJournal(s.fs, s.fs.PathJoin(r.dir, receivedJournal), &j); err != nil {
		return err
	}
	if err := syncDir(s.fs, r.dir); err != nil {
		return err
	}
	return syncDir(s.fs, s.dir)
}

// reserved returns how many bytes of the current file have their place on the disk, but
// no content: they were preallocated, and count as used.
func (r *Receiver) reserved() int64 {
	if r.info == nil || r.index == len(r.info.Files) {
		return 0
	}
	f := r.info.Files[r.index]
	st, err := r.store.fs.Stat(r.store.fs.PathJoin(r.imageDir, f.Name))
	if err != nil {
		return 0
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return max(0, min(sys.Blocks*512, f.Size)-r.pos) // Blocks are always counted in 512 bytes
}

// survey reads back what an earlier attempt wrote and returns the chunks that
// are intact up to the first that is not; r.info is set when there are any.
// Chunks are worth nothing without the whole manifest, which says where the
// rest of them lies.
func (r *Receiver) survey() ([]span, error) {
	s := r.store
	j, ok, err := readJournal(s.fs, s.fs.PathJoin(r.dir, receivedJournal))
	if err != nil || !ok || j.size != r.size {
		return nil, err
	}
	info, raw, err := loadManifest(s.fs, r.imageDir, r.id, &s.opts)
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrTooLarge) || errors.Is(err, ErrNewerFormat) {
		return nil, nil
	}
	if err != nil || info.Size != r.size {
		return nil, err
	}
	r.manifest = raw
	r.begun(info)
	in := received{receiver: r}
	defer in.close()
	var intact []span
	buf := make([]byte, readBlock)
	for _, sp := range j.spans {
		crc := uint32(0)
		for at := sp.offset; at < sp.end(); {
			p := buf[:min(int64(len(buf)), sp.end()-at)]
			ok, err := in.readAt(p, at)
			if err != nil {
				return nil, err
			}
			if !ok {
				return r.usable(intact), nil
			}
			crc = crc32.Update(crc, castagnoli, p)
			at += int64(len(p))
		}
		if crc != sp.crc {
			break
		}
		intact = append(intact, sp)
	}
	return r.usable(intact), nil
}

// usable returns spans when they cover the manifest, else none.
func (r *Receiver) usable(spans []span) []span {
	if len(spans) == 0 || spans[len(spans)-1].end() < int64(len(r.manifest)) {
		return nil
	}
	return spans
}
