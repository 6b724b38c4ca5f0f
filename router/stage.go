package router

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// A restore is staged through the log: the records of a backup come in chunks,
// which every replica keeps beside its state, in the same database, so that they
// are as durable as the position. Nobody sees them until the swap.

// The bounds of what is staged. Part of the state machine, so no options.
const (
	// maxChunkBytes bounds a chunk as it is sent. A command of that size still
	// fits into an entry.
	maxChunkBytes = 4 << 20
	maxChunks     = 1 << 20
	maxStageBytes = 64 << 30
	maxReady      = 1000
	// maxForeignRevision leaves room for all the revisions to come.
	maxForeignRevision = 1 << 56
)

// stageRecord returns the restore that is being staged, nil when there is none.
func (t *tx) stageRecord() *commandpb.RestoreStage {
	s := &commandpb.RestoreStage{}
	if !t.load(t.buf.meta(metaStage), s) {
		return nil
	}
	return s
}

func (t *tx) saveStage(s *commandpb.RestoreStage) {
	s.UpdatedAtMs = t.now
	t.store(t.buf.meta(metaStage), s)
	t.changed, t.staged = true, true
}

// stageOf returns the stage of an operation or says why there is none.
func (t *tx) stageOf(operation string) (*commandpb.RestoreStage, *commandpb.Rejection) {
	if r := checkID("operation id", operation); r != nil {
		return nil, r
	}
	s := t.stageRecord()
	switch {
	case t.err != nil:
		return nil, nil
	case s == nil:
		return nil, reject(commandpb.Code_CODE_NOT_FOUND, "restore "+operation, "no restore is being staged; it was never begun, abandoned or swapped in")
	case s.OperationId != operation:
		return nil, reject(commandpb.Code_CODE_NOT_FOUND, "restore "+operation, "it is not being staged, restore %q is", s.OperationId)
	}
	return s, nil
}

// beginRestore opens the stage. The same again changes nothing.
//
// Rejections: INVALID (ids, source), LIMIT (source), PRECONDITION (another
// restore is being staged), EXISTS (this one, of another source).
func (t *tx) beginRestore(c *commandpb.BeginRestore) *commandpb.Rejection {
	if r := first(checkID("operation id", c.OperationId), checkText("snapshot id", c.SnapshotId)); r != nil {
		return r
	}
	subject := "restore " + c.OperationId
	if r := checkSource(subject, c.Source); r != nil {
		return r
	}
	if s := t.stageRecord(); s != nil {
		if s.OperationId != c.OperationId {
			return reject(commandpb.Code_CODE_PRECONDITION, subject,
				"restore %q of snapshot %q is under way; one restore is done at a time: wait for it or cancel it", s.OperationId, s.SnapshotId)
		}
		if !bytes.Equal(encodeSource(s.Source), encodeSource(c.Source)) {
			return reject(commandpb.Code_CODE_EXISTS, subject, "it is being staged from another snapshot already, %q", s.SnapshotId)
		}
		t.res.Existed = true
		return nil
	}
	t.saveStage(&commandpb.RestoreStage{
		OperationId: c.OperationId, SnapshotId: c.SnapshotId, Owner: c.Owner, Source: c.Source,
		Phase: commandpb.StagePhase_STAGE_PHASE_STAGING, BegunAtMs: t.now,
	})
	return nil
}

// checkSource refuses what could not become this state's clock.
func checkSource(subject string, s *commandpb.RestoreSource) *commandpb.Rejection {
	c := s.GetClock()
	switch {
	case c == nil:
		return invalid(subject, "the command does not say what is restored")
	case len(s.ContentHash) != sha256.Size:
		return invalid(subject, "the content hash is %d bytes long, not %d", len(s.ContentHash), sha256.Size)
	case c.TimeMs > maxTimeMS:
		return invalid(subject, "the time of the backup, %d ms, is impossible", c.TimeMs)
	case c.Revision > maxForeignRevision:
		return limit(subject, "the revision of the backup is %d, at most %d can be restored", c.Revision, uint64(maxForeignRevision))
	case len(c.Counts) > int(countKinds) || len(c.Sums) > int(sumKinds):
		return invalid(subject, "a newer release made the backup: it counts tables this one does not know")
	case c.RequestHead > c.RequestTail || c.RevokedHead > c.RevokedTail:
		return invalid(subject, "the queues of the backup end before they begin")
	}
	return checkText("cluster name", s.ClusterName)
}

func encodeSource(s *commandpb.RestoreSource) []byte {
	b, _ := s.MarshalVT() // numbers and checked texts: cannot fail
	return b
}

// stageRestore keeps a chunk. A repeat of one that is kept changes nothing.
//
// Rejections: INVALID (id, data), LIMIT (size of the chunk, of all chunks),
// NOT_FOUND (no such stage), PRECONDITION (sealed), CONFLICT (not the next one;
// current is).
func (t *tx) stageRestore(c *commandpb.StageRestore) *commandpb.Rejection {
	s, r := t.stageOf(c.OperationId)
	if r != nil || s == nil {
		return r
	}
	subject := "restore " + c.OperationId
	switch {
	case c.Sequence < s.Chunks:
		t.res.Existed = true
		return nil
	case s.Phase != commandpb.StagePhase_STAGE_PHASE_STAGING:
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it is sealed and takes no more chunks")
	case c.Sequence > s.Chunks:
		return conflict(subject, s.Chunks, "chunk %d came, the next one is %d", c.Sequence, s.Chunks)
	case len(c.Data) == 0 || c.Records == 0:
		return invalid(subject, "chunk %d is empty", c.Sequence)
	case len(c.Data) > maxChunkBytes:
		return limit(subject, "chunk %d is %d bytes long, at most %d are allowed", c.Sequence, len(c.Data), maxChunkBytes)
	case s.Chunks >= maxChunks || s.Bytes+uint64(len(c.Data)) > maxStageBytes || s.Records+c.Records < s.Records:
		return limit(subject, "it would be more than %d chunks or %d bytes", maxChunks, uint64(maxStageBytes))
	}
	t.put(t.blind(t.buf.sequence(prefixStage, c.Sequence)), c.Data, nil)
	s.Chunks++
	s.Bytes += uint64(len(c.Data))
	s.Records += c.Records
	t.saveStage(s)
	return nil
}

// sealRestore ends staging. A repeat changes nothing.
//
// Rejections: INVALID (id), NOT_FOUND (no such stage), CONFLICT (chunks or
// records are missing; current is the number of chunks).
func (t *tx) sealRestore(c *commandpb.SealRestore) *commandpb.Rejection {
	s, r := t.stageOf(c.OperationId)
	if r != nil || s == nil {
		return r
	}
	if c.Chunks != s.Chunks || c.Records != s.Records {
		return conflict("restore "+c.OperationId, s.Chunks, "%d chunks with %d records were to be sealed, there are %d with %d", c.Chunks, c.Records, s.Chunks, s.Records)
	}
	if s.Phase == commandpb.StagePhase_STAGE_PHASE_SEALED {
		t.res.Existed = true
		return nil
	}
	s.Phase = commandpb.StagePhase_STAGE_PHASE_SEALED
	t.saveStage(s)
	return nil
}

// reportRestore records that a node has prepared the new state. A failure takes
// back an earlier report and becomes the message of the operation.
//
// Rejections: INVALID (id, node, text), LIMIT, NOT_FOUND (no such stage),
// PRECONDITION (not sealed).
func (t *tx) reportRestore(c *commandpb.ReportRestore) *commandpb.Rejection {
	s, r := t.stageOf(c.OperationId)
	if r != nil || s == nil {
		return r
	}
	subject := "restore " + c.OperationId
	if c.NodeId == 0 {
		return invalid(subject, "the report names no node")
	}
	if r := checkText("error", c.Error); r != nil {
		return r
	}
	if s.Phase != commandpb.StagePhase_STAGE_PHASE_SEALED {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it is not sealed yet, so node %d cannot have prepared it", c.NodeId)
	}
	i, known := slices.BinarySearch(s.Ready, c.NodeId)
	t.res.Existed = known
	switch {
	case c.Error == "" && !known:
		if len(s.Ready) >= maxReady {
			return limit(subject, "%d nodes have reported already", len(s.Ready))
		}
		s.Ready = slices.Insert(s.Ready, i, c.NodeId)
		t.saveStage(s)
	case c.Error != "" && known:
		s.Ready = slices.Delete(s.Ready, i, i+1)
		t.saveStage(s)
	}
	if c.Error == "" {
		return nil
	}
	prev := t.operation(c.OperationId)
	if prev == nil || prev.State != commandpb.OperationState_OPERATION_STATE_RUNNING {
		return nil
	}
	next := proto.Clone(prev).(*commandpb.Operation)
	next.Message = cutText(fmt.Sprintf("node %d cannot prepare the new state: %s", c.NodeId, c.Error))
	if next.Message == prev.Message {
		return nil
	}
	return t.saveOperation(prev, next)
}

// cutText shortens a text to what may be stored, between two characters.
func cutText(s string) string {
	if len(s) <= maxTextBytes {
		return s
	}
	n := maxTextBytes
	for n > 0 && s[n]&0xc0 == 0x80 {
		n--
	}
	return s[:n]
}

// swapRestore puts the staged state in the place of the live one, at the end of
// its entry: the other commands of the entry were under way together with it, so
// that the order in which all of them come before it is as good as theirs. A
// repeat changes nothing.
//
// Rejections: INVALID (id), NOT_FOUND (no such stage), PRECONDITION (not sealed,
// or no node could prepare it).
func (t *tx) swapRestore(c *commandpb.SwapRestore) *commandpb.Rejection {
	if t.swap != nil && t.swap.OperationId == c.OperationId {
		t.res.Existed, t.swapped = true, true
		return nil
	}
	if last := (&commandpb.RestoreStage{}); t.load(t.buf.meta(metaRestored), last) && last.OperationId == c.OperationId {
		t.res.Existed = true
		return nil
	}
	s, r := t.stageOf(c.OperationId)
	if r != nil || s == nil {
		return r
	}
	subject := "restore " + c.OperationId
	if s.Phase != commandpb.StagePhase_STAGE_PHASE_SEALED {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "it is not sealed yet")
	}
	// What one node could prepare every node can: it is made of the same bytes.
	// Without any, a fault in them would stop all nodes at this entry.
	if len(s.Ready) == 0 {
		return reject(commandpb.Code_CODE_PRECONDITION, subject, "no node has prepared the new state yet")
	}
	t.store(t.buf.meta(metaSwap), s)
	t.swap, t.swapped, t.changed = s, true, true
	return nil
}

// abandonRestore removes what was staged. If nothing is, nothing changes and
// existed stays unset.
//
// Rejections: INVALID (id, text), PRECONDITION (the swap is in the same entry).
func (t *tx) abandonRestore(c *commandpb.AbandonRestore) *commandpb.Rejection {
	if r := first(checkID("operation id", c.OperationId), checkText("reason", c.Reason)); r != nil {
		return r
	}
	s := t.stageRecord()
	if s == nil || s.OperationId != c.OperationId {
		return nil
	}
	if t.swap != nil {
		return reject(commandpb.Code_CODE_PRECONDITION, "restore "+c.OperationId, "the state is being replaced, which cannot be undone by abandoning it; restore the undo point")
	}
	t.remove(t.buf.meta(metaStage))
	for _, c := range t.dirty {
		if c.dirty && c.key[0] == prefixStage {
			t.drop(c)
		}
	}
	// From here on nothing refuses the command: the mark is not rolled back.
	t.wipeStage, t.staged = true, true
	t.res.Existed, t.changed = true, true
	return nil
}

// wipe removes all chunks from a batch's database. It comes first in its batch,
// so that chunks staged after it stay.
func wipe(b *pebble.Batch) error {
	from := key(nil).table(prefixStage)
	return b.DeleteRange(from, prefixEnd(from), nil)
}

// Stage returns the restore that is being staged, nil when there is none.
func (v *View) Stage() (*commandpb.RestoreStage, error) {
	return getRecord[commandpb.RestoreStage](v, key(nil).meta(metaStage))
}

// LastRestore returns the stage that was swapped in last, nil when there was
// none since this state was made.
func (v *View) LastRestore() (*commandpb.RestoreStage, error) {
	return getRecord[commandpb.RestoreStage](v, key(nil).meta(metaRestored))
}
