package router

import (
	"container/heap"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// revocation is one that a sidecar has.
type revocation struct {
	generation uint64
	pipeline   string
}

// revocationHeap has the oldest first; of those of one generation, the first by key.
type revocationHeap []revocation

func (h revocationHeap) Len() int { return len(h) }
func (h revocationHeap) Less(i, j int) bool {
	return h[i].generation < h[j].generation || h[i].generation == h[j].generation && h[i].pipeline < h[j].pipeline
}
func (h revocationHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *revocationHeap) Push(x any)   { *h = append(*h, x.(revocation)) }
func (h *revocationHeap) Pop() any {
	last := len(*h) - 1
	r := (*h)[last]
	*h = (*h)[:last]
	return r
}

// forgetOldest drops a sidecar's oldest revocation. One that is still needed
// stays: a node that has never spoken to the sidecar could not tell it any more.
//
// A command reads the revocations of a sidecar once. One that takes ten thousand
// pipelines from a sidecar would read all of them ten thousand times otherwise, and
// stop every replica for a minute.
func (t *tx) forgetOldest(sidecar string) {
	h := t.revocations[sidecar]
	if h == nil {
		h = t.readRevocations(sidecar)
	}
	for h.Len() > 0 {
		oldest := (*h)[0]
		a := t.assignment(sidecar, oldest.pipeline)
		stands := a != nil && a.Revoked && a.Generation == oldest.generation
		if stands && t.needed(a) {
			return
		}
		heap.Pop(h)
		if stands {
			t.forget(a)
			return
		}
	}
}

func (t *tx) readRevocations(sidecar string) *revocationHeap {
	h := &revocationHeap{}
	t.scan(t.buf.group(prefixAssignment, sidecar), func(k, v []byte) {
		revoked, generation, err := decodeRevoked(v)
		if err != nil {
			t.fail(fmt.Errorf("%w: record %q: %w", ErrCorrupt, k, err))
			return
		}
		if !revoked {
			return
		}
		_, pipeline, err := decodePair(k)
		t.fail(err)
		*h = append(*h, revocation{generation, pipeline})
	})
	heap.Init(h)
	if t.revocations == nil {
		t.revocations = make(map[string]*revocationHeap)
	}
	t.revocations[sidecar] = h
	return h
}

// Their numbers in commandpb.Assignment.
const (
	assignmentRevokedField    = 5
	assignmentGenerationField = 6
)

// decodeRevoked picks from the record of an assignment whether it is revoked, and its
// generation.
func decodeRevoked(v []byte) (revoked bool, generation uint64, err error) {
	err = eachNumber(v, func(field protowire.Number, x uint64) {
		switch field {
		case assignmentRevokedField:
			revoked = x != 0
		case assignmentGenerationField:
			generation = x
		}
	})
	return revoked, generation, err
}
