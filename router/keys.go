package router

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// The first byte of a key names its table. Values are part of the stored
// format: never reuse one.
const (
	prefixMeta          = 0x01
	prefixPipeline      = 'p'
	prefixSidecar       = 's'
	prefixService       = 'v'
	prefixGroup         = 'g'
	prefixGroupPast     = 'G'
	prefixSourceOffset  = 'o'
	prefixWatermark     = 'w'
	prefixGroupOffset   = 'f'
	prefixCheckpoint    = 'c'
	prefixAssignment    = 'a'
	prefixHandover      = 'h'
	prefixByPipeline    = 'b' // pipeline, sidecar -> nothing
	prefixByName        = 'n' // normalised name, service -> nothing
	prefixBySidecar     = 'i' // sidecar, service -> nothing
	prefixLocalName     = 'l' // normalised name, sidecar -> nothing
	prefixMembership    = 'm' // service, group -> nothing
	prefixRevokedCount  = 'R' // sidecar -> number of revoked assignments
	prefixRevokedQueue  = 't' // sequence -> RevokedRef
	prefixRequest       = 'r' // request id -> RequestRecord
	prefixRequestQueue  = 'q' // sequence -> RequestRef
	prefixOperation     = 'O'
	prefixOperationEnd  = 'Q' // sequence -> id of an ended operation
	prefixStage         = 'x' // sequence -> chunk of a staged restore
	metaPosition        = "position"
	metaMembership      = "membership" // the ConfState and Members of the position
	metaClock           = "clock"
	metaFormat          = "format"
	metaStage           = "stage"    // RestoreStage, while a restore is staged
	metaSwap            = "swap"     // RestoreStage that has to be swapped in
	metaRestored        = "restored" // RestoreStage that was swapped in last
	escaped, escapedEnd = 0xff, 0x01
	keyBytesToStartWith = 64
	partitionBytes      = 4
)

var errBadKey = errors.New("router: malformed key")

// key builds a key in a buffer that the next call with the same buffer
// overwrites.
type key []byte

func (k key) table(prefix byte) key { return append(k[:0], prefix) }

// part appends an id that is followed by something else. Zero bytes are
// escaped and a terminator is added, so that keys sort like their tuples and
// no id can reach into the next part, whatever bytes a caller sends.
func (k key) part(id string) key {
	for {
		i := indexZero(id)
		if i < 0 {
			k = append(k, id...)
			return append(k, 0, escapedEnd)
		}
		k = append(k, id[:i]...)
		k = append(k, 0, escaped)
		id = id[i+1:]
	}
}

func indexZero(s string) int {
	for i := 0; i < len(s); i++ {
		if s[i] == 0 {
			return i
		}
	}
	return -1
}

// last appends the final id of a key, as it is.
func (k key) last(id string) key { return append(k, id...) }

func (k key) u32(v uint32) key { return binary.BigEndian.AppendUint32(k, v) }
func (k key) u64(v uint64) key { return binary.BigEndian.AppendUint64(k, v) }

// decodePart undoes part and returns the rest of the key.
func decodePart(b []byte) (string, []byte, error) {
	var out []byte
	for {
		i := bytes.IndexByte(b, 0)
		if i < 0 || i+1 >= len(b) {
			return "", nil, errBadKey
		}
		switch b[i+1] {
		case escapedEnd:
			if out == nil {
				return string(b[:i]), b[i+2:], nil
			}
			return string(append(out, b[:i]...)), b[i+2:], nil
		case escaped:
			out = append(append(out, b[:i]...), 0)
			b = b[i+2:]
		default:
			return "", nil, errBadKey
		}
	}
}

func (k key) meta(name string) key          { return append(k.table(prefixMeta), name...) }
func (k key) single(p byte, id string) key  { return k.table(p).last(id) }
func (k key) pair(p byte, a, b string) key  { return k.table(p).part(a).last(b) }
func (k key) group(p byte, a string) key    { return k.table(p).part(a) }
func (k key) sequence(p byte, n uint64) key { return k.table(p).u64(n) }
func (k key) partition(p byte, source string, n uint32) key {
	return k.table(p).part(source).u32(n)
}

func (k key) groupOffset(group, source string, n uint32) key {
	return k.table(prefixGroupOffset).part(group).part(source).u32(n)
}

// decodePair undoes pair.
func decodePair(k []byte) (a, b string, err error) {
	if len(k) == 0 {
		return "", "", errBadKey
	}
	a, rest, err := decodePart(k[1:])
	return a, string(rest), err
}

// decodePartition undoes partition.
func decodePartition(k []byte) (source string, n uint32, err error) {
	if len(k) == 0 {
		return "", 0, errBadKey
	}
	source, rest, err := decodePart(k[1:])
	if err != nil || len(rest) != partitionBytes {
		return "", 0, errBadKey
	}
	return source, binary.BigEndian.Uint32(rest), nil
}

// decodeGroupOffset undoes groupOffset.
func decodeGroupOffset(k []byte) (group, source string, n uint32, err error) {
	if len(k) == 0 {
		return "", "", 0, errBadKey
	}
	group, rest, err := decodePart(k[1:])
	if err != nil {
		return "", "", 0, err
	}
	source, rest, err = decodePart(rest)
	if err != nil || len(rest) != partitionBytes {
		return "", "", 0, errBadKey
	}
	return group, source, binary.BigEndian.Uint32(rest), nil
}

// prefixEnd returns the first key after every key that begins with prefix.
func prefixEnd(prefix []byte) []byte {
	end := bytes.Clone(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] != 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return nil
}
