package snap

import (
	"fmt"
	"strings"
)

// ManifestName is the file of an image that describes the others.
const ManifestName = "MANIFEST"

// Directories of the store that are not images start with a dot, which no
// image id does: one List tells them apart, and no id can be chosen to collide
// with them.
const (
	manifestName    = ManifestName
	creatingPrefix  = ".creating-"
	deletingPrefix  = ".deleting-"
	receivingPrefix = ".receiving-"

	// Inside a .receiving- directory. The image gets a directory of its own so
	// that the journal never has to be removed before the image is renamed:
	// removing it first would lose the whole prefix in a crash between the two.
	receivedImage   = "image"
	receivedJournal = "journal"

	maxIDLen       = 128
	maxFileNameLen = 255
)

// CheckID reports whether id can name an image: 1 to 128 characters of
// A-Z a-z 0-9 . _ - that do not start with a dot. The error matches
// ErrInvalidID.
func CheckID(id string) error {
	if why := badName(id, maxIDLen); why != "" {
		return fmt.Errorf("%w %q: %s", ErrInvalidID, clip(id), why)
	}
	return nil
}

// badFileName says why name cannot be a file of an image, or "". Names are
// single path elements: what a manifest of another node says is never joined
// to a path without this check.
func badFileName(name string) string {
	if name == manifestName {
		return "the name is reserved for the manifest"
	}
	return badName(name, maxFileNameLen)
}

func badName(s string, maxLen int) string {
	switch {
	case s == "":
		return "the name is empty"
	case len(s) > maxLen:
		return fmt.Sprintf("the name is %d bytes long, the limit is %d", len(s), maxLen)
	case s[0] == '.':
		return "the name starts with a dot"
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		ok := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
			strings.IndexByte("._-", c) >= 0
		if !ok {
			return fmt.Sprintf("byte %d is %q; only letters, digits, '.', '_' and '-' are allowed", i, c)
		}
	}
	return ""
}

// clip bounds foreign text in messages.
func clip(s string) string {
	if len(s) > maxIDLen {
		return s[:maxIDLen] + "..."
	}
	return s
}
