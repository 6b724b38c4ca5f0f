package archive

import (
	"hash"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// sideBlock is how much is hashed or written beside the caller at a time.
const sideBlock = 256 << 10

// twoBlocks gathers bytes in one block while work is done on the other, on a
// goroutine that ends with it: nothing has to be stopped when an archive is given
// up halfway.
type twoBlocks struct {
	// work may keep and change the block until it returns.
	work func(block []byte) error
	// gathered and working are the two blocks; busy receives once what is done on
	// working has ended, nil when nothing is.
	gathered, working []byte
	busy              chan error
	err               error
}

// add takes p in. It returns the first error of work, which ends everything.
func (t *twoBlocks) add(p []byte) error {
	for len(p) > 0 && t.err == nil {
		if t.gathered == nil {
			t.gathered = make([]byte, 0, sideBlock)
		}
		n := copy(t.gathered[len(t.gathered):sideBlock], p)
		t.gathered, p = t.gathered[:len(t.gathered)+n], p[n:]
		if len(t.gathered) == sideBlock {
			t.start()
		}
	}
	return t.err
}

// start begins to work on what was gathered.
func (t *twoBlocks) start() {
	if t.wait() != nil {
		return
	}
	t.gathered, t.working = t.working[:0], t.gathered
	t.busy = make(chan error, 1)
	go func() { t.busy <- t.work(t.working) }()
}

// wait waits for what is being done.
func (t *twoBlocks) wait() error {
	if t.busy != nil {
		if err := <-t.busy; t.err == nil {
			t.err = err
		}
		t.busy = nil
	}
	return t.err
}

// flush has everything worked on and waits for it.
func (t *twoBlocks) flush() error {
	if len(t.gathered) > 0 && t.err == nil {
		t.start()
	}
	return t.wait()
}

// spare returns the blocks, for somebody else, once nothing is worked on.
func (t *twoBlocks) spare() [2][]byte { return [2][]byte{t.gathered[:0], t.working[:0]} }

// sideHash is a hash that is computed beside whoever writes to it: half of what
// making an archive without compression takes, and a third of unpacking one, is
// SHA-256.
type sideHash struct {
	h      hash.Hash
	blocks twoBlocks
}

func newSideHash(h hash.Hash) *sideHash {
	return &sideHash{h: h, blocks: twoBlocks{work: func(b []byte) error {
		h.Write(b)
		return nil
	}}}
}

// Write adds p, which it does not keep. It never fails.
func (s *sideHash) Write(p []byte) { _ = s.blocks.add(p) }

// Sum returns the hash of everything written.
func (s *sideHash) Sum() []byte {
	_ = s.blocks.flush()
	return s.h.Sum(nil)
}

// sideFile is a file that is written beside whoever has its content. An error
// comes with a later write or with finish.
type sideFile struct {
	f      vfs.File
	blocks twoBlocks
	// ended receives how it became durable; givenUp: nobody needs that any more.
	ended   chan error
	givenUp atomic.Bool
}

// newSideFile returns a file with the blocks that another one has left, if any.
func newSideFile(f vfs.File, spare [2][]byte) *sideFile {
	return &sideFile{f: f, blocks: twoBlocks{gathered: spare[0], working: spare[1], work: func(b []byte) error {
		// vfs allows Write to scribble over its argument, which is ours.
		_, err := f.Write(b)
		return err
	}}}
}

func (s *sideFile) write(p []byte) error { return s.blocks.add(p) }

// finish ends the writing and returns the blocks, for another file. Then the file is made
// durable and closed beside the caller, when it is its turn; wait says how that went.
func (s *sideFile) finish(turns chan struct{}) ([2][]byte, error) {
	if err := s.blocks.flush(); err != nil {
		return [2][]byte{}, err
	}
	blocks := s.blocks.spare()
	s.blocks = twoBlocks{}
	s.ended = make(chan error, 1)
	go func() {
		turns <- struct{}{}
		defer func() { <-turns }()
		var err error
		if !s.givenUp.Load() {
			err = s.f.Sync()
		}
		if cerr := s.f.Close(); err == nil {
			err = cerr
		}
		s.ended <- err
	}()
	return blocks, nil
}

// wait waits for the end of what finish began and returns how it went.
func (s *sideFile) wait() error { return <-s.ended }

// abandon closes the file, whatever becomes of its content.
func (s *sideFile) abandon() {
	if s.ended != nil {
		s.givenUp.Store(true)
		<-s.ended
		return
	}
	_ = s.blocks.wait()
	_ = s.f.Close()
}
