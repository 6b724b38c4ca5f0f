package archive

import "fmt"

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
