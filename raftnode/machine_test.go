package raftnode

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// memMachine is a StateMachine that remembers every command in order. The
// result of a command is its number, counted from 1. What is durable is what
// was applied at the last Flush.
type memMachine struct {
	fs vfs.FS

	mu      sync.Mutex
	state   memState
	durable []byte
	// fail is asked before each operation: apply, membership, install, flush, image.
	fail func(op string) error
	// applies counts calls of Apply.
	applies int
	// held blocks Apply while locked by a test.
	held sync.Mutex
}

type memState struct {
	Pos      Position
	Commands []string
}

func newMemMachine(fs vfs.FS, pos Position) *memMachine {
	m := &memMachine{fs: fs, state: memState{Pos: pos.clone()}}
	m.durable = m.encodeLocked()
	return m
}

// crash returns the machine a restart finds.
func (m *memMachine) crash() *memMachine {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &memMachine{fs: m.fs, durable: m.durable}
	if err := json.Unmarshal(m.durable, &c.state); err != nil {
		panic(err)
	}
	return c
}

func (m *memMachine) encodeLocked() []byte {
	b, err := json.Marshal(m.state)
	if err != nil {
		panic(err)
	}
	return b
}

func (m *memMachine) gate(op string) error {
	m.mu.Lock()
	f := m.fail
	m.mu.Unlock()
	if f != nil {
		return f(op)
	}
	return nil
}

func (m *memMachine) Applied() Position {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Pos.clone()
}

func (m *memMachine) Apply(batches []Batch) ([][]any, error) {
	if err := m.gate("apply"); err != nil {
		return nil, err
	}
	m.held.Lock()
	defer m.held.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.applies++
	out := make([][]any, len(batches))
	for i, b := range batches {
		if b.Index != m.state.Pos.Index+1 {
			return nil, fmt.Errorf("machine: entry %d after %d", b.Index, m.state.Pos.Index)
		}
		for _, c := range b.Commands {
			m.state.Commands = append(m.state.Commands, string(c))
			if b.Local {
				out[i] = append(out[i], len(m.state.Commands))
			}
		}
		m.state.Pos.Index, m.state.Pos.Term = b.Index, b.Term
	}
	return out, nil
}

func (m *memMachine) ApplyMembership(pos Position) error {
	if err := m.gate("membership"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if pos.Index != m.state.Pos.Index+1 {
		return fmt.Errorf("machine: membership %d after %d", pos.Index, m.state.Pos.Index)
	}
	m.state.Pos = pos.clone()
	return nil
}

func (m *memMachine) Durable() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	var s memState
	if err := json.Unmarshal(m.durable, &s); err != nil {
		panic(err)
	}
	return s.Pos.Index
}

func (m *memMachine) Flush() (uint64, error) {
	if err := m.gate("flush"); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.durable = m.encodeLocked()
	return m.state.Pos.Index, nil
}

func (m *memMachine) Image(dir string) (Position, error) {
	if err := m.gate("image"); err != nil {
		return Position{}, err
	}
	m.mu.Lock()
	b, pos := m.encodeLocked(), m.state.Pos.clone()
	m.mu.Unlock()
	if err := m.fs.MkdirAll(dir, 0o755); err != nil {
		return Position{}, err
	}
	f, err := m.fs.Create(m.fs.PathJoin(dir, "state.json"), vfs.WriteCategoryUnspecified)
	if err != nil {
		return Position{}, err
	}
	if _, err := f.Write(b); err != nil {
		return Position{}, err
	}
	if err := f.Sync(); err != nil {
		return Position{}, err
	}
	return pos, f.Close()
}

func (m *memMachine) Install(dir string) (Position, error) {
	if err := m.gate("install"); err != nil {
		return Position{}, err
	}
	f, err := m.fs.Open(m.fs.PathJoin(dir, "state.json"))
	if err != nil {
		return Position{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return Position{}, err
	}
	var s memState
	if err := json.Unmarshal(b, &s); err != nil {
		return Position{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
	m.durable = b
	return s.Pos.clone(), nil
}

// commands returns what was applied so far.
func (m *memMachine) commands() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.state.Commands...)
}
