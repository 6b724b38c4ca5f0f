package recovery

import (
	"errors"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// linkAll makes a copy of the database in from: tables, which never change, as
// links, everything else as files of its own.
func linkAll(f vfs.FS, from, to string) error {
	names, err := f.List(from)
	if err != nil {
		return err
	}
	if err := f.MkdirAll(to, 0o755); err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		src, dst := f.PathJoin(from, name), f.PathJoin(to, name)
		st, err := f.Stat(src)
		if err != nil {
			return err
		}
		if st.IsDir() || name == "LOCK" {
			continue
		}
		if strings.HasSuffix(name, ".sst") || strings.HasSuffix(name, ".blob") {
			if f.Link(src, dst) == nil {
				continue
			}
		}
		errs = append(errs, vfs.Copy(f, src, dst))
	}
	return errors.Join(errs...)
}
