package wal

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sort"

	etcdwal "go.etcd.io/etcd/server/v3/storage/wal"
	"google.golang.org/protobuf/encoding/protowire"
)

// The file format is that of the underlying package: frames of an 8 byte
// little-endian length (56 bits, the top byte holds the padding) and a record
// message padded to 8 bytes. The CRC of a record continues over the data of all
// records before it. It is read here a second time, by our own code, because
// the underlying reader treats a damaged length as the end of the log and then
// zeroes what follows: acknowledged entries would vanish without a word.

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	frameHeader = 8
	sector      = 512
)

// segment is one file of the log.
type segment struct {
	path  string
	seq   uint64
	index uint64 // the first entry after the cut that made the file, at that time
}

// listSegments returns the segments of dir in order of their sequence number.
func listSegments(dir string) ([]segment, error) {
	des, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var segs []segment
	for _, de := range des {
		s := segment{path: filepath.Join(dir, de.Name())}
		if n, err := fmt.Sscanf(de.Name(), "%016x-%016x.wal", &s.seq, &s.index); err != nil || n != 2 {
			continue
		}
		if de.Name() != fmt.Sprintf("%016x-%016x.wal", s.seq, s.index) {
			continue
		}
		segs = append(segs, s)
	}
	sort.Slice(segs, func(i, j int) bool { return segs[i].seq < segs[j].seq })
	return segs, nil
}

// newestRun drops segments before the last gap in the sequence: a crash during
// a removal may bring a removed file back without its successors. Whether the
// run is enough is decided by its content.
func newestRun(segs []segment) []segment {
	for i := len(segs) - 1; i > 0; i-- {
		if segs[i].seq != segs[i-1].seq+1 {
			return segs[i:]
		}
	}
	return segs
}

// record is one record of a segment. data is valid until the next call of next.
type record struct {
	typ      int64
	crc      uint32
	data     []byte
	off, end int64
}

// badFrame says why the frame at off cannot be used.
type badFrame struct {
	off    int64
	reason string
	// missing is true when the frame looks like a write of which sectors never
	// reached the disk, beyond when it claims bytes past the end of the file.
	missing, beyond bool
}

func (b *badFrame) Error() string { return fmt.Sprintf("byte %d: %s", b.off, b.reason) }

// frameReader reads the records of one segment from its beginning.
type frameReader struct {
	f    *os.File
	r    *bufio.Reader
	size int64
	off  int64
	crc  uint32
	// chained is false until the first CRC record seeded crc.
	chained bool
	buf     []byte
}

func openFrames(path string) (*frameReader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &frameReader{f: f, r: bufio.NewReaderSize(f, 256<<10), size: st.Size()}, nil
}

func (fr *frameReader) close() { fr.f.Close() }

// seek continues at off with a chain that stood at crc there.
func (fr *frameReader) seek(off int64, crc uint32) error {
	if _, err := fr.f.Seek(off, io.SeekStart); err != nil {
		return err
	}
	fr.r.Reset(fr.f)
	fr.off, fr.crc, fr.chained = off, crc, true
	return nil
}

// next returns the next record, io.EOF at a clean end (end of file, or zeros
// only up to it), *badFrame for what cannot be read, or an IO error.
func (fr *frameReader) next(rec *record) error {
	left := fr.size - fr.off
	if left == 0 {
		return io.EOF
	}
	if left < frameHeader {
		return &badFrame{off: fr.off, reason: fmt.Sprintf("only %d bytes of a record are there", left), beyond: true}
	}
	var head [frameHeader]byte
	if err := fr.fill(head[:]); err != nil {
		return err
	}
	n, pad := decodeLength(binary.LittleEndian.Uint64(head[:]))
	if n == 0 && pad == 0 {
		zero, err := fr.zeroToEnd()
		if err != nil {
			return err
		}
		if zero {
			return io.EOF
		}
		return &badFrame{off: fr.off, reason: "a record has length zero, but data follows", missing: true}
	}
	if n <= 0 || n > left-frameHeader-pad {
		return &badFrame{off: fr.off, reason: fmt.Sprintf("a record claims %d bytes, the file has %d left", n, left-frameHeader), beyond: true}
	}
	if int64(cap(fr.buf)) < n+pad {
		fr.buf = make([]byte, n+pad)
	}
	fr.buf = fr.buf[:n+pad]
	if err := fr.fill(fr.buf); err != nil {
		return err
	}
	if !parseRecord(fr.buf[:n], rec) {
		return &badFrame{off: fr.off, reason: "a record cannot be parsed", missing: fr.unfinished(n)}
	}
	if rec.typ == etcdwal.CrcType {
		if fr.chained && rec.crc != fr.crc {
			return &badFrame{off: fr.off, reason: fmt.Sprintf("checksum %08x of the records before does not match %08x", fr.crc, rec.crc)}
		}
		fr.crc, fr.chained = rec.crc, true
	} else {
		sum := crc32.Update(fr.crc, castagnoli, rec.data)
		if sum != rec.crc {
			return &badFrame{off: fr.off, reason: fmt.Sprintf("checksum mismatch: stored %08x, computed %08x", rec.crc, sum), missing: fr.unfinished(n)}
		}
		fr.crc = sum
	}
	rec.off, rec.end = fr.off, fr.off+frameHeader+n+pad
	fr.off = rec.end
	return nil
}

// fill reads len(p) bytes. The file shrinking under a reader of a live log (a
// cut drops the preallocated rest) is the end of the file.
func (fr *frameReader) fill(p []byte) error {
	_, err := io.ReadFull(fr.r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &badFrame{off: fr.off, reason: "the file ended inside a record", beyond: true}
	}
	return err
}

// unfinished tells whether the record in buf, of n bytes, may be a write that
// did not reach the disk whole: a sector of it is missing, or it stops somewhere
// and nothing follows (a full disk or a limit can end a write at any byte).
func (fr *frameReader) unfinished(n int64) bool {
	if hasZeroSector(fr.buf, fr.off+frameHeader) {
		return true
	}
	if fr.buf[n-1] != 0 {
		return false
	}
	zero, err := fr.zeroToEnd()
	return err == nil && zero
}

func (fr *frameReader) zeroToEnd() (bool, error) {
	buf := make([]byte, 64<<10)
	for {
		n, err := fr.r.Read(buf)
		if !allZero(buf[:n]) {
			return false, nil
		}
		if err == io.EOF {
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
}

func decodeLength(v uint64) (n, pad int64) {
	n = int64(v &^ (0xff << 56))
	if v>>63 == 1 {
		pad = int64(v >> 56 & 7)
	}
	return n, pad
}

func parseRecord(b []byte, rec *record) bool {
	*rec = record{}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		b = b[n:]
		switch {
		case num == 1 && typ == protowire.VarintType:
			v, n := protowire.ConsumeVarint(b)
			if n < 0 {
				return false
			}
			rec.typ, b = int64(v), b[n:]
		case num == 2 && typ == protowire.VarintType:
			v, n := protowire.ConsumeVarint(b)
			if n < 0 || v > 1<<32-1 {
				return false
			}
			rec.crc, b = uint32(v), b[n:]
		case num == 3 && typ == protowire.BytesType:
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return false
			}
			rec.data, b = v, b[n:]
		default:
			n := protowire.ConsumeFieldValue(num, typ, b)
			if n < 0 {
				return false
			}
			b = b[n:]
		}
	}
	return rec.typ > 0
}

// zeros is what bytes are compared with, many at a time: what a segment was extended by
// may be all but megabytes of it.
var zeros [16 << 10]byte

func allZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// hasZeroSector tells whether the part of b in any one disk sector is all zero,
// b starting at off in the file: sectors are written whole or not at all.
func hasZeroSector(b []byte, off int64) bool {
	for len(b) > 0 {
		n := min(sector-off%sector, int64(len(b)))
		if allZero(b[:n]) {
			return true
		}
		b, off = b[n:], off+n
	}
	return false
}

// entryHead reads index and term of an encoded entry, and refuses what proto.Unmarshal
// refuses: the underlying package panics on it. It copies nothing, while to decode all of
// it copies the command, which is most of what a scan of a log would take.
func entryHead(b []byte) (index, term uint64, err error) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return 0, 0, protowire.ParseError(n)
		}
		if num > protowire.MaxValidNumber {
			return 0, 0, fmt.Errorf("%d is no number of a field", num)
		}
		b = b[n:]
		var v uint64
		if typ == protowire.VarintType {
			v, n = protowire.ConsumeVarint(b)
		} else {
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return 0, 0, protowire.ParseError(n)
		}
		b = b[n:]
		switch {
		case typ != protowire.VarintType:
		case num == entryTerm:
			term = v
		case num == entryIndex:
			index = v
		}
	}
	return index, term, nil
}

// Field numbers of raftpb.Entry.
const (
	entryTerm  = protowire.Number(2)
	entryIndex = protowire.Number(3)
)
