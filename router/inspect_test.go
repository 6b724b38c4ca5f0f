package router

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A damaged table is an error to whoever reads it, and then the end of the
// replica; never of the process.
func TestDamagedTable(t *testing.T) {
	root := filepath.Join(t.TempDir(), "state")
	s := open(t, vfs.Default, root)
	for i := range 200 {
		do(t, s, fmt.Sprintf(`commit_source_offset { source_id: "s" partition: %d offset: 1 }`, i))
	}
	noError(t, s.Close())
	dir, err := CurrentDir(vfs.Default, root)
	noError(t, err)
	pos, err := ReadPosition(vfs.Default, dir)
	if err != nil || pos.Index != 201 {
		t.Fatalf("position %+v, %v", pos, err)
	}
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	noError(t, err)
	for _, name := range tables {
		raw, err := os.ReadFile(name)
		noError(t, err)
		for i := range 40 {
			raw[100+i] ^= 0xff
		}
		noError(t, os.WriteFile(name, raw, 0o600))
	}
	image, err := OpenImage(vfs.Default, dir, Options{})
	if err == nil {
		v := image.View()
		_, err = v.Hash()
		noError(t, errors.Join(v.Close(), image.Close()))
	}
	if err == nil {
		t.Error("an image with a damaged table was read")
	}
	s, err = Open(vfs.Default, root, testOptions())
	if err != nil {
		return // the damage was in what opening reads
	}
	v := s.View()
	if _, err := v.Hash(); err == nil {
		t.Error("a damaged table was read")
	}
	noError(t, v.Close())
	if _, err := s.Apply([]Entry{{Index: 202, Term: 1}}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("the replica goes on: %v", err)
	}
	if err := s.Close(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("close: %v", err)
	}
}

func TestCurrentDirWithoutState(t *testing.T) {
	mem := vfs.NewMem()
	noError(t, mem.MkdirAll("state", 0o755))
	if _, err := CurrentDir(mem, "state"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	noError(t, mem.MkdirAll("state/db-000003", 0o755))
	if _, err := CurrentDir(mem, "state"); !errors.Is(err, ErrLostMarker) || !strings.Contains(err.Error(), "db-000003") {
		t.Error(err)
	}
}
