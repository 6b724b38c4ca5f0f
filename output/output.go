package output

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
)

// Format is how a result is rendered. The zero value is Table. It implements
// pflag.Value.
type Format int

// The formats of the -o flag.
const (
	Table Format = iota
	JSON
	YAML
)

// String returns the name of f as the flag takes it.
func (f *Format) String() string {
	switch *f {
	case JSON:
		return "json"
	case YAML:
		return "yaml"
	default:
		return "table"
	}
}

// Set parses the name of a format.
func (f *Format) Set(name string) error {
	switch name {
	case "table":
		*f = Table
	case "json":
		*f = JSON
	case "yaml":
		*f = YAML
	default:
		return errors.New("must be table, json or yaml")
	}
	return nil
}

// Type returns the name the help shows for a value.
func (f *Format) Type() string { return "format" }

// Grid is a table: one header and rows of the same width.
type Grid struct {
	Header []string
	Rows   [][]string
}

// Add appends one row; each cell is formatted by fmt.Sprint.
func (g *Grid) Add(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = fmt.Sprint(c)
	}
	g.Rows = append(g.Rows, row)
}

// Write renders g with aligned columns. Control characters in a cell are
// replaced: a name chosen by somebody else must not move the cursor of the
// terminal it is listed on.
func (g *Grid) Write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	line := func(cells []string) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			fmt.Fprint(tw, Clean(c))
		}
		fmt.Fprintln(tw)
	}
	if len(g.Header) > 0 {
		line(g.Header)
	}
	for _, row := range g.Rows {
		line(row)
	}
	return tw.Flush()
}

// Clean replaces control characters of s by a question mark and an empty s by
// a dash, so that columns stay columns.
func Clean(s string) string {
	if s == "" {
		return "-"
	}
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// Print renders v: as the Grid that table builds when f is Table, else as a
// document. v is a proto.Message, a slice of them, or any value encoding/json
// takes.
func Print(w io.Writer, f Format, v any, table func() *Grid) error {
	if f == Table {
		return table().Write(w)
	}
	return Document(w, f, v)
}

// Document renders v as JSON or YAML (JSON when f is Table).
func Document(w io.Writer, f Format, v any) error {
	raw, err := encode(v)
	if err != nil {
		return fmt.Errorf("encode the result: %w", err)
	}
	if f != YAML {
		var out bytes.Buffer
		if err := json.Indent(&out, raw, "", "  "); err != nil {
			return fmt.Errorf("encode the result: %w", err)
		}
		out.WriteByte('\n')
		_, err = w.Write(out.Bytes())
		return err
	}
	// JSON is YAML; reading it as nodes keeps the order of the fields.
	var doc yaml.Node
	if err := yaml.Unmarshal(raw, &doc); err != nil {
		return fmt.Errorf("encode the result: %w", err)
	}
	blockStyle(&doc)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return err
	}
	return enc.Close()
}

// Messages lets a slice of one message type be printed as one list.
func Messages[M proto.Message](list []M) []proto.Message {
	out := make([]proto.Message, len(list))
	for i, m := range list {
		out[i] = m
	}
	return out
}

func encode(v any) ([]byte, error) {
	switch v := v.(type) {
	case proto.Message:
		return Message(v)
	case []proto.Message:
		parts := make([]json.RawMessage, len(v))
		for i, m := range v {
			raw, err := Message(m)
			if err != nil {
				return nil, err
			}
			parts[i] = raw
		}
		return json.Marshal(parts)
	default:
		return json.Marshal(v)
	}
}

func blockStyle(n *yaml.Node) {
	switch n.Kind {
	case yaml.MappingNode, yaml.SequenceNode:
		// An empty collection has no block form.
		if len(n.Content) > 0 {
			n.Style &^= yaml.FlowStyle
		}
	case yaml.ScalarNode:
		// The encoder quotes again where a plain scalar would read differently,
		// but for the words only older YAML takes for booleans.
		if n.Tag == "!!str" && !oldBoolean(n.Value) {
			n.Style = 0
		}
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

func oldBoolean(s string) bool {
	switch strings.ToLower(s) {
	case "y", "n", "yes", "no", "on", "off":
		return true
	}
	return false
}
