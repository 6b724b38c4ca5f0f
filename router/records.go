package router

import (
	"hash/maphash"
	"sync"
)

// recordShards is a power of two, large enough that readers of different
// records rarely meet.
const recordShards = 64

// recordCache keeps the stored bytes of records that are read one at a time,
// for the reads of FSM.Latest. A point read in Pebble looks into several tables
// and takes as long as all of gRPC around it; most reads are of few records.
//
// A cached value is never older than what Pebble holds. Each commit calls block
// for its keys before Pebble changes, and unblock after; in between nothing may
// be filled in:
//
//   - An entry that is there was filled by a reader that looked into Pebble
//     between two blocks of its shard, and no batch has touched its key since:
//     block would have removed it.
//   - A reader fills only if none was in force when it asked, none has begun
//     since (the epoch is the same), and it took hold of the database after it
//     asked. So what it read from Pebble is what Pebble still holds.
//
// Comparing epochs alone would not do: a reader that asks while a block is in
// force and looks into Pebble before the commit would fill in the old value
// when the commit is through, and no later block would have told.
type recordCache struct {
	seed   maphash.Seed
	max    int64 // of the young generation of one shard
	shards [recordShards]recordShard
}

type recordShard struct {
	mu sync.Mutex
	// epoch counts the blocks; blocked is set while one is in force.
	epoch   uint64
	blocked bool
	// What was not asked for during a whole generation goes with it.
	young, old map[string][]byte
	bytes      int64 // of young
	_          [64]byte
}

// newRecordCache returns a cache of at most about max bytes.
func newRecordCache(max int64) *recordCache {
	return &recordCache{seed: maphash.MakeSeed(), max: max / 2 / recordShards}
}

func (c *recordCache) shard(k []byte) *recordShard {
	return &c.shards[maphash.Bytes(c.seed, k)%recordShards]
}

// get returns the value of k, which must not be modified, or nil and the ticket
// to hand to put. The caller takes hold of the database only after that.
func (c *recordCache) get(k []byte) ([]byte, uint64) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.young[string(k)]; ok {
		return v, 0
	}
	if v, ok := s.old[string(k)]; ok {
		delete(s.old, string(k))
		s.add(k, v, c.max)
		return v, 0
	}
	if s.blocked {
		return nil, 0
	}
	return nil, s.epoch + 1
}

// put fills in what Pebble held for k, unless a commit may have changed it
// since get returned the ticket. The cache keeps v.
func (c *recordCache) put(k, v []byte, ticket uint64) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blocked || s.epoch+1 != ticket {
		return
	}
	s.add(k, v, c.max)
}

// recordOverhead is what an entry costs beside its bytes.
const recordOverhead = 96

func (s *recordShard) add(k, v []byte, max int64) {
	if s.young == nil || s.bytes >= max {
		s.old, s.young, s.bytes = s.young, make(map[string][]byte), 0
	}
	s.young[string(k)] = v
	s.bytes += int64(len(k)+len(v)) + recordOverhead
}

// block removes the keys of a batch that is about to be committed and keeps
// their shards from being filled until unblock. Blocks do not nest: one
// goroutine commits at a time.
func (c *recordCache) block(cells []*cell) {
	for _, x := range cells {
		s := &c.shards[maphash.String(c.seed, x.key)%recordShards]
		s.mu.Lock()
		if !s.blocked {
			s.blocked = true
			s.epoch++
		}
		delete(s.young, x.key)
		delete(s.old, x.key)
		s.mu.Unlock()
	}
}

// unblock lets every shard be filled again.
func (c *recordCache) unblock() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		s.blocked = false
		s.mu.Unlock()
	}
}

// blockAll empties the cache before the whole state is replaced; unblock ends
// it.
func (c *recordCache) blockAll() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		s.blocked = true
		s.epoch++
		s.young, s.old, s.bytes = nil, nil, 0
		s.mu.Unlock()
	}
}
