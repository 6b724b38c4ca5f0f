package router

import (
	"bytes"
	"errors"
	"fmt"
	randv2 "math/rand/v2"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

// TestSameLogSameState applies one log in many ways that must not matter:
// batch sizes, replicas that answer callers and replicas that do not, crashes
// with replay, and a round trip through an image. Every way has to end in the
// same state, and every result has to be the same.
func TestSameLogSameState(t *testing.T) {
	r := randomness(t)
	g := &commands{r: r, time: 1_000_000}
	log := g.log(t, 2, 1200)
	backups := vfs.NewMem()
	backup := withBackup(t, backups, &commands{r: r, time: 1_000_000}, 1300)
	g.restoring(t, log, stageCommands(t, backups, "image", "real"), "real")

	ref := openMem(t)
	want := results(t, ref, log, 1)
	refDump, refHash := dump(t, ref), hash(t, ref)
	if ref.Epoch() != 1 {
		t.Fatalf("epoch %d: the restore was not carried out", ref.Epoch())
	}
	refSums := ref.RecentSums()
	if n := len(refSums); n < 9 {
		t.Fatalf("sums of %d indexes only", n)
	}
	if u, ok := ref.UndoPoint(); !ok || contentHash(t, ref) == backup {
		t.Fatalf("undo point %+v, %v, or nothing was applied after the restore", u, ok)
	}

	check := func(t *testing.T, s *FSM) {
		t.Helper()
		if got := dump(t, s); got != refDump {
			t.Fatalf("state differs:\n%s\nwant:\n%s", got, refDump)
		}
		if hash(t, s) != refHash {
			t.Fatal("hash differs although the records are the same")
		}
		checkCounts(t, s)
		sound(t, s)
		sums := s.RecentSums()
		if got, want := sums[len(sums)-1], refSums[len(refSums)-1]; len(got.Differ(want)) > 0 {
			t.Fatalf("at the end: %v differ", got.Differ(want))
		}
		for _, a := range sums {
			for _, b := range refSums {
				if a.Index == b.Index && a.Epoch == b.Epoch && len(a.Differ(b)) > 0 {
					t.Fatalf("at %d: %v differ", a.Index, a.Differ(b))
				}
			}
		}
	}
	for _, size := range []int{2, 7, 100, len(log)} {
		t.Run(fmt.Sprint("batches of ", size), func(t *testing.T) {
			s := openMem(t)
			got := results(t, s, log, size)
			for i := range want {
				if !proto.Equal(got[i], want[i]) {
					t.Fatalf("result %d: %s\nwant: %s", i, text(got[i]), text(want[i]))
				}
			}
			check(t, s)
			if n := len(s.RecentSums()); n != len(refSums) {
				t.Fatalf("sums of %d indexes, want %d", n, len(refSums))
			}
		})
	}
	t.Run("nobody waits", func(t *testing.T) {
		s := openMem(t)
		for i := 0; i < len(log); i += 10 {
			res, err := s.Apply(log[i : i+10])
			noError(t, err)
			for _, r := range res {
				if r != nil {
					t.Fatal("results for an entry nobody waits for")
				}
			}
		}
		check(t, s)
	})
	t.Run("crashes", func(t *testing.T) {
		fs := vfs.NewCrashableMem()
		s := open(t, fs, "state")
		for crashes := 0; s.Applied().Index < log[len(log)-1].Index; {
			at := int(s.Applied().Index - 1)
			n := min(1+r.Intn(60), len(log)-at)
			_, err := s.Apply(log[at : at+n])
			noError(t, err)
			switch r.Intn(4) {
			case 0:
				i, err := s.Flush()
				noError(t, err)
				if i != s.Applied().Index || s.Durable() != i {
					t.Fatalf("flushed up to %d, durable %d, applied %d", i, s.Durable(), s.Applied().Index)
				}
			case 1:
				if crashes++; crashes > 25 {
					continue
				}
				durable := s.Durable()
				crashed := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: r.Intn(101), RNG: randv2.New(randv2.NewPCG(r.Uint64(), 0))})
				noError(t, s.Close())
				fs = crashed
				s = open(t, fs, "state")
				if got := s.Applied().Index; got < durable {
					t.Fatalf("%d was durable, after the crash the state is at %d", durable, got)
				}
			}
		}
		check(t, s)
		noError(t, s.Close())
	})
	t.Run("image half way", func(t *testing.T) {
		fs := vfs.NewMem()
		s := open(t, fs, "state")
		half := len(log) / 2
		_, err := s.Apply(log[:half])
		noError(t, err)
		pos, err := s.Image("image")
		noError(t, err)
		if pos.Index != log[half-1].Index {
			t.Fatalf("image is at %d, want %d", pos.Index, log[half-1].Index)
		}
		other := open(t, fs, "other")
		got, err := other.Install("image")
		noError(t, err)
		if got.Index != pos.Index || !bytes.Equal(got.ConfState, start.ConfState) || !bytes.Equal(got.Members, start.Members) {
			t.Fatalf("installed %+v, the image is %+v", got, pos)
		}
		if hash(t, other) != hash(t, s) {
			t.Fatal("the installed state has another hash")
		}
		v := other.View()
		if stage, err := v.Stage(); err != nil || stage.GetChunks() == 0 {
			t.Fatalf("the image is not of the middle of a stage: %v, %v", stage, err)
		}
		noError(t, v.Close())
		_, err = other.Apply(log[half:])
		noError(t, err)
		check(t, other)
		noError(t, errors.Join(s.Close(), other.Close()))
	})
}

// results applies log in batches and returns all results in order.
func results(t *testing.T, s *FSM, log []Entry, size int) []*commandpb.Result {
	var out []*commandpb.Result
	for i := 0; i < len(log); i += size {
		part := append([]Entry(nil), log[i:min(i+size, len(log))]...)
		for j := range part {
			part[j].Local = true
		}
		res, err := s.Apply(part)
		noError(t, err)
		for _, r := range res {
			out = append(out, r...)
		}
	}
	return out
}

// checkCounts compares the counters with what is there, and each index with
// the records it points to.
func checkCounts(t *testing.T, s *FSM) {
	t.Helper()
	v := s.View()
	defer v.Close()
	c, err := v.Counts()
	noError(t, err)
	var n Counts
	noError(t, v.Pipelines("", 0, func(p *commandpb.Pipeline) bool {
		n.Pipelines++
		return true
	}))
	noError(t, v.Sidecars("", 0, func(sc *commandpb.Sidecar) bool {
		n.Sidecars++
		for _, l := range sc.Services {
			found := false
			noError(t, v.SidecarsServing(l.Name, func(o *commandpb.Sidecar) bool {
				found = found || o.SidecarId == sc.SidecarId
				return true
			}))
			if !found {
				t.Fatalf("%s is not found by the name %s", sc.SidecarId, l.Name)
			}
		}
		return true
	}))
	byName, named := map[string]bool{}, 0
	noError(t, v.Services("", 0, func(sv *commandpb.Service) bool {
		n.Services++
		byName[sv.Name] = true
		found := false
		noError(t, v.ServicesOfSidecar(sv.SidecarId, func(o *commandpb.Service) bool {
			found = found || o.ServiceId == sv.ServiceId
			if o.SidecarId != sv.SidecarId {
				t.Fatalf("%s is listed under %s", o.ServiceId, sv.SidecarId)
			}
			return true
		}))
		if !found {
			t.Fatalf("%s is not found by its sidecar", sv.ServiceId)
		}
		return true
	}))
	for name := range byName {
		noError(t, v.ServicesNamed(name, func(o *commandpb.Service) bool {
			named++
			return true
		}))
	}
	if named != int(n.Services) {
		t.Fatalf("%d services by name, %d in all", named, n.Services)
	}
	noError(t, v.Groups("", 0, func(g *commandpb.Group) bool {
		n.Groups++
		checkGroup(t, g)
		return true
	}))
	noError(t, v.Sources("", 0, func(source string) bool {
		noError(t, v.SourceOffsets(source, func(uint32, *commandpb.Offset) bool {
			n.SourceOffsets++
			return true
		}))
		noError(t, v.Watermarks(source, func(*commandpb.Watermark) bool {
			n.Watermarks++
			return true
		}))
		return true
	}))
	for i := range 3 {
		noError(t, v.GroupOffsets(fmt.Sprint("group-", i), "", func(string, uint32, *commandpb.Offset) bool {
			n.GroupOffsets++
			return true
		}))
	}
	noError(t, v.Checkpoints("", 0, func(*commandpb.Checkpoint) bool {
		n.Checkpoints++
		return true
	}))
	noError(t, v.AllAssignments(func(a *commandpb.Assignment) bool {
		if a.Revoked {
			n.Revoked++
		} else {
			n.Assignments++
		}
		found := false
		noError(t, v.PipelineAssignments(a.PipelineId, func(o *commandpb.Assignment) bool {
			found = found || o.SidecarId == a.SidecarId
			return true
		}))
		if !found {
			t.Fatalf("assignment of %s to %s is not found by its pipeline", a.PipelineId, a.SidecarId)
		}
		return true
	}))
	noError(t, v.Operations(func(*commandpb.Operation) bool {
		n.Operations++
		return true
	}))
	n.Requests = c.Requests
	if n != c {
		t.Fatalf("counters say %+v, there are %+v", c, n)
	}
}
