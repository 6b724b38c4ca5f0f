package e2e

import (
	"fmt"
	"math"
	"time"

	"github.com/anishathalye/porcupine"

	"conveyor.etl/router/rpc/routerpb/backuppb"
)

// Backups returns the backup stub of the node.
func (n *Node) Backups() backuppb.BackupServiceClient {
	return backuppb.NewBackupServiceClient(n.Conn())
}

// RecordAll records that call, which concerns every key alike, was made.
// ops returns its form for each of the keys.
func (h *History) RecordAll(client int, ops []any, call func() Known) Known {
	begin := time.Since(h.start).Nanoseconds()
	known := call()
	end := time.Since(h.start).Nanoseconds()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.count[known]++
	if known == NotDone || known == Refused {
		return known
	}
	for _, op := range ops {
		o := porcupine.Operation{ClientId: client, Input: op, Call: begin, Output: true, Return: end}
		if known == Unknown {
			o.Output, o.Return = nil, math.MaxInt64
		}
		h.ops = append(h.ops, o)
	}
	return known
}

// Everywhere records one call in both histories: a backup of the whole state, or
// a restore of it.
func (l *Load) Everywhere(keys int, restore bool, call func() Known) Known {
	var pipelines, offsets []any
	for k := range keys {
		pipelines = append(pipelines, PipelineOp{Pipeline: l.pipeline(k), Save: !restore, Restore: restore})
		offsets = append(offsets, OffsetOp{Key: fmt.Sprintf("%s/%d", l.source(), k), Save: !restore, Restore: restore})
	}
	var known Known
	l.Pipelines.RecordAll(2000, pipelines, func() Known {
		// The inner call ends first: its interval lies within that of the outer.
		known = l.Offsets.RecordAll(2000, offsets, call)
		return known
	})
	return known
}
