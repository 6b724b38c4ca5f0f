package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"conveyor.etl/router/internal/crashpoint"
)

const (
	identityName = "IDENTITY"
	// formatVersion is that of the data directory as a whole. A change that an
	// older binary would misread raises it.
	formatVersion = 1
)

// identity says whose data a data directory holds. It is written before
// anything else; only Initialized changes, once.
type identity struct {
	FormatVersion int       `json:"format_version"`
	ClusterID     uint64    `json:"cluster_id,string"`
	ClusterName   string    `json:"cluster_name"`
	NodeID        uint64    `json:"node_id"`
	Members       []uint64  `json:"initial_members"`
	CreatedAt     time.Time `json:"created_at"`
	// Initialized: the log and the state have been created. From then on a
	// missing log is a loss, not a first start: beginning a new one would let the
	// node vote against promises it does not remember.
	Initialized bool `json:"initialized"`
}

// clusterID derives the id all first members of a cluster agree on without
// having talked to each other. Addresses are no part of it: nodes may know each
// other by different ones.
func clusterID(name string, members []uint64) uint64 {
	var b []byte
	b = fmt.Appendf(b, "conveyor cluster %q of", name)
	for _, id := range members {
		b = fmt.Appendf(b, " %d", id)
	}
	if id := xxhash.Sum64(b); id != 0 {
		return id
	}
	return 1 // zero means "no cluster" on the wire
}

// openIdentity reads the identity of dir and checks it against what the node
// was started as; an empty dir becomes that node's. Its errors match
// ErrForeign, ErrNewer or ErrIncomplete.
func openIdentity(dir string, points *crashpoint.Points, want identity) (identity, error) {
	name := filepath.Join(dir, identityName)
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		points.Pass("identity:before")
		err := createIdentity(dir, want)
		points.Pass("identity:after")
		return want, err
	}
	if err != nil {
		return identity{}, fmt.Errorf("read whose data directory this is: %w", err)
	}
	var version struct {
		FormatVersion int `json:"format_version"`
	}
	if err := json.Unmarshal(raw, &version); err != nil || version.FormatVersion < 1 {
		return identity{}, fmt.Errorf("%w: %s is unreadable, so it is not known whose data this is; "+
			"restore the file, or move the directory away and let the node join afresh", ErrIncomplete, name)
	}
	if version.FormatVersion > formatVersion {
		return identity{}, fmt.Errorf("%w: %s has format %d, this binary knows up to %d; start the newer binary",
			ErrNewer, dir, version.FormatVersion, formatVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	var have identity
	if err := dec.Decode(&have); err != nil || have.NodeID == 0 || have.ClusterID == 0 {
		return identity{}, fmt.Errorf("%w: %s is damaged (%v); "+
			"restore the file, or move the directory away and let the node join afresh", ErrIncomplete, name, err)
	}
	if have.ClusterName != want.ClusterName {
		return identity{}, fmt.Errorf("%w: %s holds data of cluster %q, this node was started for %q; "+
			"correct --cluster-name or --data-dir", ErrForeign, dir, have.ClusterName, want.ClusterName)
	}
	if have.NodeID != want.NodeID {
		return identity{}, fmt.Errorf("%w: %s holds data of node %d, this node was started as %d; "+
			"correct --node-id or --data-dir", ErrForeign, dir, have.NodeID, want.NodeID)
	}
	return have, nil
}

// createIdentity writes the identity of a new data directory. A directory with
// anything else in it is refused: what is there is not ours, or ours without
// the file that says whose it is.
func createIdentity(dir string, id identity) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read the data directory: %w", err)
	}
	tmpName := identityName + ".tmp"
	foreign := slices.IndexFunc(entries, func(e fs.DirEntry) bool {
		return e.Name() != lockName && e.Name() != tmpName && e.Name() != "lost+found"
	})
	if foreign >= 0 {
		return fmt.Errorf("%w: %s has no %s file but holds %q; give an empty directory, or restore the file",
			ErrIncomplete, dir, identityName, entries[foreign].Name())
	}
	return writeIdentity(dir, id)
}

func writeIdentity(dir string, id identity) error {
	raw, err := json.MarshalIndent(id, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", identityName, err)
	}
	tmp := filepath.Join(dir, identityName+".tmp")
	if err := writeSynced(tmp, append(raw, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", identityName, err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, identityName)); err != nil {
		return fmt.Errorf("write %s: %w", identityName, err)
	}
	return syncDir(dir)
}

func writeSynced(name string, raw []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
