package router

import (
	"errors"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// TestDamagedCommands is FuzzApply's short form for every run of the tests:
// commands with a few bytes changed are applied, refused or stop the replica,
// and never make it panic or hang.
func TestDamagedCommands(t *testing.T) {
	r := randomness(t)
	g := &commands{r: r, time: 1000}
	s := open(t, vfs.NewMem(), "state")
	applied, stopped := 0, 0
	for range 3000 {
		raw := marshal(t, g.next())
		for range 1 + r.Intn(3) {
			if len(raw) > 0 {
				raw[r.Intn(len(raw))] = byte(r.Intn(256))
			}
		}
		_, err := s.Apply([]Entry{{Index: s.Applied().Index + 1, Term: 1, Commands: [][]byte{raw}, Local: true}})
		if err == nil {
			applied++
			continue
		}
		if !errors.Is(err, ErrUnknownCommand) {
			t.Fatal(err)
		}
		// A fresh start from what reached the disk, as a node would do it.
		stopped++
		s.broken = nil
		clear(s.overlay)
		noError(t, s.adopt(s.cur))
	}
	t.Logf("%d applied, %d stopped at", applied, stopped)
	hash(t, s)
	noError(t, s.Close())
}
