package backup

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"conveyor.etl/router/snap"
)

// The names and bounds of the objects of a backup.
const (
	// ArchiveName and MetadataName are the objects of a backup. Existing tools
	// write and read these names, whatever the compression.
	ArchiveName  = "checkpoint.tar.zst"
	MetadataName = "metadata.json"

	// metadataVersion is what existing tools write.
	metadataVersion = "1.0"
	// maxMetadataBytes bounds metadata.json, which is held in memory.
	maxMetadataBytes = 1 << 20
)

// Metadata is the content of metadata.json. The first eight keys are those of
// existing tools; backups that such a tool has made have only these.
type Metadata struct {
	BackupID string `json:"backup_id"`
	// RouterEndpoint is the node that the backup was taken from, host:port.
	RouterEndpoint string `json:"router_endpoint"`
	CommitIndex    uint64 `json:"commit_index"`
	Term           uint64 `json:"term"`
	// SizeBytes is the size of the archive as it is stored.
	SizeBytes uint64 `json:"size_bytes"`
	// CreatedAt is when the snapshot was made.
	CreatedAt time.Time `json:"created_at"`
	// Compression is zstd, gzip or none.
	Compression string `json:"compression"`
	Version     string `json:"version"`

	// SHA256 is of the archive as it is stored, in hex.
	SHA256 string `json:"sha256,omitempty"`
	// StateHash is of the content: equal contents, equal hashes.
	StateHash   string            `json:"state_hash,omitempty"`
	ClusterID   string            `json:"cluster_id,omitempty"`
	ClusterName string            `json:"cluster_name,omitempty"`
	Epoch       uint64            `json:"epoch,omitempty"`
	Revision    uint64            `json:"revision,omitempty"`
	Counts      map[string]uint64 `json:"counts,omitempty"`
	// StateAgreed: a majority of the voters held the same state as the node that the
	// backup was taken from, then or later. Without it nobody has looked.
	StateAgreed bool `json:"state_agreed,omitempty"`
	// RouterVersion is the program that made the snapshot.
	RouterVersion string `json:"router_version,omitempty"`
}

// CheckID reports whether id can name a backup: 1 to 128 characters of
// A-Z a-z 0-9 . _ - that do not start with a dot. The error matches
// ErrInvalidID.
func CheckID(id string) error {
	if err := snap.CheckID(id); err != nil {
		return fmt.Errorf("%w %q: use 1 to 128 of A-Z a-z 0-9 . _ - and no dot in front", ErrInvalidID, clip(id))
	}
	return nil
}

func (m *Metadata) encode() ([]byte, error) {
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("backup: encode the metadata: %w", err)
	}
	raw = append(raw, '\n')
	if len(raw) > maxMetadataBytes {
		return nil, fmt.Errorf("backup: the metadata has %d bytes, the limit is %d", len(raw), maxMetadataBytes)
	}
	return raw, nil
}

// decodeMetadata ignores keys it does not know: later versions add some.
func decodeMetadata(id string, raw []byte) (Metadata, error) {
	bad := func(format string, args ...any) (Metadata, error) {
		return Metadata{}, &DamagedError{ID: id, Object: MetadataName, Detail: fmt.Sprintf(format, args...)}
	}
	var m Metadata
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&m); err != nil {
		return bad("%v", err)
	}
	switch {
	case m.BackupID != id:
		return bad("it is of backup %q", clip(m.BackupID))
	case m.SizeBytes == 0 || m.SizeBytes > 1<<62:
		return bad("the archive cannot have %d bytes", m.SizeBytes)
	case m.SHA256 != "" && (len(m.SHA256) != 64 || strings.Trim(m.SHA256, "0123456789abcdef") != ""):
		return bad("sha256 is not 64 hexadecimal digits")
	}
	return m, nil
}
