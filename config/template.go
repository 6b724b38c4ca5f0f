package config

import (
	"fmt"
	"io"
	"strings"
)

// WriteTemplate writes a YAML file with every setting at its default, each with
// its meaning as a comment. Settings without a default are commented out.
func WriteTemplate(w io.Writer) error {
	var b strings.Builder
	section := ""
	for _, s := range settings() {
		if s.unused != "" {
			continue
		}
		head, key, nested := strings.Cut(s.key, ".")
		indent := ""
		if nested {
			indent = "  "
			if head != section {
				fmt.Fprintf(&b, "\n%s:\n", head)
				section = head
			}
		} else {
			key = head
		}
		fmt.Fprintf(&b, "%s# %s\n", indent, s.usage)
		switch {
		case s.list:
			fmt.Fprintf(&b, "%s# %s: [\"1:host-1:50052\", \"2:host-2:50052\", \"3:host-3:50052\"]\n", indent, key)
		case s.def == "":
			fmt.Fprintf(&b, "%s# %s:\n", indent, key)
		default:
			fmt.Fprintf(&b, "%s%s: %s\n", indent, key, s.def)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
