package manifest

import (
	"math"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxDepth bounds nesting: conditions may contain conditions.
const maxDepth = 64

// decoder fills a message from YAML by the field names of its JSON form. It
// stands in for protojson because that knows no lines and stops at the first
// fault.
type decoder struct {
	doc    document
	faults *Faults
}

func (d *decoder) message(n *yaml.Node, m protoreflect.Message, depth int) {
	n = resolve(n)
	what := string(m.Descriptor().Name())
	if depth > maxDepth {
		d.faults.add(d.doc.at(n), "%s: nested deeper than %d levels", what, maxDepth)
		return
	}
	if n.Kind != yaml.MappingNode {
		d.faults.add(d.doc.at(n), "%s must hold fields and values", what)
		return
	}
	seen := map[protoreflect.FieldNumber]int{}
	oneofs := map[protoreflect.Name]string{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], resolve(n.Content[i+1])
		fields := m.Descriptor().Fields()
		fd := fields.ByJSONName(key.Value)
		if fd == nil {
			fd = fields.ByTextName(key.Value)
		}
		if fd == nil && depth == 0 && key.Value == "status" {
			continue // what 'pipeline get' adds: the cluster's word, not a wish
		}
		if fd == nil {
			d.faults.add(d.doc.at(key), "%s has no field %q; it has %s", what, key.Value, fieldNames(m.Descriptor()))
			continue
		}
		if line, twice := seen[fd.Number()]; twice {
			d.faults.add(d.doc.at(key), "%s: %s is set twice; first in line %d", what, key.Value, line)
			continue
		}
		seen[fd.Number()] = key.Line
		if isNull(val) {
			continue
		}
		if one := fd.ContainingOneof(); one != nil && !one.IsSynthetic() {
			if first, twice := oneofs[one.Name()]; twice {
				d.faults.add(d.doc.at(key), "%s: only one of %s and %s can be set", what, first, key.Value)
				continue
			}
			oneofs[one.Name()] = key.Value
		}
		d.field(val, m, fd, depth)
	}
}

func (d *decoder) field(n *yaml.Node, m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) {
	switch {
	case fd.IsMap():
		if n.Kind != yaml.MappingNode {
			d.faults.add(d.doc.at(n), "%s must hold names and values", fd.JSONName())
			return
		}
		target := m.Mutable(fd).Map()
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := protoreflect.ValueOfString(n.Content[i].Value).MapKey()
			if target.Has(key) {
				d.faults.add(d.doc.at(n.Content[i]), "%s: %q is set twice", fd.JSONName(), n.Content[i].Value)
				continue
			}
			if v, ok := d.scalar(resolve(n.Content[i+1]), fd.MapValue(), fd.JSONName()); ok {
				target.Set(key, v)
			}
		}
	case fd.IsList():
		if n.Kind != yaml.SequenceNode {
			d.faults.add(d.doc.at(n), "%s must be a list", fd.JSONName())
			return
		}
		target := m.Mutable(fd).List()
		for _, item := range n.Content {
			item = resolve(item)
			if fd.Kind() == protoreflect.MessageKind {
				d.message(item, target.AppendMutable().Message(), depth+1)
			} else if v, ok := d.scalar(item, fd, fd.JSONName()); ok {
				target.Append(v)
			}
		}
	case fd.Kind() == protoreflect.MessageKind:
		d.message(n, m.Mutable(fd).Message(), depth+1)
	default:
		if v, ok := d.scalar(n, fd, fd.JSONName()); ok {
			m.Set(fd, v)
		}
	}
}

func (d *decoder) scalar(n *yaml.Node, fd protoreflect.FieldDescriptor, name string) (protoreflect.Value, bool) {
	bad := func(want string) (protoreflect.Value, bool) {
		if n.Kind == yaml.ScalarNode {
			d.faults.add(d.doc.at(n), "%s: %q is not %s", name, n.Value, want)
		} else {
			d.faults.add(d.doc.at(n), "%s must be %s", name, want)
		}
		return protoreflect.Value{}, false
	}
	if n.Kind != yaml.ScalarNode {
		return bad("one value")
	}
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(n.Value), true
	case protoreflect.BoolKind:
		if n.Tag != "!!bool" {
			return bad("true or false")
		}
		return protoreflect.ValueOfBool(strings.EqualFold(n.Value, "true")), true
	case protoreflect.Uint32Kind:
		v, err := strconv.ParseUint(n.Value, 10, 32)
		if err != nil {
			return bad("a whole number from 0 to " + strconv.FormatUint(math.MaxUint32, 10))
		}
		return protoreflect.ValueOfUint32(uint32(v)), true
	case protoreflect.Uint64Kind:
		v, err := strconv.ParseUint(n.Value, 10, 64)
		if err != nil {
			return bad("a whole number")
		}
		return protoreflect.ValueOfUint64(v), true
	case protoreflect.EnumKind:
		return d.enum(n, fd, name)
	default:
		return bad("supported here")
	}
}

// enum takes the full name of a value, its name without the prefix all values
// share, in any case, or its number.
func (d *decoder) enum(n *yaml.Node, fd protoreflect.FieldDescriptor, name string) (protoreflect.Value, bool) {
	values := fd.Enum().Values()
	prefix := strings.TrimSuffix(string(values.ByNumber(0).Name()), "UNSPECIFIED")
	given := strings.ToUpper(strings.ReplaceAll(n.Value, "-", "_"))
	var known []string
	for i := range values.Len() {
		v := values.Get(i)
		short := strings.TrimPrefix(string(v.Name()), prefix)
		if given == short || given == string(v.Name()) || n.Value == strconv.Itoa(int(v.Number())) {
			return protoreflect.ValueOfEnum(v.Number()), true
		}
		if v.Number() != 0 {
			known = append(known, prefix+short)
		}
	}
	d.faults.add(d.doc.at(n), "%s: %q is not one of %s", name, n.Value, strings.Join(known, ", "))
	return protoreflect.Value{}, false
}

func fieldNames(md protoreflect.MessageDescriptor) string {
	names := make([]string, md.Fields().Len())
	for i := range names {
		names[i] = md.Fields().Get(i).JSONName()
	}
	return strings.Join(names, ", ")
}
