package server

import (
	"errors"
	"fmt"
	"io/fs"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/crashpoint"
)

// openIdentity reads the identity of dir and checks it against what the node
// was started as; an empty dir becomes that node's. Its errors match
// ErrForeign, ErrNewer or ErrIncomplete. fresh reports whether it was empty, or
// was left by a first start that did not come to its end.
func openIdentity(dir string, points *crashpoint.Points, want datadir.Identity) (id datadir.Identity, fresh bool, err error) {
	have, err := datadir.ReadIdentity(dir)
	if errors.Is(err, fs.ErrNotExist) {
		points.Pass("identity:before")
		err := createIdentity(dir, want)
		points.Pass("identity:after")
		return want, true, err
	}
	if err != nil {
		return datadir.Identity{}, false, err
	}
	if have.ClusterName != want.ClusterName {
		return datadir.Identity{}, false, fmt.Errorf("%w: %s holds data of cluster %q, this node was started for %q; "+
			"correct --cluster-name or --data-dir", ErrForeign, dir, have.ClusterName, want.ClusterName)
	}
	if have.NodeID != want.NodeID {
		return datadir.Identity{}, false, fmt.Errorf("%w: %s holds data of node %d, this node was started as %d; "+
			"correct --node-id or --data-dir", ErrForeign, dir, have.NodeID, want.NodeID)
	}
	if have.Removed {
		return datadir.Identity{}, false, removedError(have.NodeID, dir)
	}
	if have.DiskID == 0 { // of an earlier release
		have.DiskID, have.FormatVersion = want.DiskID, datadir.FormatVersion
		return have, !have.Initialized, datadir.WriteIdentity(dir, have)
	}
	return have, !have.Initialized, nil
}

// createIdentity writes the identity of a new data directory. A directory with
// anything else in it is refused: what is there is not ours, or ours without
// the file that says whose it is.
func createIdentity(dir string, id datadir.Identity) error {
	foreign, err := datadir.Foreign(dir)
	if err != nil {
		return err
	}
	if foreign != "" {
		return fmt.Errorf("%w: %s has no %s file but holds %q; give an empty directory, or restore the file",
			ErrIncomplete, dir, datadir.IdentityName, foreign)
	}
	return datadir.WriteIdentity(dir, id)
}
