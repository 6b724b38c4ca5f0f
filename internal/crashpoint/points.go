//go:build crashpoints

package crashpoint

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.etcd.io/raft/v3/raftpb"
	"golang.org/x/sys/unix"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/wal"
)

// steps are the durable steps with a point before and one after each.
func steps() []string {
	return []string{
		// IDENTITY says so; JOINING says that a lost member comes back; PEERS has one more.
		"removed", "rejoin", "peers",
		"identity", "initialized", // the two writes of IDENTITY
		"state:begin", "state:created", // the first database: CREATING written, removed
		"entries", "hardstate", // Append with entries, and with the hard state alone
		"apply", "flush",
		"image:manifest", "image:publish", "image:delete", "image:remove",
		"receive:publish", "receive:discard",
		"install", "state:copy", "state:switch", "state:remove",
		// The entries of the membership, where they are applied; with exchange a joint
		// configuration begins, with leave it ends.
		"member:remove", "member:add", "member:promote", "member:exchange", "member:leave",
	}
}

// Names returns every point.
func Names() []string {
	var names []string
	for _, s := range steps() {
		names = append(names, s+":before", s+":after")
	}
	for _, p := range []string{
		wal.PointInstallBefore, wal.PointInstallRecord, wal.PointInstallSynced,
		wal.PointCompactBefore, wal.PointCompactState, wal.PointCompactRecord,
		wal.PointSegmentRemove, wal.PointSegmentRemoved,
		wal.PointCreateStaged, wal.PointCreateRenamed, wal.PointRepairBefore, wal.PointRepairCut,
		wal.PointAppendBefore, wal.PointAppendSynced,
	} {
		names = append(names, "wal/"+p)
	}
	// A recovery, see package offline and datadir.Replacement.
	for _, step := range []string{
		"begin", "state", "log", "identity", "decide", "decided", "move-out", "move-in", "moved", "done",
	} {
		names = append(names, "recover/"+step)
	}
	// A node that joins, see server/join.go and datadir.Replacement.
	for _, step := range []string{"remembered", "accepted", "fetched", "decide", "decided", "move-out", "move-in", "moved", "done"} {
		names = append(names, "join:"+step)
	}
	// Of a wrong state, see server/rebuild.go.
	names = append(names, "rebuild:install", "rebuild:installed", "rebuild:done")
	// A replaced database of which some files are gone.
	names = append(names, "state:remove:half")
	return append(names, "raft:before") // all is open, raft has not run yet
}

// Points knows where this process is to die.
type Points struct {
	at   string
	left atomic.Int64
	// diverge is the index from which on this node applies one entry wrongly.
	diverge uint64
}

// diverged: this process has. A node whose state was rebuilt has new Points.
var diverged atomic.Bool

// New returns the Points of a process with the given environment. It refuses a
// point that does not exist: the test would wait for a death that never comes.
func New(environ []string) (*Points, error) {
	p := &Points{}
	for _, pair := range environ {
		if at, ok := strings.CutPrefix(pair, "CONVEYOR_CRASH_AT="); ok {
			p.at = at
		}
		if at, ok := strings.CutPrefix(pair, "CONVEYOR_DIVERGE_AT="); ok {
			index, err := strconv.ParseUint(at, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("crashpoint: CONVEYOR_DIVERGE_AT: %w", err)
			}
			p.diverge = index
		}
	}
	if p.at == "" {
		return p, nil
	}
	n := int64(1)
	if i := strings.LastIndexByte(p.at, ':'); i >= 0 {
		if v, err := strconv.ParseInt(p.at[i+1:], 10, 64); err == nil {
			p.at, n = p.at[:i], v
		}
	}
	if !slices.Contains(Names(), p.at) {
		return nil, fmt.Errorf("crashpoint: %q is none of the points: %s", p.at, strings.Join(Names(), " "))
	}
	p.left.Store(n)
	return p, nil
}

// Pass ends the process if this is the point, and the passing, to die at.
func (p *Points) Pass(point string) {
	if point != p.at || p.left.Add(-1) != 0 {
		return
	}
	fmt.Fprintf(os.Stderr, "crash point %s\n", point)
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // the signal may take effect a moment later than the call returns
}

func (p *Points) around(step string, f func() error) error {
	if step == "" {
		return f()
	}
	p.Pass(step + ":before")
	err := f()
	p.Pass(step + ":after")
	return err
}

// WAL returns the FailPoint of wal.Options.
func (p *Points) WAL() func(string) error {
	return func(point string) error {
		p.Pass("wal/" + point)
		return nil
	}
}

// FS returns fs with points at the steps that decide which state and which
// images exist.
func (p *Points) FS(fs vfs.FS) vfs.FS { return &crashFS{fs, p} }

type crashFS struct {
	vfs.FS
	p *Points
}

func (f *crashFS) Unwrap() vfs.FS { return f.FS }

func (f *crashFS) Rename(from, to string) error {
	step := ""
	switch base := f.PathBase(to); {
	case strings.HasPrefix(base, ".deleting-"):
		step = "image:delete"
	case strings.HasPrefix(f.PathBase(from), ".creating-"):
		step = "image:publish"
	case strings.Contains(from, "/.receiving-") && f.PathBase(from) == "image":
		step = "receive:publish"
	case base == "CURRENT":
		step = "state:switch"
	}
	return f.p.around(step, func() error { return f.FS.Rename(from, to) })
}

func (f *crashFS) RemoveAll(path string) error {
	step := ""
	switch base := f.PathBase(path); {
	case strings.HasPrefix(base, ".deleting-"):
		step = "image:remove"
	case strings.HasPrefix(base, ".receiving-"):
		step = "receive:discard"
	case strings.HasPrefix(base, "db-"):
		// Who makes a database clears its place first, where there is nothing.
		if _, err := f.FS.Stat(path); err == nil {
			step = "state:remove"
		}
	}
	return f.p.around(step, func() error {
		if step == "state:remove" && f.p.at == "state:remove:half" {
			if err := f.removeHalf(path); err != nil {
				return err
			}
			f.p.Pass("state:remove:half")
		}
		return f.FS.RemoveAll(path)
	})
}

// removeHalf removes every second file in path.
func (f *crashFS) removeHalf(path string) error {
	files, err := f.FS.List(path)
	slices.Sort(files)
	for i := 0; err == nil && i < len(files); i += 2 {
		err = f.FS.RemoveAll(f.FS.PathJoin(path, f.FS.PathBase(files[i])))
	}
	return err
}

func (f *crashFS) Remove(path string) error {
	step := ""
	if f.PathBase(path) == "CREATING" {
		step = "state:created"
	}
	return f.p.around(step, func() error { return f.FS.Remove(path) })
}

func (f *crashFS) Create(path string, c vfs.DiskWriteCategory) (file vfs.File, err error) {
	step := ""
	switch {
	case f.PathBase(path) == "CREATING":
		step = "state:begin"
	case f.PathBase(path) == "MANIFEST" && strings.Contains(path, "/.creating-"):
		step = "image:manifest"
	}
	err = f.p.around(step, func() error {
		file, err = f.FS.Create(path, c)
		return err
	})
	return file, err
}

func (f *crashFS) Link(from, to string) error {
	step := ""
	if strings.Contains(from, "/images/") && strings.Contains(to, "/db-") {
		step = "state:copy"
	}
	return f.p.around(step, func() error { return f.FS.Link(from, to) })
}

// Log returns l with points around the appends.
func (p *Points) Log(l raftnode.Log) raftnode.Log { return &crashLog{l, p} }

type crashLog struct {
	raftnode.Log
	p *Points
}

func (l *crashLog) Append(hs *raftpb.HardState, ents []*raftpb.Entry, sync bool) error {
	step := "entries"
	if len(ents) == 0 {
		step = "hardstate"
	}
	return l.p.around(step, func() error { return l.Log.Append(hs, ents, sync) })
}

// Machine returns m with points around what changes its disk.
func (p *Points) Machine(m raftnode.StateMachine) raftnode.StateMachine {
	return &crashMachine{m, p}
}

type crashMachine struct {
	raftnode.StateMachine
	p *Points
}

func (m *crashMachine) Apply(b []raftnode.Batch) (results [][]any, err error) {
	err = m.p.around("apply", func() error {
		wrong, err := m.p.divert(b)
		if err != nil {
			return err
		}
		results, err = m.StateMachine.Apply(b)
		if wrong >= 0 && err == nil && b[wrong].Local {
			// Nobody asked for the result of the command that was slipped in.
			results[wrong] = results[wrong][:len(results[wrong])-1]
		}
		return err
	})
	return results, err
}

// divert slips a command that no other replica has into the first entry at or
// after the chosen index, once in the life of the process, and returns the place
// of the entry, -1 for none.
func (p *Points) divert(b []raftnode.Batch) (int, error) {
	if p.diverge == 0 || diverged.Load() || len(b) == 0 || b[len(b)-1].Index < p.diverge {
		return -1, nil
	}
	raw, err := (&commandpb.Command{Op: &commandpb.Command_CommitSourceOffset{
		CommitSourceOffset: &commandpb.CommitSourceOffset{SourceId: "diverged", Offset: p.diverge},
	}}).MarshalVT()
	if err != nil {
		return -1, fmt.Errorf("crashpoint: encode a command: %w", err)
	}
	for i := range b {
		if b[i].Index >= p.diverge {
			fmt.Fprintf(os.Stderr, "diverged at index %d\n", b[i].Index)
			b[i].Commands = append(slices.Clone(b[i].Commands), raw)
			diverged.Store(true)
			return i, nil
		}
	}
	return -1, nil
}

func (m *crashMachine) ApplyMembership(pos raftnode.Position) error {
	return m.p.around(memberStep(m.StateMachine.Applied(), pos), func() error { return m.StateMachine.ApplyMembership(pos) })
}

// memberStep names the change from one position to the next, "" when who takes part
// stays the same.
func memberStep(from, to raftnode.Position) string {
	was, is := from.ConfState, to.ConfState
	lives := func(p raftnode.Position) int { return len(raftnode.Live(p.Members)) }
	switch {
	case len(was.GetVotersOutgoing()) == 0 && len(is.GetVotersOutgoing()) > 0:
		return "member:exchange"
	case len(was.GetVotersOutgoing()) > 0 && len(is.GetVotersOutgoing()) == 0:
		return "member:leave"
	case lives(to) < lives(from):
		return "member:remove"
	case lives(to) > lives(from):
		return "member:add"
	case len(is.GetVoters()) > len(was.GetVoters()):
		return "member:promote"
	}
	return ""
}

func (m *crashMachine) Flush() (durable uint64, err error) {
	err = m.p.around("flush", func() error {
		durable, err = m.StateMachine.Flush()
		return err
	})
	return durable, err
}

func (m *crashMachine) Install(dir string) (pos raftnode.Position, err error) {
	err = m.p.around("install", func() error {
		pos, err = m.StateMachine.Install(dir)
		return err
	})
	return pos, err
}
