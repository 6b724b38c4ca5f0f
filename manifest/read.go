package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	maxFileBytes = 16 << 20 // one file; a pipeline of 1,000 stages has some 200 KiB
	maxFiles     = 10_000   // a folder given by mistake, such as /, ends early
)

// document is one YAML document and where it stands.
type document struct {
	file string
	node *yaml.Node
}

func (d document) at(n *yaml.Node) string { return fmt.Sprintf("%s:%d", d.file, n.Line) }

// readAll reads the documents of paths in order; a folder stands for every
// .yaml, .yml and .json file below it, in the order of their names; "-" is
// stdin.
func readAll(paths []string, stdin io.Reader, faults *Faults) []document {
	var docs []document
	for _, path := range paths {
		if path == "-" {
			raw, err := io.ReadAll(io.LimitReader(stdin, maxFileBytes+1))
			if err != nil {
				faults.add("standard input", "cannot be read: %v", err)
				continue
			}
			docs = append(docs, split("standard input", raw, faults)...)
			continue
		}
		for _, file := range expand(path, faults) {
			raw, err := readBounded(file)
			if err != nil {
				faults.add(file, "cannot be read: %v", err)
				continue
			}
			docs = append(docs, split(file, raw, faults)...)
		}
	}
	return docs
}

func expand(path string, faults *Faults) []string {
	info, err := os.Stat(path)
	if err != nil {
		reason := err
		var pathErr *fs.PathError
		if errors.As(err, &pathErr) {
			reason = pathErr.Err
		}
		faults.add(path, "cannot be read: %v", reason)
		return nil
	}
	if !info.IsDir() {
		return []string{path}
	}
	var files []string
	err = filepath.WalkDir(path, func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			if name := d.Name(); file != path && strings.HasPrefix(name, ".") {
				return fs.SkipDir // .git and the like
			}
			return nil
		case !isManifest(d.Name()):
			return nil
		case len(files) == maxFiles:
			return fmt.Errorf("more than %d files; is this the right folder?", maxFiles)
		}
		files = append(files, file)
		return nil
	})
	if err != nil {
		faults.add(path, "cannot be read: %v", err)
		return nil
	}
	if len(files) == 0 {
		faults.add(path, "holds no .yaml, .yml or .json file")
	}
	slices.Sort(files)
	return files
}

func isManifest(name string) bool {
	ext := strings.ToLower(filepath.Ext(name))
	return !strings.HasPrefix(name, ".") && (ext == ".yaml" || ext == ".yml" || ext == ".json")
}

func readBounded(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxFileBytes+1))
}

// split parses the documents of one file.
func split(file string, raw []byte, faults *Faults) []document {
	if len(raw) > maxFileBytes {
		faults.add(file, "is larger than %d MiB", maxFileBytes>>20)
		return nil
	}
	var docs []document
	add := func(top *yaml.Node) {
		if top.Kind != yaml.SequenceNode {
			docs = append(docs, document{file: file, node: top})
			return
		}
		// A list of pipelines, as pipeline list -o yaml prints it.
		for _, item := range top.Content {
			docs = append(docs, document{file: file, node: resolve(item)})
		}
	}
	if first := bytes.TrimSpace(raw); len(first) > 0 && (first[0] == '{' || first[0] == '[') {
		// What is no JSON may still be YAML in its flow form.
		if nodes, err := jsonNodes(raw); err == nil {
			for _, n := range nodes {
				add(n)
			}
			return docs
		}
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	for {
		var n yaml.Node
		err := dec.Decode(&n)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			// The reader cannot find the next document behind a syntax error.
			where, text := file, strings.TrimPrefix(err.Error(), "yaml: ")
			var line int
			if _, scanErr := fmt.Sscanf(text, "line %d:", &line); scanErr == nil {
				where = fmt.Sprintf("%s:%d", file, line)
				text = strings.TrimSpace(text[strings.IndexByte(text, ':')+1:])
			}
			faults.add(where, "not valid YAML: %s", text)
			return docs
		}
		if len(n.Content) != 1 || isNull(n.Content[0]) {
			continue // an empty document between two separators
		}
		add(n.Content[0])
	}
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}
