package router

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"conveyor.etl/router/router/commandpb"
)

// The limits of the state. They are the same on every replica by being
// constants.
const (
	maxIDBytes          = 256
	maxTextBytes        = 4096
	maxCheckpointBytes  = 1 << 20
	maxStages           = 1000
	maxEdges            = 10_000
	maxSpecBytes        = 1 << 20
	maxBatchOps         = 10_000
	maxSourceOffsets    = 10_000
	maxPartitions       = 65_536
	maxMembers          = 10_000
	maxLocalServices    = 1000
	maxMapEntries       = 1000
	maxChanges          = 10_000
	maxStageAssignments = maxStages
	maxParallelism      = maxPartitions
)

// CheckID reports why s cannot be an id: it has to be 1 to 256 bytes of valid
// UTF-8 without control characters and without ".." between slashes. An empty
// answer means that it can.
func CheckID(s string) string {
	switch {
	case s == "":
		return "must not be empty"
	case len(s) > maxIDBytes:
		return fmt.Sprintf("is %d bytes long, at most %d are allowed", len(s), maxIDBytes)
	}
	if s == ".." || strings.HasPrefix(s, "../") || strings.HasSuffix(s, "/..") || strings.Contains(s, "/../") {
		return `must not contain ".." as a path element`
	}
	ascii := true
	for i := 0; i < len(s); i++ {
		if s[i] < 0x20 || s[i] >= 0x7f {
			ascii = false
			break
		}
	}
	if ascii {
		return ""
	}
	if !utf8.ValidString(s) {
		return "is not valid UTF-8"
	}
	for _, r := range s {
		if invisible(r) {
			return fmt.Sprintf("contains the unprintable character %U", r)
		}
	}
	return ""
}

// invisible reports control and formatting characters. The ranges are written
// out: unicode.IsPrint changes with the Unicode tables of the Go release, and
// replicas built with different ones would decide differently.
func invisible(r rune) bool {
	switch {
	case r < 0x20, r >= 0x7f && r < 0xa0, r == 0xad, r == 0xfeff, r == 0xfffd:
	case r >= 0x200b && r <= 0x200f, r >= 0x2028 && r <= 0x202e, r >= 0x2060 && r <= 0x206f:
	case r >= 0xfff0 && r <= 0xfffb, r&0xfffe == 0xfffe, r >= 0xe0000 && r <= 0xe0fff:
	default:
		return false
	}
	return true
}

func reject(code commandpb.Code, subject, format string, args ...any) *commandpb.Rejection {
	return &commandpb.Rejection{Code: code, Subject: subject, Reason: fmt.Sprintf(format, args...)}
}

func invalid(subject, format string, args ...any) *commandpb.Rejection {
	return reject(commandpb.Code_CODE_INVALID, subject, format, args...)
}

func limit(subject, format string, args ...any) *commandpb.Rejection {
	return reject(commandpb.Code_CODE_LIMIT, subject, format, args...)
}

func notFound(kind, id string) *commandpb.Rejection {
	return reject(commandpb.Code_CODE_NOT_FOUND, kind+" "+id, "there is no %s %q", kind, id)
}

func conflict(subject string, current uint64, format string, args ...any) *commandpb.Rejection {
	r := reject(commandpb.Code_CODE_CONFLICT, subject, format, args...)
	r.Current = current
	return r
}

// checkID refuses a bad id. what names the field.
func checkID(what, id string) *commandpb.Rejection {
	if why := CheckID(id); why != "" {
		return invalid(what, "%s %s", what, why)
	}
	return nil
}

// checkText refuses a text that is too long or not UTF-8.
func checkText(what, s string) *commandpb.Rejection {
	if len(s) > maxTextBytes {
		return limit(what, "%s is %d bytes long, at most %d are allowed", what, len(s), maxTextBytes)
	}
	if !utf8.ValidString(s) {
		return invalid(what, "%s is not valid UTF-8", what)
	}
	return nil
}

// first returns the first refusal.
func first(r ...*commandpb.Rejection) *commandpb.Rejection {
	for _, x := range r {
		if x != nil {
			return x
		}
	}
	return nil
}
