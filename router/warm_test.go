package router

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// Goal: what is read in one go is what one read at a time finds, whatever the run and
// earlier ones have written, deleted, written blindly and taken back; and sums are taken
// of what Pebble holds.
func TestWarm(t *testing.T) {
	r := randomness(t)
	s := openMem(t)
	tables := []byte{prefixRevokedCount, prefixAssignment, prefixHandover, prefixSidecar}
	some := func() []byte {
		return key(nil).pair(tables[r.Intn(len(tables))], fmt.Sprintf("x%02d", r.Intn(30)), fmt.Sprintf("y%02d", r.Intn(30)))
	}
	value := func() []byte { return bytes.Repeat([]byte{byte(r.Intn(256))}, r.Intn(40_000)/(1+r.Intn(2000))) }
	stored := map[string][]byte{}
	for round := range 6 {
		b := s.cur.db.NewBatch()
		for range 400 {
			k := some()
			if r.Intn(3) == 0 {
				noError(t, b.Delete(k, nil))
				delete(stored, string(k))
				continue
			}
			v := value()
			noError(t, b.Set(k, v, nil))
			stored[string(k)] = v
		}
		noError(t, b.Commit(pebble.NoSync))
		if round%2 == 0 {
			noError(t, s.cur.flush())
		}
	}
	tx := s.newTx(s.cur)
	tx.begin(0, true)
	for range 20 { // what is taken back is as if it had not been
		tx.put(tx.blind(some()), []byte("blind"), nil)
		tx.put(tx.cell(some()), []byte("read"), nil)
	}
	tx.rollback()
	want := map[string][]byte{}
	for k, v := range stored {
		want[k] = v
	}
	for range 40 {
		k, v := some(), value()
		switch r.Intn(3) {
		case 0:
			tx.drop(tx.cell(k))
			delete(want, string(k))
		case 1:
			tx.put(tx.blind(k), v, nil)
			want[string(k)] = v
		default:
			tx.put(tx.cell(k), v, nil)
			want[string(k)] = v
		}
	}
	var l keyList
	var keys [][]byte
	for range 1500 { // out of order, some absent, some twice
		k := some()
		keys = append(keys, k)
		l.add(k)
	}
	tx.warm(&l)
	noError(t, tx.err)
	for _, k := range keys {
		c := tx.s.overlay[string(k)]
		if c == nil {
			t.Fatalf("%q was not read", k)
		}
		c = tx.cell(k)
		if w, there := want[string(k)]; (c.val != nil) != there || !bytes.Equal(c.val, w) {
			t.Fatalf("%q: %d bytes, want %d, there %v", k, len(c.val), len(w), there)
		}
		if c.dirty || c.summed {
			continue
		}
		tx.put(c, []byte("new"), nil)
		want[string(k)] = []byte("new")
		if was := recordHash(xxhash.Sum64(k), stored[string(k)]); c.sum != was {
			t.Fatalf("%q counts %x in its sum, want %x", k, c.sum, was)
		}
	}
}

// Goal: what is picked from the record of a sidecar is what it says, and damage is told.
func TestStanding(t *testing.T) {
	r := randomness(t)
	g := &commands{r: r, time: 1_000_000}
	for range 200 {
		sc := g.sidecar()
		sc.State = commandpb.SidecarState(r.Intn(4))
		sc.Generation, sc.CreateRevision = uint64(r.Int63n(3))*r.Uint64(), uint64(r.Int63n(1000))
		sc.ModRevision, sc.Draining, sc.ExpiredAtMs = r.Uint64(), r.Intn(2) == 0, r.Uint64()
		sc.GraceUntilMs = uint64(r.Int63n(2)) * r.Uint64()
		b, err := encode(sc)
		noError(t, err)
		got, err := decodeStanding(b)
		noError(t, err)
		if want := (standing{sc.State, sc.Generation, sc.CreateRevision, sc.GraceUntilMs}); got != want {
			t.Fatalf("%+v, want %+v of %s", got, want, text(sc))
		}
		cut := b[:r.Intn(len(b))]
		if _, err := decodeStanding(cut); (err == nil) != (proto.Unmarshal(cut, &commandpb.Sidecar{}) == nil) {
			t.Fatalf("%v of the first %d bytes of %s", err, len(cut), text(sc))
		}
	}
	fields := (&commandpb.Sidecar{}).ProtoReflect().Descriptor().Fields()
	for name, number := range map[string]int{
		"state": sidecarStateField, "generation": sidecarGenerationField,
		"create_revision": sidecarCreatedField, "grace_until_ms": sidecarGraceField,
	} {
		if f := fields.ByNumber(protowire.Number(number)); f == nil || string(f.Name()) != name {
			t.Errorf("field %d is not %s", number, name)
		}
	}
}

// Goal: the deletion of a pipeline that many run revokes it everywhere, and waits for
// those who run an entry stage of it and live, in the order that one reads of one after
// the other would give.
func TestDeleteWide(t *testing.T) {
	s := openMem(t)
	const n = 200
	id := func(i int) string { return fmt.Sprintf("pod-%03d", i) }
	do(t, s, `put_pipeline { spec { id: "wide" enabled: true
		stages { id: "in" type: STAGE_TYPE_SOURCE parallelism: 1000 } stages { id: "out" type: STAGE_TYPE_SINK parallelism: 1000 }
		edges { from_stage: "in" to_stage: "out" } } }`)
	a := &commandpb.ApplyAssignments{}
	for i := range n {
		do(t, s, fmt.Sprintf(`register_sidecar { sidecar { sidecar_id: %q endpoint: "a:1" } }`, id(i)))
		c := &commandpb.AssignmentChange{SidecarId: id(i), PipelineId: "wide", SidecarGeneration: 1, PipelineVersion: 1}
		in, out := &commandpb.StageAssignment{StageId: "in"}, &commandpb.StageAssignment{StageId: "out"}
		switch i % 4 {
		case 1: // runs no entry stage
			c.Stages = []*commandpb.StageAssignment{out}
		case 2: // sends to one that does
			in.RemoteSidecarId = id(0)
			c.Stages = []*commandpb.StageAssignment{in, out}
		default:
			c.Stages = []*commandpb.StageAssignment{in, out}
		}
		a.Changes = append(a.Changes, c)
	}
	if res := apply(t, s, &commandpb.Command{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: a}})[0]; res.Rejection != nil || res.Stale > 0 {
		t.Fatal(text(res))
	}
	for i := 3; i < n; i += 4 {
		do(t, s, fmt.Sprintf(`transition_sidecar { sidecar_id: %q state: SIDECAR_STATE_EXPIRED }`, id(i)))
	}
	from := s.Revision()
	sub, err := s.Hub().Subscribe(from, TableAssignments, TableHandovers)
	noError(t, err)
	defer sub.Close()
	res := do(t, s, `time_ms: 5000 delete_pipeline { pipeline_id: "wide" release_timeout_ms: 1000 }`)
	if !res.Existed || res.Rejection != nil {
		t.Fatal(text(res))
	}
	changes, _, err := sub.Next(t.Context())
	noError(t, err)
	k := 0
	next := func() Change {
		if k == len(changes) {
			t.Fatalf("only %d changes", k)
		}
		k++
		return changes[k-1]
	}
	for i := range n {
		c := next()
		now, _ := c.Next.(*commandpb.Assignment)
		was, _ := c.Prev.(*commandpb.Assignment)
		if now.GetSidecarId() != id(i) || !now.Revoked || len(now.Stages) > 0 || was.GetRevoked() || len(was.GetStages()) == 0 {
			t.Fatalf("change %d is %s after %s", k, text(now), text(was))
		}
		if i%4 != 0 {
			continue
		}
		h, _ := next().Next.(*commandpb.Handover)
		if h.GetSidecarId() != id(i) || len(h.Releases) != 1 || h.Releases[0].StageId != "in" || h.Releases[0].DeadlineMs != 6000 || h.Releases[0].Shared {
			t.Fatalf("change %d is %s", k, text(h))
		}
	}
	if k != len(changes) {
		t.Fatalf("%d changes, want %d", len(changes), k)
	}
	checkCounts(t, s)
	sound(t, s)
}

// Goal: what is listed of some sidecars is what filtering all gives.
func TestSidecarHandovers(t *testing.T) {
	r := randomness(t)
	s := openMem(t)
	ids := []string{"a", "a\x00b", "b", "b\xff", "c", "cc", "d", "e"}
	b := s.cur.db.NewBatch()
	for _, p := range ids {
		for _, sc := range ids {
			if r.Intn(3) == 0 {
				continue
			}
			v, err := encode(&commandpb.Handover{PipelineId: p, SidecarId: sc})
			noError(t, err)
			noError(t, b.Set(key(nil).pair(prefixHandover, p, sc), v, nil))
		}
	}
	noError(t, b.Commit(pebble.NoSync))
	v := s.View()
	defer v.Close()
	for _, first := range append(ids, "", "bb", "z") {
		for _, last := range append(ids, "", "bb", "z") {
			var want, got []string
			noError(t, v.Handovers(func(h *commandpb.Handover) bool {
				if h.SidecarId >= first && h.SidecarId <= last {
					want = append(want, HandoverKey(h.PipelineId, h.SidecarId))
				}
				return true
			}))
			noError(t, v.SidecarHandovers(first, last, func(h *commandpb.Handover) bool {
				got = append(got, HandoverKey(h.PipelineId, h.SidecarId))
				return true
			}))
			if !slices.Equal(got, want) {
				t.Fatalf("from %q to %q: %q, want %q", first, last, got, want)
			}
			if len(want) > 1 {
				n := 0
				noError(t, v.SidecarHandovers(first, last, func(*commandpb.Handover) bool { n++; return false }))
				if n != 1 {
					t.Fatalf("%d were handed out after false", n)
				}
			}
		}
	}
}

// Goal: a scan sees what the run has changed so far, however it is interleaved with
// writes, removals and rollbacks.
func TestScanOfARun(t *testing.T) {
	r := randomness(t)
	s := openMem(t)
	some := func() []byte {
		return key(nil).pair([]byte{prefixAssignment, prefixHandover}[r.Intn(2)], fmt.Sprint("x", r.Intn(4)), fmt.Sprint("y", r.Intn(60)))
	}
	want := map[string]string{}
	b := s.cur.db.NewBatch()
	for range 60 {
		k := some()
		noError(t, b.Set(k, []byte("stored"), nil))
		want[string(k)] = "stored"
	}
	noError(t, b.Commit(pebble.NoSync))
	tx := s.newTx(s.cur)
	tx.begin(0, true)
	kept := maps.Clone(want)
	for range 600 {
		switch r.Intn(12) {
		case 0:
			tx.rollback()
			want = maps.Clone(kept)
		case 1:
			tx.savepoint()
			kept = maps.Clone(want)
		case 2, 3:
			prefix := some()[:1+r.Intn(5)]
			var got, all []string
			tx.scan(prefix, func(k, v []byte) { got = append(got, string(k)+"="+string(v)) })
			for k, v := range want {
				if strings.HasPrefix(k, string(prefix)) {
					all = append(all, k+"="+v)
				}
			}
			slices.SortFunc(all, func(a, b string) int {
				return strings.Compare(a[:strings.IndexByte(a, '=')], b[:strings.IndexByte(b, '=')])
			})
			if !slices.Equal(got, all) {
				t.Fatalf("%q holds %q\nwant %q", prefix, got, all)
			}
		default:
			for range 1 + r.Intn(30)/(1+r.Intn(30)) {
				if k := some(); r.Intn(3) == 0 {
					tx.remove(k)
					delete(want, string(k))
				} else {
					v := fmt.Sprint(r.Intn(1000))
					tx.put(tx.cell(k), []byte(v), nil)
					want[string(k)] = v
				}
			}
		}
	}
	noError(t, tx.err)
}
