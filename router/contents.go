package router

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"

	"github.com/cockroachdb/pebble/v2"
)

// dataTables are the tables that are the content of a state, and so of a backup,
// in the order of their keys. Position, clocks, operations and what is staged
// belong to the cluster, not to the content.
const dataTables = "GR" + "abcfghilmnopqrstvw"

// isData reports whether a key is part of the content.
func isData(k []byte) bool { return len(k) > 0 && dataTable(k[0]) }

func dataTable(prefix byte) bool {
	for i := range len(dataTables) {
		if dataTables[i] == prefix {
			return true
		}
	}
	return false
}

// scanData calls fn for every record of the content, ascending.
func scanData(ctx context.Context, r pebble.Reader, fn func(k, v []byte) error) error {
	n := 0
	for i := range len(dataTables) {
		err := scanKeys(r, key(nil).table(dataTables[i]), nil, func(k, v []byte) (bool, error) {
			if n++; n%4096 == 0 && ctx.Err() != nil {
				return false, ctx.Err()
			}
			return true, fn(k, v)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// recordDigest is a SHA-256 over records, each with its lengths: over what a run
// of records looks like in a chunk.
type recordDigest struct {
	h interface {
		io.Writer
		Sum([]byte) []byte
	}
}

func newRecordDigest() *recordDigest { return &recordDigest{h: sha256.New()} }

// appendRecord appends a record as chunks, runs and digests have it.
func appendRecord(b, k, v []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(k)))
	b = append(b, k...)
	b = binary.AppendUvarint(b, uint64(len(v)))
	return append(b, v...)
}

// addPlain adds records that are one after the other: to add each of them by
// itself costs as much as hashing it.
func (d *recordDigest) addPlain(b []byte) { d.h.Write(b) }

func (d *recordDigest) sum() []byte { return d.h.Sum(nil) }

// ContentHash returns a SHA-256 over the content alone: what a backup holds. It
// is the same for a backup and for the state right after restoring it. It reads
// the whole state.
func (v *View) ContentHash(ctx context.Context) ([]byte, error) {
	d := newRecordDigest()
	err := v.readDatabase(func(db *database, r pebble.Reader) error {
		c, err := readClock(r)
		if err != nil {
			return err
		}
		n, err := traverse(ctx, r, prefixes(dataTables), d, nil)
		if err == nil {
			// Counts would walk over them once more.
			v.noteCheckpoints(db, c, n[prefixCheckpoint])
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return d.sum(), nil
}
