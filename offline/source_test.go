package offline

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/archive"
)

func TestSplitStored(t *testing.T) {
	for _, c := range []struct {
		name, location, id string
		err                error
	}{
		{name: "s3://bucket/some/prefix/a.1", location: "s3://bucket/some/prefix", id: "a.1"},
		{name: "s3://bucket/a?region=x&endpoint=http://h:1/y", location: "s3://bucket?region=x&endpoint=http://h:1/y", id: "a"},
		{name: "file:///var/backups/a", location: "file:///var/backups", id: "a"},
		{name: "s3://bucket", err: backup.ErrInvalidURL},
		{name: "file:///a", err: backup.ErrInvalidURL},
		{name: "s3://bucket/", err: backup.ErrInvalidID},
		{name: "s3://bucket/..", err: backup.ErrInvalidID},
		{name: "://", err: backup.ErrInvalidURL},
	} {
		location, id, err := splitStored(c.name)
		if c.err != nil {
			if !errors.Is(err, c.err) {
				t.Errorf("%s: %v, want %v", c.name, err, c.err)
			}
			continue
		}
		if location != c.location || id != c.id || err != nil {
			t.Errorf("%s: %q %q %v", c.name, location, id, err)
		}
	}
}

// A cluster is made from a file, from standard input and from a store alike.
func TestRestoreFromEverySource(t *testing.T) {
	raw, before := saved(t, archive.Zstd)
	dir := t.TempDir()
	file := filepath.Join(dir, "b.tar.zst")
	must(t, os.WriteFile(file, raw, 0o600))
	store, err := backup.Create(within(t), "file://"+filepath.Join(dir, "store"))
	must(t, err)
	h := before.Header
	_, err = store.Put(within(t), backup.Metadata{BackupID: "nightly-1", ClusterID: h.ClusterID, CreatedAt: h.Created()}, bytes.NewReader(raw))
	must(t, errors.Join(err, store.Close()))

	first := ""
	for _, name := range []string{file, "-", "file://" + filepath.Join(dir, "store", "nightly-1")} {
		in, err := OpenSource(within(t), name, bytes.NewReader(raw))
		must(t, err)
		res, err := Restore(within(t), in, RestoreOptions{Settings: testSettings(), Dir: filepath.Join(t.TempDir(), "n"),
			ClusterName: "c", NodeID: 1, Members: []uint64{1}})
		must(t, errors.Join(err, in.Close()))
		if first == "" {
			first = res.ClusterID
		}
		if res.StateHash != h.StateHash || res.ClusterID != first {
			t.Errorf("%s: %+v", name, res)
		}
	}
	for name, want := range map[string]error{
		filepath.Join(dir, "nosuch"):                      os.ErrNotExist,
		"file://" + filepath.Join(dir, "store", "nosuch"): backup.ErrNotFound,
		"file://" + filepath.Join(dir, "nosuch", "a"):     backup.ErrNotFound,
		"gopher://x/a": backup.ErrInvalidURL,
	} {
		if in, err := OpenSource(within(t), name, nil); !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", name, in, err)
		}
	}
	if _, err := OpenSource(within(t), dir, nil); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Error(err)
	}
	// Damage in a store is noticed by the store's own checksum as well.
	stored := filepath.Join(dir, "store", "nightly-1", "checkpoint.tar.zst")
	bad := bytes.Clone(raw)
	bad[len(bad)/2] ^= 1
	must(t, os.WriteFile(stored, bad, 0o600))
	in, err := OpenSource(within(t), "file://"+filepath.Join(dir, "store", "nightly-1"), nil)
	must(t, err)
	if _, err := io.Copy(io.Discard, in); !errors.Is(err, backup.ErrDamaged) {
		t.Error(err)
	}
	must(t, in.Close())
}
