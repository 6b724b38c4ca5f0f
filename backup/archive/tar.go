package archive

import (
	"bytes"
	"fmt"
)

const (
	blockSize  = 512
	maxNameLen = 100
	// maxFileSize is what eleven octal digits hold: 8 GiB less one byte.
	maxFileSize = 1<<33 - 1

	headerName   = "backup.json"
	checksumName = "checksum"
	// checksumLen is 64 hex digits and the end of the line.
	checksumLen = 65
	// endLen is the two blocks of zeroes that end a tar.
	endLen = 2 * blockSize
)

// maxOctal is the largest number in a tar field of n bytes, the last of which
// is a NUL.
func maxOctal(n int) int64 { return 1<<(3*(n-1)) - 1 }

// padding is what fills size up to whole blocks.
func padding(size int64) int { return int(-size & (blockSize - 1)) }

// block returns the USTAR header of a plain file. It is the only header this
// package writes or accepts: owner, mode and kind are the same for all files,
// so there is nothing for a link, a device or a path to hide in.
func block(name string, size, mtime int64) []byte {
	b := make([]byte, blockSize)
	copy(b[:maxNameLen], name)
	copy(b[100:], "0000600\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x00", size))
	copy(b[136:], fmt.Sprintf("%011o\x00", mtime))
	copy(b[148:], "        ")
	b[156] = '0'
	copy(b[257:], "ustar\x0000")
	copy(b[329:], "0000000\x00")
	copy(b[337:], "0000000\x00")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// parseBlock reads a header that block has written. The text of an error says
// what is wrong with it.
func parseBlock(b []byte) (name string, size, mtime int64, err error) {
	end := bytes.IndexByte(b[:maxNameLen], 0)
	if end < 0 {
		end = maxNameLen
	}
	name = string(b[:end])
	if bytes.Equal(b, make([]byte, blockSize)) {
		return "", 0, 0, fmt.Errorf("the archive ends here, too early")
	}
	var ok1, ok2 bool
	size, ok1 = octal(b[124:136])
	mtime, ok2 = octal(b[136:148])
	if ok1 && ok2 && bytes.Equal(b, block(name, size, mtime)) {
		return name, size, mtime, nil
	}
	// Only to say it in words: whatever differs is refused.
	switch kind := b[156]; {
	case string(b[257:262]) != "ustar":
		return name, 0, 0, fmt.Errorf("no header of a file")
	case kind == '1', kind == '2':
		return name, 0, 0, fmt.Errorf("entry %q is a link; an archive holds plain files only", clip(name))
	case kind != '0':
		return name, 0, 0, fmt.Errorf("entry %q has kind %q; an archive holds plain files only", clip(name), kind)
	}
	return name, 0, 0, fmt.Errorf("the header of entry %q is not one that was written here", clip(name))
}

func octal(field []byte) (v int64, ok bool) {
	last := len(field) - 1
	for _, c := range field[:last] {
		if c < '0' || c > '7' {
			return 0, false
		}
		v = v<<3 | int64(c-'0')
	}
	return v, field[last] == 0
}
