package e2e

import (
	"fmt"

	"github.com/anishathalye/porcupine"
)

// PipelineOp is a call on one pipeline, a register with compare-and-set.
type PipelineOp struct {
	Pipeline string
	// Tag is written by a put; empty for a read and a delete.
	Tag    string
	Delete bool
	// Expected is the version a put or delete insists on, nil for any.
	Expected *uint64
}

// PipelineOut is what the call answered. A refused put or delete has OK false.
type PipelineOut struct {
	OK bool
	// Absent: a delete found nothing to delete, whatever version it expected.
	Absent  bool
	Version uint64
	Tag     string
}

type pipelineState struct {
	version uint64 // 0 = absent
	tag     string
}

// PipelineModel is the sequential specification of pipelines: a put sets the
// tag and moves the version on by one, from 0 when the pipeline was absent.
func PipelineModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{pipelineState{}} },
		Step: func(state, input, output any) []any {
			s, in := state.(pipelineState), input.(PipelineOp)
			fits := in.Expected == nil || *in.Expected == s.version
			next := s
			switch {
			case in.Delete:
				next = pipelineState{}
			case in.Tag != "":
				next = pipelineState{version: s.version + 1, tag: in.Tag}
			}
			if output == nil { // unknown: done now, or not (yet)
				if fits && next != s {
					return []any{s, next}
				}
				return []any{s}
			}
			out := output.(PipelineOut)
			if in.Tag == "" && !in.Delete { // read
				if out.Version == s.version && out.Tag == s.tag {
					return []any{s}
				}
				return nil
			}
			if in.Delete && (out.Absent || s.version == 0) {
				if out.OK && out.Absent && s.version == 0 {
					return []any{s}
				}
				return nil
			}
			if !out.OK {
				if fits {
					return nil // refused although nothing stood against it
				}
				return []any{s}
			}
			if !fits || (!in.Delete && out.Version != next.version) {
				return nil
			}
			return []any{next}
		},
		Equal: func(a, b any) bool { return a == b },
		DescribeOperation: func(input, output any) string {
			return fmt.Sprintf("%+v -> %+v", input, output)
		},
		Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
			return partition(h, func(in any) string { return in.(PipelineOp).Pipeline })
		},
	}
	return m.ToModel()
}

// OffsetOp is a call on one partition's offset: a monotonic register.
type OffsetOp struct {
	Key    string
	Commit bool
	Offset uint64
}

// OffsetOut is what the call answered: the stored offset, and for a commit
// whether it was accepted.
type OffsetOut struct {
	OK      bool
	Current uint64
}

// OffsetModel is the sequential specification of offsets: a commit below the
// stored offset is refused and changes nothing; none moves it backwards.
func OffsetModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{uint64(0)} },
		Step: func(state, input, output any) []any {
			s, in := state.(uint64), input.(OffsetOp)
			if !in.Commit {
				if output == nil || output.(OffsetOut).Current == s {
					return []any{s}
				}
				return nil
			}
			if output == nil {
				if in.Offset > s {
					return []any{s, in.Offset}
				}
				return []any{s}
			}
			out := output.(OffsetOut)
			if out.OK != (in.Offset >= s) {
				return nil
			}
			if out.OK {
				s = in.Offset
			}
			if out.Current != s {
				return nil
			}
			return []any{s}
		},
		Equal: func(a, b any) bool { return a == b },
		DescribeOperation: func(input, output any) string {
			return fmt.Sprintf("%+v -> %+v", input, output)
		},
		Partition: func(h []porcupine.Operation) [][]porcupine.Operation {
			return partition(h, func(in any) string { return in.(OffsetOp).Key })
		},
	}
	return m.ToModel()
}

func partition(h []porcupine.Operation, key func(any) string) [][]porcupine.Operation {
	index := map[string]int{}
	var parts [][]porcupine.Operation
	for _, op := range h {
		k := key(op.Input)
		i, ok := index[k]
		if !ok {
			i = len(parts)
			index[k] = i
			parts = append(parts, nil)
		}
		parts[i] = append(parts[i], op)
	}
	return parts
}
