package archive

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"sync"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"conveyor.etl/router/snap"
)

// After Unpack the files can be read, after Settle they outlive a power failure, and
// before it there is nothing that could be taken for an image.
func TestUnpackThenSettle(t *testing.T) {
	raw := pack(t, newImage(t, testContent), Zstd, 0)
	disk := vfs.NewCrashableMem()
	u, err := Unpack(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new")
	if err != nil {
		t.Fatal(err)
	}
	if u.Header.Revision != testHeader().Revision || len(u.Info.Files) != len(testContent) {
		t.Errorf("%+v, %d files", u.Header, len(u.Info.Files))
	}
	for _, f := range u.Info.Files {
		if st, err := disk.Stat("new/" + f.Name); err != nil || st.Size() != f.Size {
			t.Errorf("%s cannot be read yet: %v", f.Name, err)
		}
	}
	if err := snap.Check(disk, "new"); err == nil {
		t.Error("an image before it was settled")
	}
	if err := u.Settle(); err != nil {
		t.Fatal(err)
	}
	// The entry of the directory in its parent is the caller's.
	if root, err := disk.OpenDir(""); err != nil || root.Sync() != nil {
		t.Fatal(err)
	}
	if err := snap.Check(disk.CrashClone(vfs.CrashCloneCfg{}), "new"); err != nil {
		t.Errorf("after a power failure: %v", err)
	}
	if err := u.Abandon(); err != nil {
		t.Fatal(err)
	}
	if err := snap.Check(disk, "new"); err != nil {
		t.Errorf("abandoned after it was settled: %v", err)
	}
}

// What is given up, or cannot be stored, leaves nothing: no error of the disk is lost,
// however late it comes.
func TestUnpackThatIsNotSettled(t *testing.T) {
	raw := pack(t, newImage(t, testContent), Zstd, 0)
	gone := func(disk vfs.FS) bool {
		_, err := disk.Stat("new")
		return errors.Is(err, fs.ErrNotExist)
	}
	mem := vfs.NewMem()
	u, err := Unpack(context.Background(), bytes.NewReader(raw), Limits{}, mem, "new")
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Abandon(); err != nil || !gone(mem) {
		t.Errorf("abandoned: %v", err)
	}
	for fail := 0; ; fail++ {
		mem, n, hit := vfs.NewMem(), 0, false
		var mu sync.Mutex
		disk := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if op.Kind != errorfs.OpFileSync && op.Kind != errorfs.OpFileSyncData && op.Kind != errorfs.OpFileClose {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if n++; n-1 == fail {
				hit = true
				return syscall.EIO
			}
			return nil
		}))
		u, err := Unpack(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new")
		if err == nil {
			err = u.Settle()
		}
		if !hit {
			if err != nil || n < len(testContent) {
				t.Fatalf("%d operations, %v", n, err)
			}
			return
		}
		if !errors.Is(err, syscall.EIO) || !gone(mem) {
			t.Fatalf("operation %d: %v", fail, err)
		}
	}
}
