package snap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A journal lists the chunks that a partial receive has written, with their
// checksums. After a restart the listed chunks are read back and compared, so
// whatever survived is kept and nothing unverified is: no fsync is needed to
// make that true, only to lose less in a power failure.
//
// (A counter of received bytes would be simpler and wrong: after power loss it
// can be on disk while the bytes it counts are zeroes.)
//
// Layout, little endian; each record ends with the crc32c of what precedes it:
//
//	header: magic [8]byte, stream size uint64, begun (unix msec) int64, crc uint32
//	span:   offset uint64, length uint32, crc of the data uint32, crc uint32
const (
	journalMagic  = "CNVRCV01"
	journalHeader = 8 + 8 + 8 + 4
	journalSpan   = 8 + 4 + 4 + 4
)

// span is one received chunk.
type span struct {
	offset int64
	length uint32
	crc    uint32
}

func (s span) end() int64 { return s.offset + int64(s.length) }

// journal is the decoded form of a journal file.
type journal struct {
	size  int64
	begun time.Time
	// spans follow each other without gaps, starting at offset 0.
	spans []span
}

func sealRecord(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func sealedRecord(b []byte) bool {
	n := len(b) - 4
	return crc32.Checksum(b[:n], castagnoli) == binary.LittleEndian.Uint32(b[n:])
}

func encodeSpan(s span) []byte {
	b := make([]byte, 0, journalSpan)
	b = binary.LittleEndian.AppendUint64(b, uint64(s.offset))
	b = binary.LittleEndian.AppendUint32(b, s.length)
	b = binary.LittleEndian.AppendUint32(b, s.crc)
	return sealRecord(b)
}

func (j *journal) encode() []byte {
	b := make([]byte, 0, journalHeader+len(j.spans)*journalSpan)
	b = append(b, journalMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(j.size))
	b = binary.LittleEndian.AppendUint64(b, uint64(j.begun.UnixMilli()))
	b = sealRecord(b)
	for _, s := range j.spans {
		b = append(b, encodeSpan(s)...)
	}
	return b
}

// decodeJournal returns false when b has no valid header. It drops everything
// from the first torn, damaged or misplaced span on.
func decodeJournal(b []byte) (journal, bool) {
	if len(b) < journalHeader || string(b[:8]) != journalMagic || !sealedRecord(b[:journalHeader]) {
		return journal{}, false
	}
	j := journal{
		size:  int64(binary.LittleEndian.Uint64(b[8:])),
		begun: time.UnixMilli(int64(binary.LittleEndian.Uint64(b[16:]))),
	}
	next := int64(0)
	for b = b[journalHeader:]; len(b) >= journalSpan; b = b[journalSpan:] {
		s := span{
			offset: int64(binary.LittleEndian.Uint64(b)),
			length: binary.LittleEndian.Uint32(b[8:]),
			crc:    binary.LittleEndian.Uint32(b[12:]),
		}
		if !sealedRecord(b[:journalSpan]) || s.offset != next || s.length == 0 || s.end() > j.size {
			break
		}
		j.spans = append(j.spans, s)
		next = s.end()
	}
	return j, true
}

// readJournal reads the journal at path. An unusable one is not an error but
// ok == false.
func readJournal(fsys vfs.FS, path string) (j journal, ok bool, err error) {
	f, err := fsys.Open(path)
	if isNotExist(err) {
		return journal{}, false, nil
	}
	if err != nil {
		return journal{}, false, fmt.Errorf("snap: open %s: %w", path, err)
	}
	b, err := io.ReadAll(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return journal{}, false, fmt.Errorf("snap: read %s: %w", path, err)
	}
	j, ok = decodeJournal(b)
	return j, ok, nil
}

// startJournal replaces the journal at path by j and opens it for further
// spans. A new file is needed because a torn span at the end of the old one
// would hide every later span, and vfs files cannot be truncated.
func startJournal(fsys vfs.FS, path string, j *journal) (vfs.File, error) {
	next := path + ".new"
	f, err := fsys.Create(next, writeCategory)
	if err != nil {
		return nil, fmt.Errorf("snap: create %s: %w", next, err)
	}
	if _, err = f.Write(j.encode()); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = fsys.Rename(next, path)
	}
	if err != nil {
		return nil, fmt.Errorf("snap: write %s: %w", next, errors.Join(err, f.Close()))
	}
	return f, nil
}
