package snap

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"time"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protojson"
)

// A MANIFEST file is one header line of fixed length followed by a JSON body:
//
//	conveyor-image format=00001 bytes=0000000321 crc32c=0a1b2c3d
//	{"index":...,"term":...,"files":[...]}
//
// The header has the same shape in every format, so that an older program can
// tell "newer" from "damaged". Its checksum covers the header up to the
// checksum and the whole body. The checksum is outside of the JSON because a
// JSON document has many spellings: inside, a damaged byte of white space or
// of a key's case would go unnoticed.
const (
	formatVersion = 1

	headerMagic  = "conveyor-image format="
	headerFormat = headerMagic + "%05d bytes=%010d"
	crcFormat    = " crc32c=%08x\n"
	checkedLen   = len(headerMagic) + 5 + len(" bytes=") + 10
	headerLen    = int64(checkedLen + len(" crc32c=") + 8 + 1)
	maxBodyBytes = 9_999_999_999
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type manifestJSON struct {
	Index           uint64          `json:"index"`
	Term            uint64          `json:"term"`
	ConfState       json.RawMessage `json:"conf_state,omitempty"`
	Members         []Member        `json:"members,omitempty"`
	CreatedUnixMsec int64           `json:"created_unix_msec"`
	Files           []fileJSON      `json:"files"`
}

type fileJSON struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	CRC  string `json:"crc32c"`
}

// header is the decoded first line of a manifest.
type header struct {
	format int
	body   int64
	crc    uint32
}

// size returns the length of the whole manifest.
func (h header) size() int64 { return headerLen + h.body }

// encodeManifest returns the bytes of the manifest that describes info. ID and
// Size of info are ignored: both follow from the result.
func encodeManifest(info *Info) ([]byte, error) {
	m := manifestJSON{
		Index:           info.Index,
		Term:            info.Term,
		Members:         info.Members,
		CreatedUnixMsec: info.Created.UnixMilli(),
		Files:           make([]fileJSON, 0, len(info.Files)),
	}
	if info.ConfState != nil {
		cs, err := protojson.Marshal(info.ConfState)
		if err != nil {
			return nil, fmt.Errorf("snap: encode the configuration of an image: %w", err)
		}
		// protojson varies its white space on purpose; ids are derived from
		// these bytes.
		var compact bytes.Buffer
		if err := json.Compact(&compact, cs); err != nil {
			return nil, fmt.Errorf("snap: encode the configuration of an image: %w", err)
		}
		m.ConfState = compact.Bytes()
	}
	for _, f := range info.Files {
		m.Files = append(m.Files, fileJSON{f.Name, f.Size, fmt.Sprintf("%08x", f.CRC)})
	}
	body, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("snap: encode a manifest: %w", err)
	}
	body = append(body, '\n')
	raw := fmt.Appendf(nil, headerFormat, formatVersion, len(body))
	crc := crc32.Update(crc32.Checksum(raw, castagnoli), castagnoli, body)
	raw = fmt.Appendf(raw, crcFormat, crc)
	return append(raw, body...), nil
}

// decodeHeader reads the header line at the start of raw, which must hold at
// least headerLen bytes. The text of an error says what is wrong with it.
func decodeHeader(raw []byte) (header, error) {
	line := raw[:headerLen]
	var h header
	var format, crc uint64
	var body uint64
	ok := true
	rest := line
	literal := func(s string) {
		if ok = ok && bytes.HasPrefix(rest, []byte(s)); ok {
			rest = rest[len(s):]
		}
	}
	// Not strconv or Sscanf: both accept other spellings of the same number,
	// behind which a flipped bit could hide.
	number := func(v *uint64, digits int, base uint64) {
		for i := 0; ok && i < digits; i++ {
			c := rest[i]
			switch {
			case '0' <= c && c <= '9':
				*v = *v*base + uint64(c-'0')
			case base == 16 && 'a' <= c && c <= 'f':
				*v = *v*base + uint64(c-'a'+10)
			default:
				ok = false
			}
		}
		if ok {
			rest = rest[digits:]
		}
	}
	literal(headerMagic)
	number(&format, 5, 10)
	literal(" bytes=")
	number(&body, 10, 10)
	literal(" crc32c=")
	number(&crc, 8, 16)
	literal("\n")
	if !ok {
		return h, fmt.Errorf("the header line is malformed: %q", line)
	}
	h.format, h.body, h.crc = int(format), int64(body), uint32(crc)
	return h, nil
}

// decodeManifest checks and decodes a whole manifest. image names it in errors.
func decodeManifest(raw []byte, image string, o *Options) (*Info, error) {
	bad := func(format string, args ...any) error {
		return &CorruptError{Image: image, File: manifestName, Detail: fmt.Sprintf(format, args...)}
	}
	if int64(len(raw)) > o.MaxManifestBytes {
		return nil, manifestTooLarge(image, int64(len(raw)), o)
	}
	if int64(len(raw)) < headerLen {
		return nil, bad("%d bytes are too few for a header", len(raw))
	}
	h, err := decodeHeader(raw)
	if err != nil {
		return nil, bad("%v", err)
	}
	if h.size() != int64(len(raw)) {
		return nil, bad("%d bytes long, its header says %d", len(raw), h.size())
	}
	body := raw[headerLen:]
	crc := crc32.Update(crc32.Checksum(raw[:checkedLen], castagnoli), castagnoli, body)
	if crc != h.crc {
		return nil, bad("checksum %08x, its header says %08x", crc, h.crc)
	}
	// From here on, the bytes are those that were written; what is wrong now
	// was wrong then.
	if h.format > formatVersion {
		return nil, fmt.Errorf("%w: image %s has format %d, the newest known is %d; "+
			"the image was left alone: use the newer program to read it", ErrNewerFormat, image, h.format, formatVersion)
	}
	if h.format < 1 {
		return nil, bad("format %d does not exist", h.format)
	}
	var m manifestJSON
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, bad("%v", err)
	}
	info := &Info{
		ID:      imageID(raw, m.Index, m.Term),
		Meta:    Meta{Index: m.Index, Term: m.Term, Members: m.Members, Format: h.format},
		Created: time.UnixMilli(m.CreatedUnixMsec),
		Files:   make([]File, 0, min(len(m.Files), o.MaxFiles)),
	}
	if len(m.ConfState) > 0 {
		info.ConfState = new(raftpb.ConfState)
		if err := protojson.Unmarshal(m.ConfState, info.ConfState); err != nil {
			return nil, bad("configuration: %v", err)
		}
	}
	for _, f := range m.Files {
		crc, err := hex.DecodeString(f.CRC)
		if err != nil || len(crc) != 4 {
			return nil, bad("the checksum %q of file %q is not 8 hexadecimal digits", clip(f.CRC), clip(f.Name))
		}
		info.Files = append(info.Files, File{f.Name, f.Size,
			uint32(crc[0])<<24 | uint32(crc[1])<<16 | uint32(crc[2])<<8 | uint32(crc[3])})
	}
	if err := info.complete(image, int64(len(raw)), o); err != nil {
		return nil, err
	}
	return info, nil
}

// complete checks the parts of info against each other and the limits, and
// fills in Bytes and Size.
func (info *Info) complete(image string, manifestBytes int64, o *Options) error {
	bad := func(format string, args ...any) error {
		return &CorruptError{Image: image, File: manifestName, Detail: fmt.Sprintf(format, args...)}
	}
	if info.Index == 0 || info.Term == 0 {
		return bad("index %d and term %d: neither may be zero", info.Index, info.Term)
	}
	if len(info.Files) > o.MaxFiles {
		return fmt.Errorf("%w: image %s has %d files, the limit is %d", ErrTooLarge, image, len(info.Files), o.MaxFiles)
	}
	info.Bytes = 0
	for i, f := range info.Files {
		if why := badFileName(f.Name); why != "" {
			return bad("file name %q: %s", clip(f.Name), why)
		}
		if i > 0 && info.Files[i-1].Name >= f.Name {
			return bad("file %q does not sort after %q", f.Name, info.Files[i-1].Name)
		}
		if f.Size < 0 {
			return bad("file %q has size %d", f.Name, f.Size)
		}
		if f.Size > o.MaxImageBytes-info.Bytes {
			return fmt.Errorf("%w: the files of image %s exceed %d bytes", ErrTooLarge, image, o.MaxImageBytes)
		}
		info.Bytes += f.Size
	}
	info.Size = manifestBytes + info.Bytes
	return nil
}

func manifestTooLarge(image string, size int64, o *Options) error {
	return fmt.Errorf("%w: the manifest of image %s has %d bytes, the limit is %d",
		ErrTooLarge, image, size, o.MaxManifestBytes)
}

// imageID derives the id from the manifest, which contains the checksum of
// every file. Two nodes that image the same index write different tables: were
// the id made of index and term alone, a receive begun with one node's image
// would be resumed with the other's.
func imageID(manifest []byte, index, term uint64) string {
	sum := sha256.Sum256(manifest)
	return fmt.Sprintf("%020d-t%d-%x", index, term, sum[:8])
}
