//go:build !crashpoints

package crashpoint

import (
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/raftnode"
)

// Points does nothing in this build.
type Points struct{}

// New returns the Points of a process with the given environment.
func New([]string) (*Points, error) { return &Points{}, nil }

// Pass is called where the process may die.
func (*Points) Pass(string) {}

// WAL returns the FailPoint of wal.Options: none.
func (*Points) WAL() func(string) error { return nil }

// FS returns fs.
func (*Points) FS(fs vfs.FS) vfs.FS { return fs }

// Log returns l.
func (*Points) Log(l raftnode.Log) raftnode.Log { return l }

// Machine returns m.
func (*Points) Machine(m raftnode.StateMachine) raftnode.StateMachine { return m }
