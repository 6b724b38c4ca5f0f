package config

import (
	"fmt"
	"strings"
)

// Fault is one thing wrong with the settings.
type Fault struct {
	// Where names the flag, the variable, or the file and line.
	Where string
	// Key is the setting concerned, empty when none is.
	Key string
	// Text says what is wrong.
	Text string
}

// String returns f on one line.
func (f Fault) String() string {
	if f.Key == "" {
		return f.Where + ": " + f.Text
	}
	return f.Where + ": " + f.Key + ": " + f.Text
}

// Faults are all the things wrong with the settings. It is the error of Load.
type Faults []Fault

// Error implements error: one fault a line.
func (f Faults) Error() string {
	lines := make([]string, len(f))
	for i, fault := range f {
		lines[i] = fault.String()
	}
	if len(f) == 1 {
		return "the configuration is not valid: " + lines[0]
	}
	return fmt.Sprintf("the configuration is not valid, %d faults:\n  %s", len(f), strings.Join(lines, "\n  "))
}

func (f *Faults) add(where, key, format string, args ...any) {
	*f = append(*f, Fault{Where: where, Key: key, Text: fmt.Sprintf(format, args...)})
}
