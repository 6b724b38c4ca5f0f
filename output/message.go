package output

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Message renders m as JSON in the dialect of all documents: names as in the .proto
// files (snake_case), and numbers as numbers. protojson alone writes lowerCamelCase
// and puts 64-bit numbers between quotes, so that one script would have to know of
// each command how it is made.
func Message(m proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	n := numbers{in: json.NewDecoder(bytes.NewReader(raw))}
	n.in.UseNumber()
	if err := n.value(nil, m.ProtoReflect().Descriptor()); err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return n.out.Bytes(), nil
}

// numbers copies the JSON of a message and takes the quotes off its 64-bit numbers.
// The order of the fields stays, which decoding into maps would lose.
type numbers struct {
	in  *json.Decoder
	out bytes.Buffer
}

// value copies one value: of field (nil for a whole message, or for something that no
// message describes), which is of message type message if that is not nil.
func (n *numbers) value(field protoreflect.FieldDescriptor, message protoreflect.MessageDescriptor) error {
	tok, err := n.in.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	switch t := tok.(type) {
	case json.Delim:
		if t == '[' {
			return n.elements(']', func() error { return n.value(field, message) })
		}
		return n.elements('}', func() error { return n.member(field, message) })
	case string:
		if field != nil && message == nil && is64(field.Kind()) {
			n.out.WriteString(t)
			return nil
		}
		return n.write(t)
	default:
		return n.write(t)
	}
}

// elements copies what is between a bracket that was read and its end.
func (n *numbers) elements(end byte, element func() error) error {
	n.out.WriteByte(map[byte]byte{']': '[', '}': '{'}[end])
	for i := 0; n.in.More(); i++ {
		if i > 0 {
			n.out.WriteByte(',')
		}
		if err := element(); err != nil {
			return err
		}
	}
	n.out.WriteByte(end)
	_, err := n.in.Token()
	return err
}

// member copies one name of an object and its value.
func (n *numbers) member(field protoreflect.FieldDescriptor, message protoreflect.MessageDescriptor) error {
	name, err := n.in.Token()
	if err != nil {
		return err
	}
	if err := n.write(name); err != nil {
		return err
	}
	n.out.WriteByte(':')
	switch text, _ := name.(string); {
	case field != nil && field.IsMap():
		return n.value(field.MapValue(), field.MapValue().Message())
	case message == nil || strings.HasPrefix(string(message.FullName()), "google.protobuf."):
		return n.value(nil, nil) // it has a form of its own
	default:
		f := message.Fields().ByName(protoreflect.Name(text))
		if f == nil {
			return n.value(nil, nil)
		}
		return n.value(f, f.Message())
	}
}

func (n *numbers) write(v any) error {
	var raw bytes.Buffer
	enc := json.NewEncoder(&raw)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return err
	}
	n.out.Write(bytes.TrimRight(raw.Bytes(), "\n"))
	return nil
}

func is64(k protoreflect.Kind) bool {
	switch k {
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return true
	}
	return false
}
