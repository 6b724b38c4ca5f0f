package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/backup/archive"
	"conveyor.etl/router/datadir"
	"conveyor.etl/router/snap"
)

// SaveOptions say how to make a backup of a directory.
type SaveOptions struct {
	Compression archive.Compression
	// Scratch is where the copy is made that the log is applied to; "" = the
	// system's directory of temporary files.
	Scratch string
	// Version is that of the program.
	Version string
	Logger  *slog.Logger
}

// Saved is the outcome of Save.
type Saved struct {
	Header archive.Header `json:"header"`
	Bytes  int64          `json:"bytes"`
	// Uncommitted entries of the log are not in it: they are not known to have
	// been committed.
	Uncommitted uint64 `json:"uncommitted"`
}

// Save writes an archive of what d holds to out: the state with the entries of
// the log applied that are known to be committed.
func Save(ctx context.Context, d *Directory, out io.Writer, o SaveOptions) (_ *Saved, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s, err := d.ReplayState(o.Scratch, o.Logger)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	hash, err := contentHash(ctx, s.View)
	if err != nil {
		return nil, err
	}
	counts, err := s.Counts()
	if err != nil {
		return nil, err
	}
	images, err := snap.OpenStore(vfs.Default, filepath.Join(s.scratch, datadir.ImagesName), snap.Options{Logger: o.Logger})
	if err != nil {
		return nil, err
	}
	info, err := images.Create(ctx, func(dir string) (snap.Meta, error) {
		pos, err := s.fsm.Image(dir)
		// A backup holds state only: neither members nor votes.
		return snap.Meta{Index: pos.Index, Term: pos.Term}, err
	})
	if err != nil {
		return nil, err
	}
	r, err := images.Open(info.ID)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	res := &Saved{Uncommitted: s.Following, Header: archive.Header{
		Format: archive.FormatVersion, ClusterID: fmt.Sprintf("%016x", d.Identity.ClusterID), ClusterName: d.Identity.ClusterName,
		Epoch: s.Epoch(), Revision: s.Revision(), Index: info.Index, Term: info.Term,
		StateHash: hash, Counts: countsByName(counts), CreatedUnixMsec: info.Created.UnixMilli(), RouterVersion: o.Version,
	}}
	a, err := archive.NewArchive(ctx, r, res.Header, o.Compression, 0)
	if err != nil {
		return nil, err
	}
	res.Bytes, err = io.Copy(out, a)
	return res, errors.Join(err, a.Close())
}

// SaveFile is Save into the file name, which must not exist. It appears whole
// or not at all.
func SaveFile(ctx context.Context, d *Directory, name string, o SaveOptions) (*Saved, error) {
	if _, err := os.Lstat(name); err == nil {
		return nil, fmt.Errorf("%w: %s; nothing was done, remove it or give another name", os.ErrExist, name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*.tmp")
	if err != nil {
		return nil, fmt.Errorf("write the backup: %w", err)
	}
	res, err := Save(ctx, d, f, o)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return nil, errors.Join(err, ignoreMissing(os.Remove(f.Name())))
	}
	return res, datadir.SyncDir(filepath.Dir(name))
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
