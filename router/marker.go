package router

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sort"
	"strconv"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// The file CURRENT names the database directory in use. It is replaced by
// rename, so a crash leaves either the old or the new one in force.
const (
	markerName = "CURRENT"
	// creatingName is there while the first database is being made.
	creatingName = "CREATING"
	dbPrefix     = "db-"
)

func dbName(n uint64) string { return fmt.Sprintf("%s%06d", dbPrefix, n) }

func parseDBName(s string) (uint64, bool) {
	digits, ok := strings.CutPrefix(s, dbPrefix)
	if !ok || len(digits) < 6 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil && n > 0
}

// readMarker returns the name in CURRENT, "" when there is no such file.
func readMarker(f vfs.FS, root string) (string, error) {
	file, err := f.Open(f.PathJoin(root, markerName))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(file, 256))
	if err = errors.Join(err, file.Close()); err != nil {
		return "", err
	}
	name := strings.TrimSpace(string(b))
	if _, ok := parseDBName(name); !ok {
		return "", fmt.Errorf("%w: %s says %q, which is no database name", ErrCorrupt, f.PathJoin(root, markerName), name)
	}
	return name, nil
}

// writeMarker makes CURRENT name a directory, durably.
func writeMarker(f vfs.FS, root, name string) error {
	tmp := f.PathJoin(root, markerName+".tmp")
	if err := writeFile(f, tmp, []byte(name+"\n")); err != nil {
		return err
	}
	if err := f.Rename(tmp, f.PathJoin(root, markerName)); err != nil {
		return err
	}
	return syncDir(f, root)
}

func writeFile(f vfs.FS, path string, b []byte) error {
	file, err := f.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = file.Write(b)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

func syncDir(f vfs.FS, dir string) error {
	d, err := f.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// databases lists the numbers of the database directories, ascending.
func databases(f vfs.FS, root string) ([]uint64, error) {
	names, err := f.List(root)
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, n := range names {
		if v, ok := parseDBName(f.PathBase(n)); ok {
			out = append(out, v)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i] < out[j] })
	return out, nil
}

// makeDir creates dir and what is missing above it, durably: a directory whose
// parent was never synced is gone after a power failure, with all the synced
// files in it.
func makeDir(f vfs.FS, dir string) error {
	if _, err := f.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := f.PathDir(dir)
	if parent != dir && parent != "." {
		if err := makeDir(f, parent); err != nil {
			return err
		}
	}
	if err := f.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return syncDir(f, parent)
}
