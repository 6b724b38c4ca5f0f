package offline

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Table is a table of the state as people see it.
type Table struct {
	Name string
	// Key names the parts of a key.
	Key []string
	// list calls fn for the records whose keys begin with prefix, ascending.
	list func(v *router.View, prefix []string, fn visit) error
}

// Record is one record of a table.
type Record struct {
	Table string
	Key   []string
	Value proto.Message
}

// visit takes a record; an error ends the listing and is returned.
type visit func(key []string, m proto.Message) error

// Tables are the tables of the state, in the order of a dump.
func Tables() []Table {
	return []Table{
		{"pipelines", []string{"pipeline"}, single((*router.View).Pipelines, (*router.View).Pipeline, func(m *commandpb.Pipeline) string { return m.GetSpec().GetId() })},
		{"sidecars", []string{"sidecar"}, single((*router.View).Sidecars, (*router.View).Sidecar, (*commandpb.Sidecar).GetSidecarId)},
		{"services", []string{"service"}, single((*router.View).Services, (*router.View).Service, (*commandpb.Service).GetServiceId)},
		{"groups", []string{"group"}, single((*router.View).Groups, (*router.View).Group, (*commandpb.Group).GetGroupId)},
		{"offsets", []string{"source", "partition"}, bySource(listOffsets)},
		{"watermarks", []string{"source", "partition"}, bySource(listWatermarks)},
		{"group-offsets", []string{"group", "source", "partition"}, listGroupOffsets},
		{"checkpoints", []string{"service"}, single((*router.View).Checkpoints, (*router.View).Checkpoint, (*commandpb.Checkpoint).GetServiceId)},
		{"assignments", []string{"sidecar", "pipeline"}, listAssignments},
		{"operations", []string{"operation"}, listOperations},
	}
}

// FindTable returns the table of a name.
func FindTable(name string) (Table, error) {
	var names []string
	for _, t := range Tables() {
		if t.Name == name {
			return t, nil
		}
		names = append(names, t.Name)
	}
	return Table{}, fmt.Errorf("there is no table %q; the tables are %s", name, strings.Join(names, ", "))
}

// CheckKey refuses a key, or the beginning of one, that cannot be of t.
func (t Table) CheckKey(key []string) error {
	if len(key) > len(t.Key) {
		return fmt.Errorf("a key of %s has %d parts (%s), not %d", t.Name, len(t.Key), strings.Join(t.Key, ", "), len(key))
	}
	if i := slices.Index(t.Key, "partition"); i >= 0 && i < len(key) {
		if _, err := strconv.ParseUint(key[i], 10, 32); err != nil {
			return fmt.Errorf("%q is not a partition", key[i])
		}
	}
	return nil
}

// List calls fn for the records of t whose keys begin with prefix, in the order
// of their keys. An error of fn ends it and is returned.
func (t Table) List(v *router.View, prefix []string, fn func(Record) error) error {
	if err := t.CheckKey(prefix); err != nil {
		return err
	}
	return t.list(v, prefix, func(key []string, m proto.Message) error {
		for i := range prefix {
			if key[i] != prefix[i] {
				return nil
			}
		}
		return fn(Record{Table: t.Name, Key: key, Value: m})
	})
}

// single lists a table of single ids. get returns nil for one that is absent.
func single[M interface {
	proto.Message
	comparable
}](list func(v *router.View, after string, limit int, fn func(M) bool) error, get func(v *router.View, id string) (M, error), id func(M) string) func(*router.View, []string, visit) error {
	return func(v *router.View, prefix []string, fn visit) error {
		if len(prefix) > 0 {
			var none M
			m, err := get(v, prefix[0])
			if err != nil || m == none {
				return err
			}
			return fn(prefix, m)
		}
		var stop error
		err := list(v, "", 0, func(m M) bool {
			stop = fn([]string{id(m)}, m)
			return stop == nil
		})
		return first(stop, err)
	}
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// bySource lists a table whose keys begin with a source.
func bySource(list func(v *router.View, source string, fn visit) error) func(*router.View, []string, visit) error {
	return func(v *router.View, prefix []string, fn visit) error {
		if len(prefix) > 0 {
			return list(v, prefix[0], fn)
		}
		var stop error
		err := v.Sources("", 0, func(source string) bool {
			stop = list(v, source, fn)
			return stop == nil
		})
		return first(stop, err)
	}
}

func listOffsets(v *router.View, source string, fn visit) error {
	var stop error
	err := v.SourceOffsets(source, func(partition uint32, o *commandpb.Offset) bool {
		stop = fn([]string{source, number(partition)}, o)
		return stop == nil
	})
	return first(stop, err)
}

func listWatermarks(v *router.View, source string, fn visit) error {
	var stop error
	err := v.Watermarks(source, func(w *commandpb.Watermark) bool {
		stop = fn([]string{source, number(w.GetPartition())}, w)
		return stop == nil
	})
	return first(stop, err)
}

func listGroupOffsets(v *router.View, prefix []string, fn visit) error {
	var stop error
	add := func(group, source string, partition uint32, o *commandpb.Offset) bool {
		stop = fn([]string{group, source, number(partition)}, o)
		return stop == nil
	}
	var err error
	switch len(prefix) {
	case 0:
		err = v.AllGroupOffsets(add)
	default:
		source := ""
		if len(prefix) > 1 {
			source = prefix[1]
		}
		err = v.GroupOffsets(prefix[0], source, func(source string, p uint32, o *commandpb.Offset) bool {
			return add(prefix[0], source, p, o)
		})
	}
	return first(stop, err)
}

func listAssignments(v *router.View, prefix []string, fn visit) error {
	var stop error
	add := func(a *commandpb.Assignment) bool {
		stop = fn([]string{a.GetSidecarId(), a.GetPipelineId()}, a)
		return stop == nil
	}
	if len(prefix) > 0 {
		return first(v.Assignments(prefix[0], add), stop)
	}
	return first(v.AllAssignments(add), stop)
}

func listOperations(v *router.View, prefix []string, fn visit) error {
	if len(prefix) > 0 {
		o, err := v.Operation(prefix[0])
		if err != nil || o == nil {
			return err
		}
		return fn(prefix, o)
	}
	var stop error
	err := v.Operations(func(o *commandpb.Operation) bool {
		stop = fn([]string{o.GetOperationId()}, o)
		return stop == nil
	})
	return first(stop, err)
}

func number(p uint32) string { return strconv.FormatUint(uint64(p), 10) }
