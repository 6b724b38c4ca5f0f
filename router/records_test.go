package router

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// Goal: whatever a reader does around a commit, what it fills in is never older
// than Pebble. Method: the three moments at which a reader can ask, one by one.
func TestRecordsAreFilledOnlyWithWhatPebbleHolds(t *testing.T) {
	k, old := []byte("key"), []byte("old")
	cached := func(c *recordCache) bool { v, _ := c.get(k); return v != nil }
	dirty := []*cell{{key: string(k)}}

	c := newRecordCache(1 << 20)
	_, ticket := c.get(k)
	c.put(k, old, ticket)
	if !cached(c) {
		t.Fatal("nothing stood against filling the value in")
	}
	c.block(dirty)
	if cached(c) {
		t.Fatal("a record that is about to change can still be read")
	}
	_, during := c.get(k)
	c.put(k, old, during)
	if cached(c) {
		t.Fatal("filled in while a commit is under way")
	}
	c.unblock()
	c.put(k, old, during)
	if cached(c) {
		t.Fatal("a reader that asked during the commit filled in what it replaced")
	}
	c.put(k, old, ticket)
	if cached(c) {
		t.Fatal("a reader that asked before the commit filled in what it replaced")
	}
	_, before := c.get(k)
	c.blockAll()
	_, during = c.get(k)
	c.unblock()
	c.put(k, old, before)
	c.put(k, old, during)
	if cached(c) {
		t.Fatal("a value of the replaced state was filled in")
	}
}

func TestRecordsAreBounded(t *testing.T) {
	const limit = 1 << 20
	c := newRecordCache(limit)
	value := make([]byte, 1000)
	for i := range 20_000 {
		k := fmt.Appendf(nil, "key-%d", i)
		_, ticket := c.get(k)
		c.put(k, value, ticket)
	}
	held := 0
	for i := range c.shards {
		for _, gen := range []map[string][]byte{c.shards[i].young, c.shards[i].old} {
			for k, v := range gen {
				held += len(k) + len(v) + recordOverhead
			}
		}
	}
	if held > limit+recordShards*2*(len(value)+200) || held < limit/2 {
		t.Fatalf("%d bytes are held, the limit is %d", held, limit)
	}
}

// Goal: a read that begins after Apply returned sees what was applied, and no
// reader sees a record go back, while the state is written and replaced. Each
// checkpoint carries the number of the round that wrote it.
func TestLatestNeverGoesBack(t *testing.T) {
	fs := vfs.NewMem()
	s, err := Open(fs, "state", Options{Bootstrap: start, MemTableBytes: 256 << 10, CacheBytes: 1 << 20})
	noError(t, err)
	defer func() { noError(t, s.Close()) }()
	const keys, rounds = 4, 3000
	id := func(k int) string { return fmt.Sprintf("service-%d", k) }
	var applied atomic.Int64
	var stop atomic.Bool
	var readers sync.WaitGroup
	for r := range 4 {
		readers.Go(func() {
			var seen [keys]int64
			for n := r; !stop.Load(); n++ {
				k := n % keys
				least := applied.Load()
				v := s.Latest()
				cp, err := v.Checkpoint(id(k))
				if err != nil {
					t.Error(err)
					return
				}
				round := int64(0)
				if cp != nil {
					if _, err := fmt.Sscan(cp.CheckpointId, &round); err != nil {
						t.Error(err)
						return
					}
				}
				if round < least || round < seen[k] {
					t.Errorf("round %d was read, %d was applied before and %d read before", round, least, seen[k])
					return
				}
				seen[k] = round
			}
		})
	}
	for round := 1; round <= rounds && !t.Failed(); round++ {
		e := Entry{Index: uint64(round + 1), Term: 1}
		for k := range keys {
			e.Commands = append(e.Commands, marshal(t, &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{
				SaveCheckpoint: &commandpb.SaveCheckpoint{ServiceId: id(k), CheckpointId: fmt.Sprint(round), Data: []byte("d")},
			}}))
		}
		_, err := s.Apply([]Entry{e})
		noError(t, err)
		applied.Store(int64(round))
		if round%500 == 0 {
			// The same state in a new database; the old one is closed under
			// the readers.
			dir := fmt.Sprintf("image-%d", round)
			_, err := s.Image(dir)
			noError(t, err)
			_, err = s.Install(dir)
			noError(t, err)
		}
	}
	stop.Store(true)
	readers.Wait()
}
