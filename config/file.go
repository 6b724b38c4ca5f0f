package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFileBytes bounds a configuration file; a real one has a few kilobytes.
const maxFileBytes = 1 << 20

// entry is one value found in a source.
type entry struct {
	where string // "router.yaml:12", "flag --peers", "env CONVEYOR_ROUTER_PEERS"
	texts []string
	// at holds the place of each text, for lists in a file.
	at []string
}

// readFile reads the settings of a YAML file into entries by key. Everything
// wrong with the file is added to faults.
func readFile(name string, table map[string]*setting, faults *Faults) map[string]entry {
	raw, err := readBounded(name)
	if err != nil {
		faults.add(name, "", "cannot be read: %v", err)
		return nil
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil // an empty file sets nothing
	case err != nil:
		faults.add(yamlPlace(name, err), "", "%s", yamlText(err))
		return nil
	}
	var second yaml.Node
	if err := dec.Decode(&second); err == nil {
		faults.add(place(name, &second), "", "a second document; a configuration file has one")
	} else if !errors.Is(err, io.EOF) {
		faults.add(yamlPlace(name, err), "", "%s", yamlText(err))
	}
	r := fileReader{name: name, table: table, faults: faults, found: map[string]entry{}, seen: map[string]string{}}
	if len(doc.Content) == 1 {
		r.section(doc.Content[0], "")
	}
	return r.found
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxFileBytes {
		return nil, fmt.Errorf("it is larger than %d bytes", maxFileBytes)
	}
	return raw, nil
}

type fileReader struct {
	name   string
	table  map[string]*setting
	faults *Faults
	found  map[string]entry
	seen   map[string]string // setting -> where it was given
}

// section reads one mapping; prefix is its path with a trailing dot.
func (r *fileReader) section(n *yaml.Node, prefix string) {
	n = resolve(n)
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // "raft:" with everything below it commented out
	}
	if n.Kind != yaml.MappingNode {
		what := "the file"
		if prefix != "" {
			what = "section " + strings.TrimSuffix(prefix, ".")
		}
		r.faults.add(place(r.name, n), "", "%s must hold keys and values", what)
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], resolve(n.Content[i+1])
		full := prefix + key.Value
		target := full
		if alias, ok := aliases[full]; ok {
			target = alias
		}
		switch s := r.table[target]; {
		case s != nil:
			if first, twice := r.seen[target]; twice {
				r.faults.add(place(r.name, key), full, "is set twice; first at %s", first)
				continue
			}
			r.seen[target] = place(r.name, key)
			r.value(s, full, target, key, val)
		case r.isSection(full):
			if first, twice := r.seen[full]; twice {
				r.faults.add(place(r.name, key), full, "the section stands twice; first at %s", first)
				continue
			}
			r.seen[full] = place(r.name, key)
			r.section(val, full+".")
		default:
			r.faults.add(place(r.name, key), full, "unknown key%s", r.suggest(full))
		}
	}
}

func (r *fileReader) value(s *setting, full, target string, key, val *yaml.Node) {
	e := entry{where: place(r.name, key)}
	switch {
	case val.Kind == yaml.ScalarNode && val.Tag == "!!null":
		return // "key:" without a value leaves the default
	case val.Kind == yaml.ScalarNode:
		e.texts, e.at = []string{val.Value}, []string{place(r.name, val)}
	case val.Kind == yaml.SequenceNode && s.list:
		for _, item := range val.Content {
			item = resolve(item)
			if item.Kind != yaml.ScalarNode {
				r.faults.add(place(r.name, item), full, "each entry must be one text")
				continue
			}
			e.texts = append(e.texts, item.Value)
			e.at = append(e.at, place(r.name, item))
		}
	case s.list:
		r.faults.add(place(r.name, val), full, "must be a list")
		return
	default:
		r.faults.add(place(r.name, val), full, "must be one value")
		return
	}
	r.found[target] = e
}

func (r *fileReader) isSection(full string) bool {
	for key := range r.table {
		if strings.HasPrefix(key, full+".") {
			return true
		}
	}
	return false
}

// suggest returns "; did you mean X?" for the known key nearest to full.
func (r *fileReader) suggest(full string) string {
	var keys []string
	for key := range r.table {
		keys = append(keys, key)
	}
	for key := range aliases {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return nearest(full, keys)
}

func nearest(given string, known []string) string {
	last := func(s string) string { return s[strings.LastIndexByte(s, '.')+1:] }
	// More edits apart than this is no slip of the keyboard.
	best, bestDistance := "", max(4, len(given)/6)
	for _, k := range known {
		d := distance(given, k)
		if last(given) == last(k) {
			d = min(d, 3) // right key, wrong section
		}
		if d < bestDistance {
			best, bestDistance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %s?", best)
}

// distance is the number of single-character edits between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diagonal, row[j] = row[j], min(row[j]+1, row[j-1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func place(name string, n *yaml.Node) string { return fmt.Sprintf("%s:%d", name, n.Line) }

// yamlPlace finds the line in a syntax error of the YAML reader.
func yamlPlace(name string, err error) string {
	var line int
	if _, scanErr := fmt.Sscanf(err.Error(), "yaml: line %d:", &line); scanErr == nil {
		return fmt.Sprintf("%s:%d", name, line)
	}
	return name
}

func yamlText(err error) string {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	var line int
	if _, scanErr := fmt.Sscanf(text, "line %d:", &line); scanErr == nil {
		text = strings.TrimSpace(text[strings.IndexByte(text, ':')+1:])
	}
	return "not valid YAML: " + text
}
