package archive

import (
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Compression is how the tar of an archive is packed. Reading detects it.
type Compression int

// The compressions. Their numbers are those of the API.
const (
	None Compression = iota
	Gzip
	Zstd
)

// String returns the name that ParseCompression takes.
func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("compression %d", int(c))
}

// ParseCompression returns the compression that name (zstd, gzip, gz, none)
// stands for.
func ParseCompression(name string) (Compression, error) {
	switch name {
	case "none":
		return None, nil
	case "gzip", "gz":
		return Gzip, nil
	case "zstd":
		return Zstd, nil
	}
	return 0, fmt.Errorf("unknown compression %q: must be zstd, gzip or none", clip(name))
}

// zstdWindow is how far back a match may lie. Tables are compressed in blocks
// of a few KiB already and a larger one found next to nothing more.
const zstdWindow = 256 << 10

// compressor packs what is written to it. Close ends the stream.
type compressor interface {
	io.WriteCloser
}

// compressor returns the packer of c into out, nil for none.
//
// One thread: the node has other things to do, and what comes out must depend
// on nothing but what went in.
func (c Compression) compressor(out *bytes.Buffer) (compressor, error) {
	switch c {
	case None:
		return nil, nil
	case Gzip:
		return gzip.NewWriterLevel(out, gzip.BestSpeed)
	case Zstd:
		return zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithWindowSize(zstdWindow), zstd.WithEncoderCRC(true), zstd.WithLowerEncoderMem(true))
	}
	return nil, fmt.Errorf("archive: unknown %s", c)
}
