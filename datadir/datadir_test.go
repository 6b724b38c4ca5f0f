package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tree lists the files of dir with their content, LOCK left out.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, path)
		switch {
		case err != nil:
			return err
		case rel == LockName:
		case d.IsDir():
			lines = append(lines, rel+"/")
		default:
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			lines = append(lines, rel+"="+string(raw))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

func oldContent(t *testing.T) string {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"LOCK": "1\n", "IDENTITY": "old", "wal/1": "old", "state/1": "old", "images/1": "old", "peers": "old", "backups/b": "kept",
	} {
		write(t, filepath.Join(dir, name), content)
	}
	return dir
}

const (
	oldTree = "./ IDENTITY=old backups/ backups/b=kept images/ images/1=old peers=old state/ state/1=old wal/ wal/1=old"
	newTree = "./ .before-recover/ .before-recover/IDENTITY=old .before-recover/images/ .before-recover/images/1=old" +
		" .before-recover/peers=old .before-recover/state/ .before-recover/state/1=old .before-recover/wal/ .before-recover/wal/1=old" +
		" IDENTITY=new backups/ backups/b=kept images/ state/ state/1=new wal/ wal/1=new"
)

func makeNew(t *testing.T, r *Replacement) {
	t.Helper()
	for name, content := range map[string]string{"IDENTITY": "new", "wal/1": "new", "state/1": "new"} {
		write(t, filepath.Join(r.Dir(), name), content)
	}
	if err := os.Mkdir(filepath.Join(r.Dir(), "images"), 0o700); err != nil {
		t.Fatal(err)
	}
}

// Goal: whenever the process dies, the next start finds all of the old content
// or all of the new. Method: the directory is copied at every step of a
// replacement, and each copy is finished; the finishing of each is in turn
// stopped at every step.
func TestReplacementSurvivesEveryCrash(t *testing.T) {
	dir := oldContent(t)
	type crash struct{ step, dir string }
	var crashes []crash
	capture := func(from string) func(string) {
		return func(step string) {
			to := filepath.Join(t.TempDir(), "copy")
			if err := os.CopyFS(to, os.DirFS(from)); err != nil {
				t.Fatal(err)
			}
			crashes = append(crashes, crash{step, to})
		}
	}
	r, err := BeginReplacement(dir, capture(dir))
	if err != nil {
		t.Fatal(err)
	}
	makeNew(t, r)
	capture(dir)("made")
	if decided, err := r.Commit(BackupsName); err != nil || !decided {
		t.Fatal(decided, err)
	}
	if got := tree(t, dir); got != newTree {
		t.Fatalf("after the replacement:\n%s\nwant\n%s", got, newTree)
	}
	first := len(crashes)
	if first < 12 {
		t.Fatalf("only %d steps were seen", first)
	}
	for i := 0; i < len(crashes); i++ {
		c := crashes[i]
		var again func(string)
		if i < first {
			again = capture(c.dir)
		} else {
			again = func(string) {}
		}
		if _, err := finish(c.dir, again); err != nil {
			t.Fatalf("stopped at %s: %v", c.step, err)
		}
		want := newTree
		if c.step == "made" || c.step == StepDecide {
			want = oldTree
		}
		if got := tree(t, c.dir); got != want {
			t.Errorf("stopped at %s:\n%s\nwant\n%s", c.step, got, want)
		}
		if pending, err := Unfinished(c.dir); err != nil || pending {
			t.Errorf("stopped at %s: unfinished %t, %v", c.step, pending, err)
		}
	}
	if len(crashes) < 2*first {
		t.Errorf("%d crashes of the finishing, expected more than %d", len(crashes)-first, first)
	}
}

func TestReplacementKeepsOneOldContent(t *testing.T) {
	dir := oldContent(t)
	r, err := BeginReplacement(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	makeNew(t, r)
	if _, err := r.Commit(BackupsName); err != nil {
		t.Fatal(err)
	}
	if _, err := BeginReplacement(dir, nil); !errors.Is(err, ErrBeforeKept) || !strings.Contains(err.Error(), "--purge") {
		t.Fatalf("a second one: %v", err)
	}
	if err := RemoveKept(dir); err != nil {
		t.Fatal(err)
	}
	if kept, err := Kept(dir); kept || err != nil {
		t.Fatal(kept, err)
	}
	if r, err = BeginReplacement(dir, nil); err != nil {
		t.Fatal(err)
	}
	if err := r.Discard(); err != nil {
		t.Fatal(err)
	}
	want := strings.Join(strings.Fields("./ IDENTITY=new backups/ backups/b=kept images/ state/ state/1=new wal/ wal/1=new"), " ")
	if got := tree(t, dir); got != want {
		t.Errorf("%s", got)
	}
}

// A damaged list of moves must not move anything out of the directory.
func TestReplacementRefusesStrangeNames(t *testing.T) {
	for _, raw := range []string{`{"out":["../x"]}`, `{"in":[".."]}`, `{"in":["a/b"]}`, `{"out":[""]}`, `{`} {
		dir := oldContent(t)
		write(t, filepath.Join(dir, decidedName, movesName), raw)
		if _, err := FinishReplacement(dir); err == nil {
			t.Errorf("%s was taken", raw)
		}
		if _, err := os.Stat(filepath.Join(dir, BeforeName)); err == nil {
			t.Errorf("%s moved something", raw)
		}
	}
}

func TestLocks(t *testing.T) {
	dir := t.TempDir()
	a, err := LockShared(dir) // nothing to lock but the directory
	if err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Fatalf("a reader left %v, %v", names, err)
	}
	if err := a.Release(); err != nil {
		t.Fatal(err)
	}
	x, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LockShared(dir); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Fatalf("a reader beside a node: %v", err)
	}
	if _, err := Lock(dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("a second node: %v", err)
	}
	if err := x.Release(); err != nil {
		t.Fatal(err)
	}
	if a, err = LockShared(dir); err != nil {
		t.Fatal(err)
	}
	b, err := LockShared(dir)
	if err != nil {
		t.Fatalf("two readers: %v", err)
	}
	if _, err := Lock(dir); !errors.Is(err, ErrInUse) {
		t.Fatalf("a node beside readers: %v", err)
	}
	if err := errors.Join(a.Release(), b.Release()); err != nil {
		t.Fatal(err)
	}
}

func TestIdentityIsMissing(t *testing.T) {
	if _, err := ReadIdentity(t.TempDir()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "no data directory") {
		t.Error(err)
	}
}
