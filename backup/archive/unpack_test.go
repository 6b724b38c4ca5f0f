package archive

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"path"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

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

// The manifest is not even begun before every file is durable: after a power failure, what
// has one is an image. Each file takes the disk an hour, so that whoever does not wait for
// it is much too early.
func TestManifestComesLast(t *testing.T) {
	raw := pack(t, newImage(t, testContent), Zstd, 0)
	ways := map[string]func(disk vfs.FS) error{
		"extract": func(disk vfs.FS) error {
			_, _, err := Extract(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new")
			return err
		},
		"unpack": func(disk vfs.FS) error {
			u, err := Unpack(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new")
			if err == nil {
				err = u.Settle()
			}
			return err
		},
	}
	for name, way := range ways {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			durable, made := map[string]bool{}, false
			disk := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
				file := path.Base(op.Path)
				stores := op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData
				if _, ok := testContent[file]; ok && stores {
					<-time.NewTimer(time.Hour).C
					mu.Lock()
					durable[file] = true
					mu.Unlock()
				}
				if file == snap.ManifestName && op.Kind == errorfs.OpCreate {
					mu.Lock()
					made = true
					if len(durable) < len(testContent) {
						t.Errorf("%s: the manifest is begun when only %v are durable", name, durable)
					}
					mu.Unlock()
				}
				return nil
			}))
			if err := way(disk); err != nil || !made {
				t.Errorf("%s: manifest %t, %v", name, made, err)
			}
		})
	}
}

// Given up, nobody waits for the disk but for what it does already.
func TestAbandonDoesNotStore(t *testing.T) {
	raw := pack(t, newImage(t, testContent), Zstd, 0)
	synctest.Test(t, func(t *testing.T) {
		disk := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
			if op.Kind == errorfs.OpFileSync {
				<-time.NewTimer(time.Hour).C
			}
			return nil
		}))
		begun := time.Now()
		u, err := Unpack(context.Background(), bytes.NewReader(raw), Limits{}, disk, "new")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // as many as may are on their way to the disk
		if err := u.Abandon(); err != nil || time.Since(begun) > time.Hour {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
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
