package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// jsonNodes parses a stream of JSON values into the nodes the YAML reader would
// have made. JSON is almost YAML: tabs between tokens, surrogate pairs in
// escapes and some raw characters are where the YAML reader gives up.
func jsonNodes(raw []byte) ([]*yaml.Node, error) {
	r := jsonReader{raw: raw, dec: json.NewDecoder(bytes.NewReader(raw)), line: 1}
	r.dec.UseNumber()
	var nodes []*yaml.Node
	for {
		n, err := r.value(0)
		if errors.Is(err, io.EOF) {
			return nodes, nil
		}
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
}

type jsonReader struct {
	raw  []byte
	dec  *json.Decoder
	line int // of offset at
	at   int
}

// token returns the next token and the line it ends in.
func (r *jsonReader) token() (json.Token, int, error) {
	t, err := r.dec.Token()
	if err != nil {
		return nil, 0, err
	}
	end := int(r.dec.InputOffset())
	r.line += bytes.Count(r.raw[r.at:end], []byte("\n"))
	r.at = end
	return t, r.line, nil
}

func (r *jsonReader) value(depth int) (*yaml.Node, error) {
	if depth > 1000 {
		return nil, errors.New("nested too deeply")
	}
	t, line, err := r.token()
	if err != nil {
		return nil, err
	}
	scalar := func(tag, text string) (*yaml.Node, error) {
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: text, Line: line}, nil
	}
	switch t := t.(type) {
	case nil:
		return scalar("!!null", "null")
	case bool:
		return scalar("!!bool", fmt.Sprint(t))
	case string:
		return scalar("!!str", t)
	case json.Number:
		if strings.ContainsAny(t.String(), ".eE") {
			return scalar("!!float", t.String())
		}
		return scalar("!!int", t.String())
	}
	n := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Line: line}
	if t == json.Delim('[') {
		n.Kind, n.Tag = yaml.SequenceNode, "!!seq"
	}
	// In an object keys and values alternate; both are read as values.
	for r.dec.More() {
		child, err := r.value(depth + 1)
		if err != nil {
			return nil, unexpectedEnd(err)
		}
		n.Content = append(n.Content, child)
	}
	if _, _, err := r.token(); err != nil {
		return nil, unexpectedEnd(err)
	}
	return n, nil
}

func unexpectedEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
