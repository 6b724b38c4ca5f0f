package wal

import (
	"encoding/binary"
	"hash/crc32"
	"os"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
)

// chain is a stretch of intact records found behind a bad one.
type chain struct {
	off int64
	// crc is the state of the checksum before the record at off + its frame.
	crc uint32
	// synced is true when the stretch proves that a sync happened after the
	// bytes before it were written.
	synced bool
}

// findChain looks in the file for at least two records behind from whose
// checksums continue each other. Frames start at multiples of 8.
func findChain(path string, from int64) (chain, bool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return chain{}, false, err
	}
	for off := (from + 8) &^ 7; off+2*frameHeader <= int64(len(data)); off += 8 {
		if c, ok := chainAt(data, off); ok {
			return c, true, nil
		}
	}
	return chain{}, false, nil
}

// frameAt parses a frame without checking its checksum.
func frameAt(data []byte, off int64, rec *record) bool {
	if off+frameHeader > int64(len(data)) {
		return false
	}
	n, pad := decodeLength(binary.LittleEndian.Uint64(data[off:]))
	// The first two bytes of a record are the tag and value of its type: the
	// cheap test keeps the search linear.
	body := off + frameHeader
	if n < 4 || n > int64(len(data))-body-pad || data[body] != 0x08 || data[body+1] > byte(etcdwal.SnapshotType) || data[body+2] != 0x10 {
		return false
	}
	if !parseRecord(data[body:body+n], rec) || rec.typ < etcdwal.MetadataType {
		return false
	}
	rec.off, rec.end = off, body+n+pad
	return true
}

func chainAt(data []byte, off int64) (chain, bool) {
	var rec record
	if !frameAt(data, off, &rec) {
		return chain{}, false
	}
	c := chain{off: rec.end, crc: rec.crc}
	links := 0
	// Progress of the proof: "entry, hard state, entry" or "start record, any".
	sawEntry, sawState := rec.typ == etcdwal.EntryType, false
	prev := rec
	for frameAt(data, prev.end, &rec) {
		if crc32.Update(prev.crc, castagnoli, rec.data) != rec.crc {
			break
		}
		links++
		switch {
		case prev.typ == etcdwal.SnapshotType && links > 1:
			c.synced = true
		case rec.typ == etcdwal.StateType && sawEntry:
			sawState = true
		case rec.typ == etcdwal.EntryType && sawState:
			c.synced = true
		case rec.typ == etcdwal.EntryType:
			sawEntry = true
		}
		prev = rec
	}
	return c, links > 0
}
