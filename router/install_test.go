package router

import (
	"errors"
	"fmt"
	randv2 "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"conveyor.etl/router/router/commandpb"
)

func offsetCommand(source string, offset uint64) *commandpb.Command {
	return &commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{
		CommitSourceOffset: &commandpb.CommitSourceOffset{SourceId: source, Offset: offset},
	}}
}

// withImage makes a file system with an image of one state and another state,
// both with some tables on disk, and says what their hashes are.
func withImage(t *testing.T) (fs *vfs.MemFS, oldHash, newHash string) {
	fs = vfs.NewCrashableMem()
	src := open(t, fs, "source")
	for i := range 40 {
		apply(t, src, offsetCommand(fmt.Sprint("new-", i), 7))
		if i%15 == 0 {
			_, err := src.Flush()
			noError(t, err)
		}
	}
	_, err := src.Image("image")
	noError(t, err)
	newHash = hash(t, src)
	noError(t, src.Close())
	// The image store syncs what it keeps.
	noError(t, errors.Join(syncDir(fs, "image"), syncDir(fs, "")))
	dst := open(t, fs, "state")
	apply(t, dst, offsetCommand("old", 3))
	oldHash = hash(t, dst)
	noError(t, dst.Close())
	return fs, oldHash, newHash
}

// nthWrite does something at one write operation, the at-th.
type nthWrite struct {
	at    int32
	do    func(errorfs.Op) error
	seen  atomic.Int32
	fired atomic.Bool
	off   atomic.Bool
}

func (n *nthWrite) String() string { return fmt.Sprintf("write %d", n.at) }

func (n *nthWrite) MaybeError(op errorfs.Op) error {
	if n.off.Load() || op.Kind.ReadOrWrite() != errorfs.OpIsWrite || n.seen.Add(1)-1 != n.at {
		return nil
	}
	n.fired.Store(true)
	return n.do(op)
}

// cloning keeps a file system from being copied while a file is linked: MemFS takes its
// lock for reading twice then, and between the two would wait for the copy, which waits
// for the first.
var cloning sync.RWMutex

type linkable struct{ *vfs.MemFS }

func (f linkable) Link(from, to string) error {
	cloning.RLock()
	defer cloning.RUnlock()
	return f.MemFS.Link(from, to)
}

// faulty is fs with what inj does at its operations.
func faulty(fs *vfs.MemFS, inj errorfs.Injector) vfs.FS { return errorfs.Wrap(linkable{fs}, inj) }

func crash(fs *vfs.MemFS, percent int, seed uint64) *vfs.MemFS {
	cloning.Lock()
	defer cloning.Unlock()
	return fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: randv2.New(randv2.NewPCG(seed, 1))})
}

// everyWrite runs a test for each write operation of what it does, once
// cutting the power just before it and once letting it fail and cutting the
// power afterwards.
func everyWrite(t *testing.T, run func(t *testing.T, inj *nthWrite, crashed func(fs *vfs.MemFS) []*vfs.MemFS)) {
	r := randomness(t)
	// Nothing or all of what was not synced survives. In between Pebble's own
	// marker may outlive the manifest it names.
	percents := []int{0, 100}
	t.Run("power cut", func(t *testing.T) {
		for at := int32(0); ; at++ {
			inj := &nthWrite{at: at}
			var clones []*vfs.MemFS
			var base *vfs.MemFS
			seed := r.Uint64()
			inj.do = func(errorfs.Op) error {
				for _, p := range percents {
					clones = append(clones, crash(base, p, seed))
				}
				return nil
			}
			run(t, inj, func(fs *vfs.MemFS) []*vfs.MemFS {
				if base == nil {
					base = fs
					return nil
				}
				return clones
			})
			if !inj.fired.Load() {
				t.Logf("%d writes", at)
				return
			}
		}
	})
	t.Run("failing write", func(t *testing.T) {
		for at := int32(0); ; at++ {
			inj := &nthWrite{at: at, do: func(op errorfs.Op) error {
				// Pebble ends the process when its own files cannot be written,
				// or runs into its own compaction while it gives up an Open.
				its := strings.Contains(op.Path, dbPrefix) || strings.Contains(op.Path, undoPrefix) && op.Kind != errorfs.OpRename
				if its && !strings.HasSuffix(op.Path, ".sst") {
					return nil
				}
				return errorfs.ErrInjected
			}}
			first := true
			seed := r.Uint64()
			run(t, inj, func(fs *vfs.MemFS) (clones []*vfs.MemFS) {
				if first {
					first = false
					return nil
				}
				inj.off.Store(true)
				for _, p := range percents {
					clones = append(clones, crash(fs, p, seed))
				}
				return clones
			})
			if !inj.fired.Load() {
				return
			}
		}
	})
}

// TestInstallSurvivesACrashAnywhere: what is found afterwards is the old or
// the new state, whole, and the image can be installed again; also where what Install
// leaves for later is done later.
func TestInstallSurvivesACrashAnywhere(t *testing.T) {
	t.Run("at once", func(t *testing.T) { installCrashes(t, false) })
	t.Run("later", func(t *testing.T) { installCrashes(t, true) })
}

func installCrashes(t *testing.T, later bool) {
	everyWrite(t, func(t *testing.T, inj *nthWrite, crashed func(*vfs.MemFS) []*vfs.MemFS) {
		fs, oldHash, newHash := withImage(t)
		crashed(fs)
		o, settle := testOptions(), func() {}
		if later {
			o.Installed = func(f func()) { settle = f }
		}
		s, err := Open(faulty(fs, inj), "state", o)
		if err == nil {
			_, err = s.Install("image")
			if err == nil && !inj.fired.Load() {
				settle()
				s.retiring.Wait()
			}
			if err == nil && !inj.fired.Load() {
				// Power is lost right after Install returned.
				inj.off.Store(true)
				after := open(t, crash(fs, 0, 1), "state")
				if hash(t, after) != newHash {
					t.Fatal("Install had returned, but the old state is back")
				}
				noError(t, after.Close())
			}
		}
		for _, c := range crashed(fs) {
			after := open(t, c, "state")
			if got := hash(t, after); got != oldHash && got != newHash {
				t.Fatalf("write %d: neither the old nor the new state: %s", inj.at, dump(t, after))
			}
			_, err := after.Install("image")
			noError(t, err)
			if hash(t, after) != newHash {
				t.Fatalf("write %d: the second Install gave another state", inj.at)
			}
			after.retiring.Wait()
			left, err := databases(c, "state")
			noError(t, err)
			if len(left) != 1 {
				t.Fatalf("write %d: databases %v are left, want one", inj.at, left)
			}
			noError(t, after.Close())
		}
		inj.off.Store(true)
		if s != nil {
			_ = s.Close()
		}
	})
}

// TestInstallResyncsReaders: views keep the old state until closed,
// subscriptions end, and later changes have the new state's revisions.
func TestInstallResyncsReaders(t *testing.T) {
	fs, oldHash, newHash := withImage(t)
	s := open(t, fs, "state")
	sub, err := s.Hub().Subscribe(s.Revision())
	noError(t, err)
	view := s.View()
	h, err := view.Hash()
	noError(t, err)
	_, err = s.Install("image")
	noError(t, err)
	if _, _, err := sub.Next(t.Context()); !errors.Is(err, ErrResync) {
		t.Fatalf("a subscription across Install ended with %v, want ErrResync", err)
	}
	again, err := view.Hash()
	noError(t, err)
	if fmt.Sprintf("%x", h) != oldHash || string(again) != string(h) {
		t.Fatal("the view of the old state changed")
	}
	if left, _ := databases(fs, "state"); len(left) != 2 {
		t.Fatalf("the old database was removed under an open view: %v", left)
	}
	noError(t, view.Close())
	s.retiring.Wait()
	if left, _ := databases(fs, "state"); len(left) != 1 {
		t.Fatalf("the old database is left: %v", left)
	}
	if hash(t, s) != newHash || s.Revision() != 41 || s.Applied().Index != 41 || s.Durable() != 41 {
		t.Fatalf("revision %d, applied %d, durable %d after Install, want 41", s.Revision(), s.Applied().Index, s.Durable())
	}
	sub, err = s.Hub().Subscribe(41)
	noError(t, err)
	do(t, s, `put_pipeline { spec { id: "p" } }`)
	changes, at, err := sub.Next(t.Context())
	noError(t, err)
	if len(changes) != 1 || at != 42 {
		t.Fatalf("%d changes up to %d, want 1 up to 42", len(changes), at)
	}
	noError(t, s.Close())
}

// TestLostMarkerIsRefused: without CURRENT a state must not be taken for a
// first start, which would forget everything.
func TestLostMarkerIsRefused(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	apply(t, s, offsetCommand("a", 1))
	noError(t, s.Close())
	noError(t, fs.Remove("state/CURRENT"))
	if _, err := Open(fs, "state", testOptions()); !errors.Is(err, ErrLostMarker) {
		t.Fatalf("got %v, want ErrLostMarker", err)
	}
	noError(t, writeFile(fs, "state/CURRENT", []byte("db-000001\n")))
	s = open(t, fs, "state")
	if s.Applied().Index != 2 {
		t.Fatalf("applied %d, want 2", s.Applied().Index)
	}
	noError(t, s.Close())
}

// TestFirstOpenSurvivesACrashAnywhere: a first start can be repeated whenever
// it was cut short.
func TestFirstOpenSurvivesACrashAnywhere(t *testing.T) {
	everyWrite(t, func(t *testing.T, inj *nthWrite, crashed func(*vfs.MemFS) []*vfs.MemFS) {
		fs := vfs.NewCrashableMem()
		crashed(fs)
		s, err := Open(faulty(fs, inj), "data/state", testOptions())
		for _, c := range crashed(fs) {
			after := open(t, c, "data/state")
			if got := after.Applied(); got.Index != 1 || string(got.Members) != "members" {
				t.Fatalf("write %d: started at %+v", inj.at, got)
			}
			apply(t, after, offsetCommand("a", 1))
			noError(t, after.Close())
		}
		inj.off.Store(true)
		if err == nil {
			_ = s.Close()
		}
	})
}

// TestNewerFormatIsRefused and nothing is changed by the attempt.
func TestNewerFormatIsRefused(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	noError(t, s.cur.db.Set(key(nil).meta(metaFormat), []byte{0, 0, 0, 99}, pebble.NoSync))
	noError(t, s.Close())
	if _, err := Open(fs, "state", testOptions()); !errors.Is(err, ErrNewerFormat) {
		t.Fatalf("got %v, want ErrNewerFormat", err)
	}
}

// TestWriteFailureStopsTheReplica: a flush that cannot be written says so at
// once instead of waiting for ever, and nothing is applied after it.
func TestWriteFailureStopsTheReplica(t *testing.T) {
	fail := errorfs.Toggle{Injector: errorfs.ErrInjected.If(errorfs.Writes)}
	s, err := Open(faulty(vfs.NewMem(), &fail), "state", testOptions())
	noError(t, err)
	apply(t, s, offsetCommand("a", 1))
	fail.On()
	if _, err := s.Flush(); err == nil {
		t.Fatal("Flush succeeded on a broken disk")
	}
	if s.Durable() != 1 {
		t.Fatalf("durable is %d after a failed flush, want 1", s.Durable())
	}
	if _, err := s.Apply([]Entry{{Index: 3}}); err == nil {
		t.Fatal("Apply goes on after a failed write")
	}
	fail.Off()
	_ = s.Close()
}

// TestInstallSettles: what Install leaves for later is done when it is asked for, or
// by Close, and a release that comes after that does nothing.
func TestInstallSettles(t *testing.T) {
	for _, by := range []string{"settle", "Close", "another Install"} {
		t.Run(by, func(t *testing.T) {
			fs, _, newHash := withImage(t)
			var settle func()
			o := testOptions()
			o.Installed = func(f func()) { settle = f }
			s, err := Open(fs, "state", o)
			noError(t, err)
			defer s.Close()
			_, err = s.Install("image")
			noError(t, err)
			first := settle
			if left, _ := databases(fs, "state"); len(left) != 2 {
				t.Fatalf("the old database is not left for later: %v", left)
			}
			if hash(t, s) != newHash {
				t.Fatal("the new state is not in force")
			}
			want := 1
			switch by {
			case "settle":
				settle()
			case "Close":
				noError(t, s.Close())
			default:
				_, err = s.Install("image")
				noError(t, err)
				want = 2
			}
			s.retiring.Wait()
			first()
			if left, _ := databases(fs, "state"); len(left) != want {
				t.Fatalf("%d databases should be left: %v", want, left)
			}
		})
	}
}
