package snap

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Receiver takes the stream of one image, chunk by chunk. Its methods are safe
// for concurrent use; exactly one Receiver is open per image.
type Receiver struct {
	store    *Store
	id       string
	size     int64
	dir      string
	imageDir string
	partial  *partial

	mu sync.Mutex
	// err refuses further use: ErrClosed, or why the receive failed.
	err error
	// offset is how much of the stream has been taken.
	offset int64
	// manifest grows until it is whole; then info is set.
	manifest []byte
	info     *Info
	// index and pos say which file, and where in it, offset is.
	index int
	pos   int64
	// sum is the checksum of what was taken of that file, from its beginning if whole;
	// otherwise an earlier receive has begun it.
	sum   uint32
	whole bool
	// file is info.Files[index] when it is open.
	file    vfs.File
	journal vfs.File
	// unsynced is how much was written since the last fsync.
	unsynced int64
	// ahead is how much of file was written since its writing back was begun last.
	ahead int64
	// fully is set when this file system can only sync as a whole what it is asked
	// to begin writing back.
	fully bool
	// sealed tells of the files of info that this receive has made durable, and found to
	// be the sender's, what they were at that time. It belongs to side until that has
	// ended.
	sealed []fileIdentity
	// block is what side reads into.
	block []byte
	// side makes durable what was received, while more comes.
	side aside
}

// ID returns the id of the image being received.
func (r *Receiver) ID() string { return r.id }

// Offset returns the stream offset at which the next chunk must start.
// Everything before it has been received and verified against chunk checksums.
func (r *Receiver) Offset() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.offset
}

// Write takes the next chunk. It blocks on the disk and does not keep c.Data.
//
// After ErrOutOfOrder, ErrBadChunk, or ErrTooLarge for a chunk, nothing was
// taken and the stream can go on from Offset. After any other error the
// receive is over and what was received is removed: a new Receive starts at
// offset 0.
func (r *Receiver) Write(c Chunk) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return r.err
	}
	if err := r.admitLocked(&c); err != nil {
		return err
	}
	if err := r.takeLocked(c.Data, c.CRC); err != nil {
		return r.failLocked(err)
	}
	// The journal entry follows the data: an entry whose data is missing is
	// found out by reading back, but costs the whole tail.
	if _, err := r.journal.Write(encodeSpan(span{c.Offset, uint32(len(c.Data)), c.CRC})); err != nil {
		return r.failLocked(fmt.Errorf("snap: write the journal of image %s: %w", r.id, err))
	}
	r.offset += int64(len(c.Data))
	r.unsynced += int64(len(c.Data))
	if r.unsynced >= r.syncBytes() {
		r.unsynced = 0
		if err := r.syncLocked(); err != nil {
			return r.failLocked(err)
		}
	}
	return nil
}

// admitLocked checks c against the stream before anything is written.
func (r *Receiver) admitLocked(c *Chunk) error {
	n := int64(len(c.Data))
	end := c.Offset + n
	switch {
	case c.Offset != r.offset:
		return &OffsetError{Expected: r.offset, Got: c.Offset}
	case n > int64(r.store.opts.MaxChunkBytes):
		return fmt.Errorf("%w: a chunk of image %s has %d bytes, the limit is %d",
			ErrTooLarge, r.id, n, r.store.opts.MaxChunkBytes)
	case n > r.size-r.offset:
		return fmt.Errorf("%w: a chunk of image %s ends at %d, the stream was announced with %d bytes",
			ErrTooLarge, r.id, end, r.size)
	case n == 0:
		return fmt.Errorf("%w: empty, at offset %d of image %s", ErrBadChunk, c.Offset, r.id)
	case c.Last != (end == r.size):
		return fmt.Errorf("%w: end mark %t at offset %d of the %d bytes of image %s",
			ErrBadChunk, c.Last, end, r.size, r.id)
	}
	if crc := crc32.Checksum(c.Data, castagnoli); crc != c.CRC {
		return fmt.Errorf("%w: checksum %08x, it was sent with %08x, at offset %d of image %s",
			ErrBadChunk, crc, c.CRC, c.Offset, r.id)
	}
	return nil
}

// takeLocked stores data, which continues the stream and has the checksum crc.
func (r *Receiver) takeLocked(data []byte, crc uint32) error {
	all := len(data)
	for len(data) > 0 {
		var n int
		var err error
		if r.info == nil {
			n, err = r.takeManifestLocked(data)
		} else {
			part := data[:min(r.nextFileLocked(), int64(len(data)))]
			if n = len(part); n < all {
				crc = crc32.Checksum(part, castagnoli)
			}
			err = r.takeFileLocked(part, crc)
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// takeManifestLocked takes what data holds of the manifest, up to the end of
// the header or of the whole.
func (r *Receiver) takeManifestLocked(data []byte) (int, error) {
	o := &r.store.opts
	want := headerLen
	if int64(len(r.manifest)) >= headerLen {
		h, err := decodeHeader(r.manifest)
		if err != nil {
			return 0, &CorruptError{Image: r.id, File: manifestName, Detail: err.Error()}
		}
		if want = h.size(); want > o.MaxManifestBytes {
			return 0, manifestTooLarge(r.id, want, o)
		}
		if want > r.size {
			return 0, &CorruptError{Image: r.id, File: manifestName,
				Detail: fmt.Sprintf("%d bytes do not fit into a stream of %d", want, r.size)}
		}
	}
	n := int(min(want-int64(len(r.manifest)), int64(len(data))))
	r.manifest = append(r.manifest, data[:n]...)
	if want == headerLen && n > 0 || int64(len(r.manifest)) < want {
		return n, nil
	}
	return n, r.openImageLocked()
}

// openImageLocked checks the complete manifest and prepares the image for its
// files.
func (r *Receiver) openImageLocked() error {
	s := r.store
	info, err := decodeManifest(r.manifest, r.id, &s.opts)
	if err != nil {
		return err
	}
	if info.ID != r.id {
		return &CorruptError{Image: r.id, File: manifestName, Detail: "it belongs to image " + info.ID}
	}
	if info.Size != r.size {
		return &CorruptError{Image: r.id, File: manifestName,
			Detail: fmt.Sprintf("it describes a stream of %d bytes, %d were announced", info.Size, r.size)}
	}
	if err := writeFile(s.fs, s.fs.PathJoin(r.imageDir, manifestName), r.manifest); err != nil {
		return err
	}
	for _, f := range info.Files {
		if f.Size > 0 {
			continue
		}
		if err := writeFile(s.fs, s.fs.PathJoin(r.imageDir, f.Name), nil); err != nil {
			return err
		}
	}
	r.begun(info)
	r.index, r.pos, r.sum, r.whole = 0, 0, 0, true
	return syncDir(s.fs, r.imageDir)
}

// nextFileLocked moves on to the file that the next byte of the stream is of, and returns
// how much of it is missing. There is one: a chunk does not go beyond the image.
func (r *Receiver) nextFileLocked() int64 {
	for r.pos == r.info.Files[r.index].Size {
		r.index, r.pos, r.sum, r.whole = r.index+1, 0, 0, true
	}
	return r.info.Files[r.index].Size - r.pos
}

// takeFileLocked writes data, which has the checksum crc, into the current file, which it
// does not go beyond.
func (r *Receiver) takeFileLocked(data []byte, crc uint32) error {
	f := r.info.Files[r.index]
	path := r.store.fs.PathJoin(r.imageDir, f.Name)
	if r.file == nil {
		file, err := r.store.fs.OpenReadWrite(path, writeCategory)
		if err != nil {
			return fmt.Errorf("snap: open %s: %w", path, err)
		}
		r.file = file
		if r.pos == 0 && f.Size >= preallocateBytes {
			// Where it cannot be done, the file grows as usual.
			_ = file.Preallocate(0, f.Size)
		}
	}
	n := int64(len(data))
	if _, err := r.file.WriteAt(data, r.pos); err != nil {
		return fmt.Errorf("snap: write %s: %w", path, err)
	}
	r.pos += n
	r.sum = combine(r.sum, crc, n)
	if r.pos == f.Size {
		r.ahead = 0
		return r.fileEndedLocked()
	}
	return r.writeBackLocked(n)
}

// preallocateBytes is the size from which on a file gets its place on the disk before its
// content: then the file system need not reserve room block by block, and what lies in
// one piece is written back in fewer.
const preallocateBytes = 1 << 20

// writeBackLocked is told of n more bytes in the current file, and begins to write
// back what waits when that is much.
func (r *Receiver) writeBackLocked(n int64) error {
	if r.fully {
		return nil
	}
	if r.ahead += n; r.ahead < r.store.opts.WriteBackBytes {
		return nil
	}
	r.ahead = 0
	// It waits for what was begun before, so no more than twice as much is on
	// its way. Any error is final: this descriptor's next fsync may not see it.
	fully, err := r.file.SyncTo(r.pos)
	if err != nil {
		return fmt.Errorf("snap: write back %s of image %s: %w", r.info.Files[r.index].Name, r.id, err)
	}
	r.fully = fully
	return nil
}

// fullSyncBytes takes the place of SyncBytes, if that is more, where nothing but an
// fsync gets what was received out of memory.
const fullSyncBytes = 8 << 20

func (r *Receiver) syncBytes() int64 {
	if r.fully {
		return min(r.store.opts.SyncBytes, fullSyncBytes)
	}
	return r.store.opts.SyncBytes
}

// begun takes info for what the manifest says.
func (r *Receiver) begun(info *Info) {
	r.info, r.sealed = info, make([]fileIdentity, len(info.Files))
}

// fileEndedLocked has the current file, which has all its bytes, made durable and closed,
// and compares it with the manifest. Commit would take a good part of the time of the
// transfer to do it for all files, and all of a processor.
func (r *Receiver) fileEndedLocked() error {
	index, file, f, whole := r.index, r.file, r.info.Files[r.index], r.whole
	r.file = nil
	err := r.side.failed() // what comes after a failure is not done
	if err == nil && whole && r.sum != f.CRC {
		err = &CorruptError{Image: r.id, File: f.Name,
			Detail: fmt.Sprintf("what was sent has the checksum %08x, the manifest says %08x", r.sum, f.CRC)}
	}
	if err != nil {
		return errors.Join(err, file.Close())
	}
	return r.side.do(func() error {
		st, err := file.Stat()
		if err == nil {
			err = file.Sync()
		}
		if err == nil {
			err = file.Close()
		} else {
			_ = file.Close() // it goes anyway
		}
		if err != nil {
			return fmt.Errorf("snap: fsync and close %s of image %s: %w", f.Name, r.id, err)
		}
		return r.seal(index, st, whole)
	})
}

// seal notes that file index, which is durable and was st then, is the sender's. What was
// there when this receive began is read back, as Commit would; what came since was
// compared with checksums on its way into the file. To read it again would find the same
// memory, not the disk, and take processor time from the writes of clients.
func (r *Receiver) seal(index int, st vfs.FileInfo, whole bool) error {
	fsys, f := r.store.fs, r.info.Files[index]
	// What changes from here on makes it another file, for Commit to look at.
	id, ok := identify(st)
	if !ok || id.size != f.Size {
		return nil // Commit reads it
	}
	if !whole {
		if r.block == nil {
			r.block = make([]byte, readBlock)
		}
		if err := checkFile(context.Background(), fsys, r.imageDir, r.id, f, false, r.block); err != nil {
			return err
		}
	}
	r.sealed[index] = id
	if immutable(f.Name) {
		r.store.opts.Sums.put(id, f.CRC, true) // who makes an image of it need not read it
	}
	return nil
}

// seek sets index and pos from offset.
func (r *Receiver) seek() {
	if r.info == nil {
		return
	}
	r.index, r.pos, r.sum, r.whole = 0, r.offset-int64(len(r.manifest)), 0, false
	for r.index < len(r.info.Files) && r.pos > r.info.Files[r.index].Size {
		r.pos -= r.info.Files[r.index].Size
		r.index++
	}
}

// syncLocked has the current file, its directory entry and the journal made
// durable. Files that were closed since the last time are durable by themselves:
// this only bounds how much is dirty, and what survives is found by reading back.
func (r *Receiver) syncLocked() error {
	file, journal := r.file, r.journal
	return r.side.do(func() error {
		if file != nil {
			if err := file.Sync(); err != nil {
				return fmt.Errorf("snap: fsync a file of image %s: %w", r.id, err)
			}
		}
		if err := syncDir(r.store.fs, r.imageDir); err != nil {
			return err
		}
		if err := journal.Sync(); err != nil {
			return fmt.Errorf("snap: fsync the journal of image %s: %w", r.id, err)
		}
		return nil
	})
}

// Commit compares all that was not compared on its way, or has changed since, with the
// manifest, makes the image durable and adds it to the store. It takes time in
// proportion to what it reads, which is the whole image where files have no identity.
//
// Called before the end of the stream, it returns ErrOutOfOrder and changes
// nothing. After any other error, ErrCorrupt among them, what was received is
// removed, because a resumed receive would end in the same way.
func (r *Receiver) Commit() (Info, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return Info{}, r.err
	}
	if r.offset != r.size {
		return Info{}, fmt.Errorf("%w: image %s is not complete: %d of %d bytes were received; go on sending",
			ErrOutOfOrder, r.id, r.offset, r.size)
	}
	info, err := r.commitLocked()
	if err != nil {
		return Info{}, r.failLocked(err)
	}
	// From here on the image is in the store; what remains is the journal.
	err = r.closeFilesLocked()
	r.endLocked()
	if err != nil {
		r.store.opts.Logger.Warn("closing the files of a received image", "image", r.id, "err", err)
	}
	return info, nil
}

func (r *Receiver) commitLocked() (Info, error) {
	s := r.store
	if err := r.closeFileLocked(); err != nil {
		return Info{}, err
	}
	if err := r.side.end(); err != nil {
		return Info{}, err
	}
	// Everything that is not sealed from the disk: parts of it an earlier process
	// may have stored and not fsynced. (The manifest is always fsynced: it is written before the
	// journal can hold a chunk that completes it, and no receive is resumed
	// without such a chunk.)
	info, _, err := loadManifest(s.fs, r.imageDir, r.id, &s.opts)
	if err != nil {
		return Info{}, err
	}
	if err := checkFiles(context.Background(), s.fs, r.imageDir, info, true, r.sealed); err != nil {
		return Info{}, err
	}
	if err := syncDir(s.fs, r.imageDir); err != nil {
		return Info{}, err
	}
	return s.publish(r.imageDir, info)
}

// Abort ends the receive and removes what was received. After Commit or Close
// it does nothing.
func (r *Receiver) Abort() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return nil
	}
	err := r.closeFilesLocked()
	r.endLocked()
	return err
}

// Close ends the receive and keeps what was received for a later Receive.
// After Commit, Abort or a failure it does nothing.
func (r *Receiver) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return nil
	}
	// What could not be made durable is not kept: see failLocked.
	if err := r.side.end(); err != nil {
		return r.failLocked(err)
	}
	err := r.closeFilesLocked()
	r.err = fmt.Errorf("%w: receiver of image %s", ErrClosed, r.id)
	r.store.release(r.id, r.partial, false)
	return err
}

// failLocked ends the receive because of err, which it returns. The partial
// image goes: after a failed write or fsync the kernel may show pages that
// will never reach the disk, so reading back proves nothing any more.
func (r *Receiver) failLocked(err error) error {
	err = errors.Join(err, r.closeFilesLocked())
	r.endLocked()
	r.err = err
	return err
}

// endLocked removes the partial image and gives up the claim on it.
func (r *Receiver) endLocked() {
	s := r.store
	rmErr := s.fs.RemoveAll(r.dir)
	if rmErr != nil {
		s.opts.Logger.Warn("could not remove a partial receive", "path", r.dir, "err", rmErr)
		s.mu.Lock()
		r.partial.spoiled = true
		s.mu.Unlock()
	}
	r.err = fmt.Errorf("%w: receiver of image %s", ErrClosed, r.id)
	s.release(r.id, r.partial, rmErr == nil)
}

func (r *Receiver) closeFileLocked() error {
	if r.file == nil {
		return nil
	}
	err := r.file.Close()
	r.file = nil
	if err != nil {
		return fmt.Errorf("snap: close a file of image %s: %w", r.id, err)
	}
	return nil
}

func (r *Receiver) closeFilesLocked() error {
	// What goes on beside uses the files.
	_ = r.side.end()
	err := r.closeFileLocked()
	if r.journal != nil {
		if cerr := r.journal.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("snap: close the journal of image %s: %w", r.id, cerr))
		}
		r.journal = nil
	}
	return err
}

// received reads the stream of a partial image from the disk.
type received struct {
	receiver *Receiver
	file     vfs.File
	index    int
}

// readAt fills p with the stream at offset. It returns false when the disk
// does not hold that much.
func (in *received) readAt(p []byte, offset int64) (bool, error) {
	r := in.receiver
	if offset < int64(len(r.manifest)) {
		n := copy(p, r.manifest[offset:])
		p, offset = p[n:], offset+int64(n)
	}
	at := int64(len(r.manifest))
	for i, f := range r.info.Files {
		if len(p) == 0 {
			break
		}
		pos := offset - at
		at += f.Size
		if pos >= f.Size {
			continue
		}
		n := min(int64(len(p)), f.Size-pos)
		if ok, err := in.readFile(i, p[:n], pos); !ok || err != nil {
			return false, err
		}
		p, offset = p[n:], offset+n
	}
	return true, nil
}

func (in *received) readFile(i int, p []byte, pos int64) (bool, error) {
	r := in.receiver
	if in.file == nil || in.index != i {
		in.close()
		path := r.store.fs.PathJoin(r.imageDir, r.info.Files[i].Name)
		f, err := r.store.fs.Open(path)
		if isNotExist(err) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("snap: open %s: %w", path, err)
		}
		in.file, in.index = f, i
	}
	n, err := in.file.ReadAt(p, pos)
	if n == len(p) {
		return true, nil
	}
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	return false, fmt.Errorf("snap: read back image %s: %w", r.id, err)
}

func (in *received) close() {
	if in.file != nil {
		// Opened for reading only: nothing can be lost.
		_ = in.file.Close()
		in.file = nil
	}
}
