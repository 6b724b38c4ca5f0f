package router

import (
	"errors"
	"fmt"
	"reflect"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"conveyor.etl/router/router/commandpb"
)

// A command that Apply cannot decode stops every replica, and again after each
// restart: it is in the log. So it has to be found out before it is proposed.
// These are the checks for that; Apply takes whatever passes them.

// maxNesting bounds messages within messages. It is protobuf's own bound, which
// the generated decoders lack: each level costs them a stack frame, and a stack
// that is full ends the process.
const maxNesting = 10_000

// CheckCommand returns why Apply could not take c, nil when it can. It is for
// commands made by this process, whose parts are of known types.
func CheckCommand(c *commandpb.Command) error {
	if u := c.ProtoReflect().GetUnknown(); len(u) > 0 {
		return fmt.Errorf("%d bytes of it are of fields this release does not know", len(u))
	}
	if c.Op == nil {
		return nil // refused when it is applied, alike on every replica
	}
	if _, ok := knownOperations()[reflect.TypeOf(c.Op)]; !ok {
		return fmt.Errorf("this release does not know the operation %T", c.Op)
	}
	return nil
}

// CheckEncoded returns why Apply could not take the command raw, nil when it can.
// It walks over the bytes and allocates nothing: every command that another node
// forwards passes it.
//
// It is stricter than Apply in one thing: no message inside the command may have
// a field that this release does not know. Apply would ignore it, while a replica
// of the newer release that sent it would not.
func CheckEncoded(raw []byte) error {
	return commandLayout().check(raw, 0)
}

// knownOperations is what commandTable has handlers for.
var knownOperations = sync.OnceValue(commandTable)

// commandLayout describes the wire form of a Command whose operations Apply
// knows.
var commandLayout = sync.OnceValue(func() *messageLayout {
	known := map[protowire.Number]bool{}
	for _, h := range knownOperations() {
		known[protowire.Number(h.op)] = true
	}
	root := layoutOf((&commandpb.Command{}).ProtoReflect().Descriptor(), map[protoreflect.FullName]*messageLayout{})
	ops := (&commandpb.Command{}).ProtoReflect().Descriptor().Oneofs().ByName("op").Fields()
	for i := range ops.Len() {
		if num := ops.Get(i).Number(); !known[num] {
			root.fields[num] = fieldLayout{}
		}
	}
	return root
})

// messageLayout says what the fields of a message look like on the wire.
type messageLayout struct {
	name   string
	fields []fieldLayout // by number; the numbers of commands are small
}

type fieldLayout struct {
	known bool
	wire  protowire.Type
	// packable: a repeated number, which may come as bytes that hold many.
	packable bool
	// message describes the value of a field that is a message, also of an
	// entry of a map.
	message *messageLayout
}

// layoutOf describes a message and all within it. Messages that contain
// themselves find themselves in done.
func layoutOf(d protoreflect.MessageDescriptor, done map[protoreflect.FullName]*messageLayout) *messageLayout {
	if l := done[d.FullName()]; l != nil {
		return l
	}
	l := &messageLayout{name: string(d.Name())}
	done[d.FullName()] = l
	for i := range d.Fields().Len() {
		fd := d.Fields().Get(i)
		f := fieldLayout{known: true}
		switch fd.Kind() {
		case protoreflect.StringKind, protoreflect.BytesKind:
			f.wire = protowire.BytesType
		case protoreflect.MessageKind:
			f.wire, f.message = protowire.BytesType, layoutOf(fd.Message(), done)
		case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
			f.wire = protowire.Fixed32Type
		case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
			f.wire = protowire.Fixed64Type
		case protoreflect.GroupKind:
			continue // the generated decoders refuse groups
		default:
			f.wire = protowire.VarintType
		}
		f.packable = fd.IsList() && f.wire != protowire.BytesType
		for len(l.fields) <= int(fd.Number()) {
			l.fields = append(l.fields, fieldLayout{})
		}
		l.fields[fd.Number()] = f
	}
	return l
}

var errNesting = errors.New("its messages are nested too deeply")

// check reports what is wrong with the encoded message b.
func (l *messageLayout) check(b []byte, depth int) error {
	if depth > maxNesting {
		return errNesting
	}
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return l.malformed(0, n)
		}
		b = b[n:]
		if int(num) >= len(l.fields) || !l.fields[num].known {
			return fmt.Errorf("this release does not know field %d of a %s", num, l.name)
		}
		f := &l.fields[num]
		var inner []byte
		switch typ {
		case protowire.BytesType:
			inner, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			_, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return l.malformed(num, n)
		}
		b = b[n:]
		switch {
		case typ != f.wire && !(f.packable && typ == protowire.BytesType):
			return fmt.Errorf("field %d of a %s has wire type %d", num, l.name, typ)
		case typ != f.wire:
			for len(inner) > 0 {
				if n = protowire.ConsumeFieldValue(num, f.wire, inner); n < 0 {
					return l.malformed(num, n)
				}
				inner = inner[n:]
			}
		case f.message != nil:
			if err := f.message.check(inner, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *messageLayout) malformed(num protowire.Number, code int) error {
	return fmt.Errorf("field %d of a %s: %w", num, l.name, protowire.ParseError(code))
}
