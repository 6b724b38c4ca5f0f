package backup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"gocloud.dev/blob"
)

// readAttempts is how often in a row a broken transfer is taken up again
// without a byte in between.
const readAttempts = 4

// Reader is the archive of one backup. It is for one caller at a time.
type Reader struct {
	ctx   context.Context
	store *Store
	meta  Metadata
	in    *blob.Reader
	at    int64
	sum   hash.Hash
	fails int
	err   error
}

// Get opens the archive of backup id. A transfer that breaks is taken up again
// where it broke. Close frees it.
func (s *Store) Get(ctx context.Context, id string) (*Reader, Metadata, error) {
	m, err := s.Describe(ctx, id)
	if err != nil {
		return nil, m, err
	}
	r := &Reader{ctx: ctx, store: s, meta: m, sum: sha256.New()}
	// Opened at once: an archive that is missing is better noticed here.
	if err := r.open(); err != nil {
		return nil, m, err
	}
	if size := r.in.Size(); size != int64(m.SizeBytes) {
		return nil, m, errors.Join(r.damaged("it has %d bytes, its description says %d", size, m.SizeBytes), r.in.Close())
	}
	return r, m, nil
}

func (r *Reader) damaged(format string, args ...any) error {
	return &DamagedError{ID: r.meta.BackupID, Object: ArchiveName, Detail: fmt.Sprintf(format, args...)}
}

func (r *Reader) open() error {
	in, err := r.store.bucket.NewRangeReader(r.ctx, key(r.meta.BackupID, ArchiveName), r.at, -1, nil)
	switch {
	case missing(err):
		return r.damaged("it is missing")
	case err != nil:
		return r.store.fail("read", r.meta.BackupID, err)
	}
	r.in = in
	return nil
}

// Read implements io.Reader. At the end it compares size and sha256 with the
// description and returns a *DamagedError in place of io.EOF when they differ:
// until then, nothing of what was read is proved. (Descriptions that other
// tools wrote have no sha256; the archive has a checksum of its own.)
func (r *Reader) Read(p []byte) (int, error) {
	for r.err == nil {
		n, err := r.step(p)
		if n > 0 {
			return n, nil
		}
		r.err = err
		if err == nil && len(p) == 0 {
			return 0, nil
		}
	}
	return 0, r.err
}

// step reads what comes next. It returns nothing at all when it should be
// called again.
func (r *Reader) step(p []byte) (int, error) {
	if r.in == nil {
		if err := r.open(); err != nil {
			return 0, r.again(err)
		}
	}
	n, err := r.in.Read(p)
	if n > 0 {
		r.sum.Write(p[:n])
		r.at += int64(n)
		r.fails = 0
		if r.at > int64(r.meta.SizeBytes) {
			return 0, r.damaged("it has more than the %d bytes of its description", r.meta.SizeBytes)
		}
		return n, nil
	}
	switch {
	case err == nil:
		return 0, nil
	case !errors.Is(err, io.EOF):
		return 0, r.again(r.store.fail("read", r.meta.BackupID, err))
	case r.at < int64(r.meta.SizeBytes):
		// Opened with the right size, so this is a connection that ended.
		return 0, r.again(r.damaged("it ends after %d of %d bytes", r.at, r.meta.SizeBytes))
	case r.meta.SHA256 != "" && hex.EncodeToString(r.sum.Sum(nil)) != r.meta.SHA256:
		return 0, r.damaged("its sha256 is %x, its description says %s", r.sum.Sum(nil), r.meta.SHA256)
	}
	return 0, io.EOF
}

// again returns err when it is time to give up.
func (r *Reader) again(err error) error {
	if r.in != nil {
		// It has failed already.
		_ = r.in.Close()
		r.in = nil
	}
	if r.fails++; r.fails >= readAttempts || r.ctx.Err() != nil || errors.Is(err, ErrDamaged) && r.at == 0 {
		return err
	}
	return nil
}

// Close ends the transfer.
func (r *Reader) Close() error {
	if r.in == nil {
		return nil
	}
	err := r.in.Close()
	r.in = nil
	r.err = errors.New("backup: the reader is closed")
	if err != nil {
		return r.store.fail("close", r.meta.BackupID, err)
	}
	return nil
}
