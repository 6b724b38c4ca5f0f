package datadir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

const (
	nextName    = ".next"
	decidedName = ".decided"
	// BeforeName is the directory a replacement keeps the old content in.
	BeforeName = ".before-recover"
	// movesName is the file in .decided that says what moves out and in.
	movesName = "MOVES"
)

// ErrBeforeKept: the content an earlier replacement kept is still there.
var ErrBeforeKept = errors.New("the data directory still keeps what an earlier recovery replaced")

// moves is the content of the MOVES file.
type moves struct {
	Out []string `json:"out"`
	In  []string `json:"in"`
}

// Replacement puts new content in the place of that of a data directory.
//
// The new content is made in a directory inside, because the data directory
// itself may be a mount point that cannot be renamed. One rename then decides:
// before it the old content is in force and the new is a leftover, after it the
// new one is, wherever its parts still lie. FinishReplacement, which every node
// calls when it starts, moves the parts to where they belong.
//
// Whoever uses one holds the exclusive lock of the directory.
type Replacement struct {
	dir   string
	point func(step string)
}

// The steps Replacement tells about; tests stop there.
const (
	StepDecide  = "decide"   // all is made and durable, nothing decided
	StepDecided = "decided"  // the rename is durable
	StepOut     = "move-out" // before each move of an old part
	StepIn      = "move-in"  // before each move of a new part
	StepMoved   = "moved"    // all parts are where they belong
	StepDone    = "done"
)

// BeginReplacement returns a Replacement with an empty directory to make the
// new content in. It removes what an interrupted one left. point, which may be
// nil, is called at each step.
func BeginReplacement(dir string, point func(step string)) (*Replacement, error) {
	if kept, err := exists(filepath.Join(dir, BeforeName)); err != nil || kept {
		if err == nil {
			err = fmt.Errorf("%w in %s; look whether it is still needed and remove it with 'router cluster recover --purge'",
				ErrBeforeKept, filepath.Join(dir, BeforeName))
		}
		return nil, err
	}
	if point == nil {
		point = func(string) {}
	}
	r := &Replacement{dir, point}
	if err := r.Discard(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(r.Dir(), 0o700); err != nil {
		return nil, fmt.Errorf("begin to replace the content of the data directory: %w", err)
	}
	return r, nil
}

// Dir returns where the new content is made: files and directories with the
// names they will have in the data directory, durable before Commit.
func (r *Replacement) Dir() string { return filepath.Join(r.dir, nextName) }

// Discard removes what was made. After Commit it finds nothing.
func (r *Replacement) Discard() error {
	if err := os.RemoveAll(r.Dir()); err != nil {
		return fmt.Errorf("remove %s, which is not needed any more: %w", r.Dir(), err)
	}
	return nil
}

// Commit puts the new content in force. The old content moves to BeforeName,
// except what keep names. decided reports whether the new content is in force;
// when it is and err is not nil, the next start or FinishReplacement finishes
// the moves.
func (r *Replacement) Commit(keep ...string) (decided bool, err error) {
	wrap := func(err error) error { return fmt.Errorf("replace the content of %s: %w", r.dir, err) }
	m := moves{}
	now, err := os.ReadDir(r.dir)
	if err != nil {
		return false, wrap(err)
	}
	stay := append([]string{LockName, nextName, decidedName, BeforeName, lostFound}, keep...)
	for _, e := range now {
		if !slices.Contains(stay, e.Name()) {
			m.Out = append(m.Out, e.Name())
		}
	}
	next, err := os.ReadDir(r.Dir())
	if err != nil {
		return false, wrap(err)
	}
	for _, e := range next {
		m.In = append(m.In, e.Name())
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return false, wrap(err)
	}
	if err := WriteFile(filepath.Join(r.Dir(), movesName), append(raw, '\n')); err != nil {
		return false, wrap(err)
	}
	r.point(StepDecide)
	decided, err = true, os.Rename(r.Dir(), filepath.Join(r.dir, decidedName))
	if err != nil {
		return false, wrap(err)
	}
	if err := SyncDir(r.dir); err != nil {
		return decided, wrap(err)
	}
	r.point(StepDecided)
	if _, err := finish(r.dir, r.point); err != nil {
		return decided, err
	}
	return decided, nil
}

// FinishReplacement does what is left of a replacement that was decided, and
// removes what is left of one that was not. It reports whether there was one to
// finish. The caller holds the exclusive lock of dir.
func FinishReplacement(dir string) (bool, error) {
	return finish(dir, func(string) {})
}

// Unfinished reports whether dir holds a replacement that is decided but whose
// parts are not all in their place: such a directory must not be read.
func Unfinished(dir string) (bool, error) { return exists(filepath.Join(dir, decidedName)) }

func finish(dir string, point func(string)) (bool, error) {
	wrap := func(err error) error {
		return fmt.Errorf("finish replacing the content of %s, which is decided (start again to go on): %w", dir, err)
	}
	decided := filepath.Join(dir, decidedName)
	pending, err := exists(decided)
	if err != nil {
		return false, wrap(err)
	}
	if !pending {
		if err := os.RemoveAll(filepath.Join(dir, nextName)); err != nil {
			return false, fmt.Errorf("remove what an interrupted replacement left: %w", err)
		}
		return false, nil
	}
	raw, err := os.ReadFile(filepath.Join(decided, movesName))
	if errors.Is(err, fs.ErrNotExist) {
		// Removed last, so all is done but the removal of the directory.
		return true, removeDecided(dir)
	}
	if err != nil {
		return false, wrap(err)
	}
	var m moves
	if err := json.Unmarshal(raw, &m); err != nil {
		return false, wrap(fmt.Errorf("%s is damaged: %w", filepath.Join(decided, movesName), err))
	}
	for _, name := range append(slices.Clone(m.Out), m.In...) {
		// The names were read from a directory; anything else is damage.
		if name == "" || name != filepath.Base(name) || name == "." || name == ".." {
			return false, wrap(fmt.Errorf("%s names %q", filepath.Join(decided, movesName), name))
		}
	}
	if err := moveAll(dir, decided, m, point); err != nil {
		return false, wrap(err)
	}
	point(StepMoved)
	if err := os.Remove(filepath.Join(decided, movesName)); err != nil {
		return false, wrap(err)
	}
	if err := removeDecided(dir); err != nil {
		return false, wrap(err)
	}
	point(StepDone)
	return true, nil
}

// moveAll moves the old parts out, then the new ones in. Every move may have
// happened already: an old part is out once the kept directory has its name,
// and only when all are out does the first new one take its place.
func moveAll(dir, decided string, m moves, point func(string)) error {
	before := filepath.Join(dir, BeforeName)
	if len(m.Out) > 0 {
		if err := os.Mkdir(before, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := SyncDir(dir); err != nil {
			return err
		}
	}
	for _, name := range m.Out {
		point(StepOut)
		out, err := exists(filepath.Join(before, name))
		if err != nil {
			return err
		}
		if !out {
			if err := os.Rename(filepath.Join(dir, name), filepath.Join(before, name)); err != nil {
				return err
			}
		}
	}
	if len(m.Out) > 0 {
		// The new name first: a part that is in neither place would be lost.
		if err := errors.Join(SyncDir(before), SyncDir(dir)); err != nil {
			return err
		}
	}
	for _, name := range m.In {
		point(StepIn)
		waiting, err := exists(filepath.Join(decided, name))
		if err != nil {
			return err
		}
		if waiting {
			if err := os.Rename(filepath.Join(decided, name), filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return errors.Join(SyncDir(dir), SyncDir(decided))
}

func removeDecided(dir string) error {
	if err := os.Remove(filepath.Join(dir, decidedName)); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Kept reports whether dir keeps the content a replacement put out of force.
func Kept(dir string) (bool, error) { return exists(filepath.Join(dir, BeforeName)) }

// RemoveKept removes what a replacement kept; nothing being there is no error.
// The caller holds the exclusive lock of dir.
func RemoveKept(dir string) error {
	if err := os.RemoveAll(filepath.Join(dir, BeforeName)); err != nil {
		return fmt.Errorf("remove %s: %w", filepath.Join(dir, BeforeName), err)
	}
	return SyncDir(dir)
}
