package manifest

import (
	"fmt"
	"strings"
)

// Fault is one thing wrong with a file.
type Fault struct {
	// Where is FILE or FILE:LINE.
	Where string
	Text  string
}

// String returns f on one line.
func (f Fault) String() string { return f.Where + ": " + f.Text }

// Faults are all the things wrong with the files read. It is an error.
type Faults []Fault

// Error implements error: one fault a line.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i, fault := range f {
		lines[i] = fault.String()
	}
	return strings.Join(lines, "\n")
}

// err returns f as an error, nil when empty.
func (f Faults) err() error {
	if len(f) == 0 {
		return nil
	}
	return f
}

func (f *Faults) add(where, format string, args ...any) {
	*f = append(*f, Fault{Where: where, Text: fmt.Sprintf(format, args...)})
}
