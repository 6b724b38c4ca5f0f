package archive

import (
	"encoding/json"
	"fmt"
	"time"

	"conveyor.etl/router/snap"
)

// FormatVersion is the format that this package writes, and the newest it
// reads. A field that an older reader may ignore needs no new one.
const FormatVersion = 1

// maxHeaderBytes bounds backup.json, which is held in memory.
const maxHeaderBytes = 64 << 10

// Header says what a backup holds. It is the first entry of an archive, so it
// can be read without the rest.
type Header struct {
	// Format is filled in by NewArchive.
	Format int `json:"format"`
	// ClusterID is 16 hex digits, ClusterName what people call the cluster.
	ClusterID   string `json:"cluster_id"`
	ClusterName string `json:"cluster_name,omitempty"`
	// Epoch counts the restores before the backup; Revision is what clients
	// had seen.
	Epoch    uint64 `json:"epoch"`
	Revision uint64 `json:"revision"`
	// Index and Term are those of the last log entry in the state; both are
	// those of the image.
	Index uint64 `json:"index"`
	Term  uint64 `json:"term"`
	// StateHash is of the content, in hex: equal contents, equal hashes.
	StateHash string `json:"state_hash,omitempty"`
	// Counts are the records by kind.
	Counts map[string]uint64 `json:"counts,omitempty"`
	// CreatedUnixMsec is when the image was made, by the clock of its node.
	CreatedUnixMsec int64 `json:"created_unix_msec"`
	// RouterVersion is the program that made the image.
	RouterVersion string `json:"router_version,omitempty"`
}

// Created returns when the image was made.
func (h *Header) Created() time.Time { return time.UnixMilli(h.CreatedUnixMsec).UTC() }

// encode returns the content of backup.json.
func (h *Header) encode() ([]byte, error) {
	if h.CreatedUnixMsec < 0 || h.CreatedUnixMsec/1000 > maxOctal(12) {
		return nil, fmt.Errorf("archive: the time %d ms cannot be stored", h.CreatedUnixMsec)
	}
	// Map keys are sorted by the encoder, so equal headers have equal bytes.
	raw, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("archive: encode the header: %w", err)
	}
	raw = append(raw, '\n')
	if len(raw) > maxHeaderBytes {
		return nil, fmt.Errorf("%w: its header has %d bytes, the limit is %d", ErrTooLarge, len(raw), maxHeaderBytes)
	}
	return raw, nil
}

// decodeHeader is lenient about fields it does not know: the checksum of the
// archive guards the bytes.
func decodeHeader(raw []byte) (Header, error) {
	// The format first: everything else may have changed its shape.
	var probe struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(raw, &probe); err != nil {
		return Header{}, fmt.Errorf("not a header: %w", err)
	}
	if probe.Format > FormatVersion {
		return Header{}, fmt.Errorf("%w: format %d, the newest known is %d; use the version of the program that wrote it, or a newer one",
			ErrNewerFormat, probe.Format, FormatVersion)
	}
	if probe.Format < 1 {
		return Header{}, fmt.Errorf("format %d does not exist", probe.Format)
	}
	var h Header
	if err := json.Unmarshal(raw, &h); err != nil {
		return Header{}, fmt.Errorf("not a header: %w", err)
	}
	return h, nil
}

// matches says what keeps h and the manifest from describing one state, or "".
func (h *Header) matches(info *snap.Info) string {
	if h.Index != info.Index || h.Term != info.Term {
		return fmt.Sprintf("the header says index %d of term %d, the manifest %d of %d", h.Index, h.Term, info.Index, info.Term)
	}
	return ""
}
