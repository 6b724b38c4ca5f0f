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
	// Expected is the version a put or delete insists on, in a restore epoch; nil
	// for any.
	Expected *uint64
	Epoch    uint64
	// Save remembers the register in a backup, Restore puts back what is
	// remembered.
	Save, Restore bool
}

// PipelineOut is what the call answered. A refused put or delete has OK false.
type PipelineOut struct {
	OK bool
	// Absent: a delete found nothing to delete, whatever version it expected.
	Absent  bool
	Version uint64
	Epoch   uint64 // of a read and a put
	Tag     string
}

type pipelineState struct {
	version uint64 // 0 = absent
	epoch   uint64 // restores so far
	tag     string
	saved   pipelineCopy
}

type pipelineCopy struct {
	version uint64
	tag     string
}

// PipelineModel is the sequential specification of pipelines: a put sets the
// tag and moves the version on by one, from 0 when the pipeline was absent.
func PipelineModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{pipelineState{}} },
		Step: func(state, input, output any) []any {
			s, in := state.(pipelineState), input.(PipelineOp)
			if in.Save || in.Restore {
				next := s
				if in.Save {
					next.saved = pipelineCopy{s.version, s.tag}
				} else {
					next.version, next.tag = s.saved.version, s.saved.tag
					next.epoch++
				}
				if output == nil {
					return []any{s, next}
				}
				return []any{next}
			}
			strange := in.Expected != nil && in.Epoch != s.epoch
			fits := !strange && (in.Expected == nil || *in.Expected == s.version)
			next := s
			switch {
			case in.Delete:
				next.version, next.tag = 0, ""
			case in.Tag != "":
				next.version, next.tag = s.version+1, in.Tag
			}
			if output == nil { // unknown: done now, or not (yet)
				if fits && next != s {
					return []any{s, next}
				}
				return []any{s}
			}
			out := output.(PipelineOut)
			if in.Tag == "" && !in.Delete { // read
				if out.Version == s.version && out.Tag == s.tag && out.Epoch == s.epoch {
					return []any{s}
				}
				return nil
			}
			if strange {
				if out.OK {
					return nil // it was read in another epoch
				}
				return []any{s}
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
			if !fits || (!in.Delete && (out.Version != next.version || out.Epoch != s.epoch)) {
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
	// Save and Restore are those of PipelineOp.
	Save, Restore bool
}

// OffsetOut is what the call answered: the stored offset, and for a commit
// whether it was accepted.
type OffsetOut struct {
	OK      bool
	Current uint64
}

type offsetState struct{ offset, saved uint64 }

// OffsetModel is the sequential specification of offsets: a commit below the
// stored offset is refused and changes nothing; none but a restore moves it
// backwards.
func OffsetModel() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{offsetState{}} },
		Step: func(state, input, output any) []any {
			s, in := state.(offsetState), input.(OffsetOp)
			next := s
			switch {
			case in.Save:
				next.saved = s.offset
			case in.Restore:
				next.offset = s.saved
			case in.Commit:
				next.offset = max(s.offset, in.Offset)
			}
			switch {
			case output == nil: // unknown, or a read without an answer
				if next == s {
					return []any{s}
				}
				return []any{s, next}
			case in.Save || in.Restore:
				return []any{next}
			}
			out := output.(OffsetOut)
			if in.Commit && out.OK != (in.Offset >= s.offset) || out.Current != next.offset {
				return nil
			}
			return []any{next}
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
