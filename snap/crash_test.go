package snap

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// The tests in this file run one operation of the store once for every file
// operation it makes, and let the power fail, or that file operation fail,
// just there. Afterwards the images must be those of before or those of after,
// each whole, and the operation must be repeatable.

// imageDir is nested so that making the store durable includes its parents.
const imageDir = "/data/images"

// operation is one change of the set of images under test.
type operation struct {
	name string
	// prepare brings a new store into the state before.
	prepare func(t *testing.T, s *Store)
	// run makes the change. It is repeated after a failure.
	run func(s *Store) error
	// after is the state after run, given that before.
	after func(before map[string]content) map[string]content
}

var (
	oldContent = content{"000001.sst": "old table", "MANIFEST-1": "old"}
	newContent = content{"000002.sst": strings.Repeat("new table ", 30), "000003.sst": "", "MANIFEST-2": "new"}
)

// operations returns the operations under test. source holds the image to be
// received.
func operations(t *testing.T) []operation {
	source := mustOpenStore(t, vfs.NewMem(), imageDir, testOptions())
	incoming := mustCreate(t, source, 30, newContent)
	const doomed = "deleted by the test"

	with := func(before map[string]content, c content) map[string]content {
		after := maps.Clone(before)
		after["new"] = c
		return after
	}
	receive := func(s *Store) error {
		r, err := source.Open(incoming.ID)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = receiveAll(s, r, 50)
		if errors.Is(err, ErrExists) {
			return nil
		}
		return err
	}
	return []operation{{
		name:    "create",
		prepare: func(t *testing.T, s *Store) { mustCreate(t, s, 10, oldContent) },
		run: func(s *Store) error {
			_, err := s.Create(context.Background(), buildFiles(s.fs, testMeta(20), newContent))
			return err
		},
		after: func(before map[string]content) map[string]content { return with(before, newContent) },
	}, {
		name:    "receive",
		prepare: func(t *testing.T, s *Store) { mustCreate(t, s, 10, oldContent) },
		run:     receive,
		after:   func(before map[string]content) map[string]content { return with(before, newContent) },
	}, {
		name: "receive over a damaged image",
		prepare: func(t *testing.T, s *Store) {
			mustCreate(t, s, 10, oldContent)
			if err := receive(s); err != nil {
				t.Fatal(err)
			}
			path := s.fs.PathJoin(s.Dir(incoming.ID), manifestName)
			overwrite(t, s.fs, path, []byte("rotten"))
			if err := syncFile(s.fs, path); err != nil {
				t.Fatal(err)
			}
			if err := syncDir(s.fs, s.Dir(incoming.ID)); err != nil {
				t.Fatal(err)
			}
		},
		run:   receive,
		after: func(before map[string]content) map[string]content { return with(before, newContent) },
	}, {
		name: "resume and commit",
		prepare: func(t *testing.T, s *Store) {
			r, err := source.Open(incoming.ID)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			w, err := s.Receive(incoming.ID, r.Size())
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(send(r, w, 50, int(r.Size()/50)-2), w.Close()); err != nil {
				t.Fatal(err)
			}
		},
		run:   receive,
		after: func(before map[string]content) map[string]content { return with(before, newContent) },
	}, {
		name: "delete",
		prepare: func(t *testing.T, s *Store) {
			mustCreate(t, s, 10, oldContent)
			mustCreate(t, s, 20, content{"doomed": doomed, "z": "z"})
		},
		run: func(s *Store) error { return s.Purge(0) },
		after: func(before map[string]content) map[string]content {
			return map[string]content{}
		},
	}}
}

// contents forgets the ids, which differ between attempts.
func contents(all map[string]content) []string {
	var list []string
	for _, c := range all {
		list = append(list, fmt.Sprint(c))
	}
	slices.Sort(list)
	return list
}

// between reports whether got has every image that before and after share and
// none that neither has. A delete of several images may stop between two.
func between(got, before, after []string) bool {
	for _, c := range got {
		if !slices.Contains(before, c) && !slices.Contains(after, c) {
			return false
		}
	}
	for _, c := range before {
		if slices.Contains(after, c) && !slices.Contains(got, c) {
			return false
		}
	}
	return len(slices.Compact(slices.Clone(got))) == len(got)
}

// prepared returns a crashable file system with the durable state before op.
func prepared(t *testing.T, op operation) (fs *vfs.MemFS, before, after []string) {
	t.Helper()
	mem := vfs.NewCrashableMem()
	s := mustOpenStore(t, posixFS{mem}, imageDir, testOptions())
	op.prepare(t, s)
	// What prepare left unsynced is gone: every run starts from a clean boot.
	fs = mem.CrashClone(vfs.CrashCloneCfg{})
	s = mustOpenStore(t, posixFS{fs}, imageDir, testOptions())
	was, err := state(s)
	if err != nil {
		t.Fatal(err)
	}
	return fs, contents(was), contents(op.after(was))
}

// checkReopened opens the store on fs and checks that its images are a state
// between before and after, that nothing is left over, and that op can be
// made (again).
func checkReopened(t *testing.T, fs vfs.FS, op operation, before, after []string, must []string) {
	t.Helper()
	s := mustOpenStore(t, posixFS{fs}, imageDir, testOptions())
	now, err := state(s)
	if err != nil {
		t.Fatal(err)
	}
	got := contents(now)
	if !between(got, before, after) {
		t.Fatalf("images are\n  %q\nneither the old\n  %q\nnor the new\n  %q", got, before, after)
	}
	if must != nil && !slices.Equal(got, must) {
		t.Fatalf("images are\n  %q, after a success must be\n  %q", got, must)
	}
	for _, name := range leftovers(t, s) {
		if !strings.HasPrefix(name, receivingPrefix) {
			t.Fatalf("left over: %s", name)
		}
	}
	if err := op.run(s); err != nil {
		t.Fatalf("repeating the operation: %v", err)
	}
	if now, err = state(s); err != nil {
		t.Fatal(err)
	}
	// A repeated Create makes a second image with the same content.
	if got := slices.Compact(contents(now)); !slices.Equal(got, after) {
		t.Fatalf("after repeating it, images are\n  %q, want\n  %q", got, after)
	}
	if left := leftovers(t, s); len(left) > 0 {
		t.Fatalf("left over after repeating it: %q", left)
	}
}

// TestPowerFailure lets the power fail before every file operation. Of what
// was not fsynced, nothing, something or everything has reached the disk.
func TestPowerFailure(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	for _, op := range operations(t) {
		t.Run(op.name, func(t *testing.T) {
			powerFails(t, op, rng, func(fs posixFS) vfs.FS { return fs })
		})
		// What is received is looked at again only where it may be another file than
		// the one that was compared.
		t.Run(op.name+", inodes", func(t *testing.T) {
			powerFails(t, op, rng, func(fs posixFS) vfs.FS { return inodeFS{fs} })
		})
	}
}

func powerFails(t *testing.T, op operation, rng *rand.Rand, as func(posixFS) vfs.FS) {
	fs, before, after := prepared(t, op)
	type crash struct {
		fs *vfs.MemFS
		at string
	}
	var crashes []crash
	ops := 0
	snapshot := func(at string) {
		for _, percent := range []int{0, 20, 50, 80, 100} {
			crashes = append(crashes, crash{
				fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rng}),
				fmt.Sprintf("%s, %d%% unsynced kept", at, percent),
			})
		}
	}
	s := mustOpenStore(t, as(hookFS(fs, func(o errorfs.Op) error {
		if o.Kind.ReadOrWrite() == errorfs.OpIsWrite {
			snapshot(fmt.Sprintf("operation %d (kind %d) on %s", ops, o.Kind, o.Path))
		}
		ops++
		return nil
	})), imageDir, testOptions())
	if err := op.run(s); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crashes", len(crashes))
	for _, c := range crashes {
		t.Run(c.at, func(t *testing.T) { checkReopened(t, c.fs, op, before, after, nil) })
	}
	// A success is durable, however little was written back by itself.
	checkReopened(t, fs.CrashClone(vfs.CrashCloneCfg{}), op, before, after, after)
}

// TestFailingOperation lets every file operation fail, once or from then on.
// It also crashes after the failure, since what the store believes and what
// the disk holds may part there.
func TestFailingOperation(t *testing.T) {
	for _, op := range operations(t) {
		for _, forGood := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/forGood=%t", op.name, forGood), func(t *testing.T) {
				for fail := 0; ; fail++ {
					if !failAt(t, op, fail, forGood) {
						t.Logf("%d operations", fail)
						break
					}
				}
			})
		}
	}
}

// failAt lets file operation number fail of op fail. It returns false when op
// makes fewer operations.
func failAt(t *testing.T, op operation, fail int, forGood bool) (reached bool) {
	t.Helper()
	fs, before, after := prepared(t, op)
	n, armed := 0, false
	at := ""
	s := mustOpenStore(t, hookFS(fs, func(o errorfs.Op) error {
		if !armed {
			return nil
		}
		n++
		if n-1 == fail || forGood && n-1 > fail {
			if at == "" {
				at = fmt.Sprintf("operation %d (kind %d) on %s", fail, o.Kind, o.Path)
			}
			return errorfs.ErrInjected
		}
		return nil
	}), imageDir, testOptions())
	armed = true
	err := op.run(s)
	armed = false
	if at == "" {
		if err != nil {
			t.Fatalf("no failure was injected: %v", err)
		}
		return false
	}
	t.Run(at, func(t *testing.T) {
		now, serr := state(s)
		if serr != nil {
			t.Fatalf("after error %v: %v", err, serr)
		}
		var must []string
		if got := contents(now); err == nil {
			must = after
		} else if !between(got, before, after) {
			t.Fatalf("images are\n  %q\nneither the old\n  %q\nnor the new\n  %q", got, before, after)
		} else if !errors.Is(err, errorfs.ErrInjected) && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the cause is missing from the error: %v", err)
		}
		checkReopened(t, fs.CrashClone(vfs.CrashCloneCfg{}), op, before, after, must)
		rng := rand.New(rand.NewPCG(1, uint64(fail)))
		checkReopened(t, fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rng}), op, before, after, nil)
		if forGood {
			// The process is killed rather than the machine: its successor finds
			// what was written but never fsynced, and must not rely on it.
			checkReopened(t, fs, op, before, after, must)
			reborn, rerr := state(mustOpenStore(t, posixFS{fs.CrashClone(vfs.CrashCloneCfg{})}, imageDir, testOptions()))
			if rerr != nil {
				t.Fatal(rerr)
			}
			if got := slices.Compact(contents(reborn)); !slices.Equal(got, after) {
				t.Fatalf("after a kill, a repetition and a power failure, images are\n  %q, want\n  %q", got, after)
			}
			return
		}
		// The same store goes on as soon as the disk does.
		if err != nil {
			if rerr := op.run(s); rerr != nil && !errors.Is(rerr, ErrNotFound) {
				t.Fatalf("repeating it on the same store: %v", rerr)
			}
			now, serr := state(s)
			if serr != nil {
				t.Fatal(serr)
			}
			if got := slices.Compact(contents(now)); !slices.Equal(got, after) {
				t.Fatalf("after repeating it, images are\n  %q, want\n  %q", got, after)
			}
		}
	})
	return true
}

// TestOpenStoreFailure lets every file operation of OpenStore fail: it may
// refuse, or hide images it could not read, but never harm one.
func TestOpenStoreFailure(t *testing.T) {
	for _, op := range operations(t) {
		fs, _, _ := prepared(t, op)
		before, err := state(mustOpenStore(t, posixFS{fs}, imageDir, testOptions()))
		if err != nil {
			t.Fatal(err)
		}
		for fail, reached := 0, true; reached; fail++ {
			reached = false
			n, armed := 0, true
			s, err := OpenStore(hookFS(fs, func(o errorfs.Op) error {
				if n++; armed && n-1 == fail {
					reached = true
					return errorfs.ErrInjected
				}
				return nil
			}), imageDir, testOptions())
			armed = false
			if err == nil {
				if _, err := state(s); err != nil {
					t.Fatalf("%s, operation %d: %v", op.name, fail, err)
				}
			} else if !errors.Is(err, errorfs.ErrInjected) {
				t.Fatalf("%s, operation %d: the cause is missing from the error: %v", op.name, fail, err)
			}
			now, err := state(mustOpenStore(t, posixFS{fs}, imageDir, testOptions()))
			if err != nil {
				t.Fatal(err)
			}
			if !sameState(before, now) {
				t.Fatalf("%s, operation %d: images changed from %v to %v", op.name, fail, before, now)
			}
		}
	}
}
