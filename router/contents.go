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

// recordDigest is a SHA-256 over records, each with its lengths.
type recordDigest struct {
	h interface {
		io.Writer
		Sum([]byte) []byte
	}
	n []byte
}

func newRecordDigest() *recordDigest { return &recordDigest{h: sha256.New()} }

func (d *recordDigest) add(k, v []byte) {
	d.n = binary.AppendUvarint(d.n[:0], uint64(len(k)))
	d.h.Write(d.n)
	d.h.Write(k)
	d.n = binary.AppendUvarint(d.n[:0], uint64(len(v)))
	d.h.Write(d.n)
	d.h.Write(v)
}

func (d *recordDigest) sum() []byte { return d.h.Sum(nil) }

// ContentHash returns a SHA-256 over the content alone: what a backup holds. It
// is the same for a backup and for the state right after restoring it. It reads
// the whole state.
func (v *View) ContentHash(ctx context.Context) ([]byte, error) {
	d := newRecordDigest()
	err := v.read(func(r pebble.Reader) error {
		return scanData(ctx, r, func(k, val []byte) error {
			d.add(k, val)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return d.sum(), nil
}
