package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"conveyor.etl/router/backup"
)

// OpenSource opens the archive that name means: a file, standard input for "-",
// or, as LOCATION/ID with a location such as s3://bucket/prefix, a backup in a
// store (options of the location stay behind the id: s3://b/p/ID?region=x). The
// drivers of stores must have been imported. The caller closes it.
func OpenSource(ctx context.Context, name string, stdin io.Reader) (io.ReadCloser, error) {
	switch {
	case name == "-":
		return io.NopCloser(stdin), nil
	case strings.Contains(name, "://"):
		return openStored(ctx, name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("the backup: %w", err)
	}
	if st, err := f.Stat(); err != nil || st.IsDir() {
		return nil, errors.Join(fmt.Errorf("%s is a directory; name the archive in it, or give file://%s/ID", name, strings.TrimSuffix(name, "/")), err, f.Close())
	}
	return f, nil
}

// splitStored takes LOCATION/ID?options apart.
func splitStored(name string) (location, id string, err error) {
	path, query, hasQuery := strings.Cut(name, "?")
	i := strings.LastIndexByte(path, '/')
	location, id = path[:i], path[i+1:]
	if strings.HasSuffix(location, "/") {
		return "", "", fmt.Errorf("%w %q: give LOCATION/ID, such as s3://bucket/prefix/2024-05-01", backup.ErrInvalidURL, name)
	}
	if hasQuery {
		location += "?" + query
	}
	return location, id, backup.CheckID(id)
}

func openStored(ctx context.Context, name string) (io.ReadCloser, error) {
	location, id, err := splitStored(name)
	if err != nil {
		return nil, err
	}
	store, err := backup.Open(ctx, location)
	if err != nil {
		return nil, err
	}
	r, _, err := store.Get(ctx, id)
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return &stored{r, store}, nil
}

// stored is a backup that is read out of a store.
type stored struct {
	*backup.Reader
	store *backup.Store
}

// Close implements io.Closer.
func (s *stored) Close() error { return errors.Join(s.Reader.Close(), s.store.Close()) }
