package shelf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/snap"
)

// Origin says how a snapshot came to a node.
type Origin string

// The origins of a snapshot.
const (
	Created  Origin = "created"
	Uploaded Origin = "uploaded"
	Undo     Origin = "undo" // the state that a restore replaced
	// Temporary is a step of a backup that is made elsewhere; it does not outlive
	// the process.
	Temporary Origin = "temporary"
)

// Record describes one snapshot.
type Record struct {
	// ID is what its user calls it, Image what the image store does.
	ID     string `json:"id"`
	Image  string `json:"image"`
	Origin Origin `json:"origin"`
	// CreatedMS is when the copy of the state was made, in Unix milliseconds, by
	// the clock of the node that made it.
	CreatedMS int64 `json:"created_ms"`
	// ArrivedMS is when it came to this node, by which the oldest is told.
	ArrivedMS int64 `json:"arrived_ms"`
	// Bytes is the size of the image.
	Bytes int64 `json:"bytes"`
	// Index, Term, Revision and Epoch are those of the state.
	Index    uint64 `json:"index"`
	Term     uint64 `json:"term"`
	Revision uint64 `json:"revision"`
	Epoch    uint64 `json:"epoch"`
	// ClusterID and ClusterName are of the cluster whose state it is.
	ClusterID   uint64 `json:"cluster_id,string"`
	ClusterName string `json:"cluster_name"`
	// Counts says how many records there are of each kind; of those that are not
	// counted as they come, once ContentHash is there.
	Counts map[string]uint64 `json:"counts,omitempty"`
	// ContentHash is the hex SHA-256 of the content; empty until it was
	// computed, which reads everything.
	ContentHash string `json:"content_hash,omitempty"`
	// Version is the version of the program that made it.
	Version string `json:"version,omitempty"`
	// Agreed: after it was made, the state of its node was found to be that of a
	// majority of the cluster.
	Agreed bool `json:"agreed,omitempty"`
	// Suspect is why it is not to be trusted: the state of its node turned out to
	// be wrong, and before the snapshot was made nobody had seen that it was not so
	// already. It is neither restored nor streamed. Empty: no reason is known.
	Suspect string `json:"suspect,omitempty"`
}

const recordSuffix = ".json"

// maxRecordBytes bounds a record that is read.
const maxRecordBytes = 1 << 20

// CheckID reports whether id can name a snapshot; the error matches
// snap.ErrInvalidID. It is 1 to 128 characters of A-Z a-z 0-9 . _ - and does
// not start with a dot, so it can be joined to a path.
func CheckID(id string) error {
	if err := snap.CheckID(id); err != nil {
		return err
	}
	if id == imagesDir {
		return fmt.Errorf("%w %q: the name is reserved", snap.ErrInvalidID, id)
	}
	return nil
}

// readRecord reads the record in file name of dir.
func readRecord(f vfs.FS, dir, name string) (Record, error) {
	var r Record
	path := f.PathJoin(dir, name)
	file, err := f.Open(path)
	if err != nil {
		return r, err
	}
	raw, err := io.ReadAll(io.LimitReader(file, maxRecordBytes))
	if err = errors.Join(err, file.Close()); err != nil {
		return r, err
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("shelf: %s: %w", path, err)
	}
	if r.ID+recordSuffix != name {
		return r, fmt.Errorf("shelf: %s is of snapshot %q", path, r.ID)
	}
	return r, errors.Join(CheckID(r.ID), snap.CheckID(r.Image))
}

// writeRecord makes r durable.
func writeRecord(f vfs.FS, dir string, r *Record) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	tmp := f.PathJoin(dir, "."+r.ID+".tmp")
	file, err := f.Create(tmp, "backup-record")
	if err != nil {
		return err
	}
	_, err = file.Write(append(raw, '\n'))
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = f.Rename(tmp, f.PathJoin(dir, r.ID+recordSuffix))
	}
	if err != nil {
		_ = f.Remove(tmp)
		return err
	}
	return syncDir(f, dir)
}

func removeRecord(f vfs.FS, dir, id string) error {
	if err := f.Remove(f.PathJoin(dir, id+recordSuffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(f, dir)
}

func syncDir(f vfs.FS, dir string) error {
	d, err := f.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Created returns when the copy was made.
func (r *Record) Created() time.Time { return time.UnixMilli(r.CreatedMS) }

// isRecord reports whether name is that of a record, and the id in it.
func isRecord(name string) (string, bool) {
	id, ok := strings.CutSuffix(name, recordSuffix)
	return id, ok && CheckID(id) == nil
}
