package router

import (
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

func benchFSM(b testing.TB) *FSM {
	s, err := Open(vfs.Default, b.TempDir()+"/state", Options{Bootstrap: start})
	noError(b, err)
	b.Cleanup(func() { noError(b, s.Close()) })
	return s
}

// BenchmarkApply measures one command as a replica applies it: b.N commands in
// entries of 64, ten entries a batch, on one core's worth of work.
func BenchmarkApply(b *testing.B) {
	const perEntry, perBatch = 64, 10
	run := func(name string, local bool, make func(i int) *commandpb.Command) {
		b.Run(name, func(b *testing.B) {
			s := benchFSM(b)
			encoded := [][]byte{}
			for i := range 1 << 16 {
				encoded = append(encoded, marshal(b, make(i)))
			}
			b.ReportAllocs()
			b.ResetTimer()
			var batch []Entry
			e := Entry{Index: 2, Term: 1, Local: local}
			for i := range b.N {
				e.Commands = append(e.Commands, encoded[i%len(encoded)])
				if len(e.Commands) < perEntry && i+1 < b.N {
					continue
				}
				batch = append(batch, e)
				e = Entry{Index: e.Index + 1, Term: 1, Local: local}
				if len(batch) < perBatch && i+1 < b.N {
					continue
				}
				_, err := s.Apply(batch)
				noError(b, err)
				batch = batch[:0]
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commands/s")
		})
	}
	r := rand.New(rand.NewSource(1))
	offset := func(i int) *commandpb.Command {
		return &commandpb.Command{TimeMs: uint64(i), Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: &commandpb.CommitSourceOffset{
			SourceId: fmt.Sprint("kafka-events-", r.Intn(500)), Partition: uint32(r.Intn(20)), Offset: uint64(i), TimeS: 1_700_000_000,
		}}}
	}
	run("offsets/leader", true, offset)
	run("offsets/follower", false, offset)
	run("watermarks/leader", true, func(i int) *commandpb.Command {
		return &commandpb.Command{Op: &commandpb.Command_AdvanceWatermark{AdvanceWatermark: &commandpb.AdvanceWatermark{
			SourceId: fmt.Sprint("kafka-events-", r.Intn(50)), Partition: uint32(r.Intn(200)), Position: uint64(i),
		}}}
	})
	data := make([]byte, 256)
	r.Read(data)
	run("checkpoints/leader", true, func(i int) *commandpb.Command {
		return &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{
			ServiceId: fmt.Sprintf("service-%016x", r.Uint64()), CheckpointId: "c", Data: data,
		}}}
	})
}

// BenchmarkPebbleInsert is what checkpoints are compared with: the same keys
// and bytes without a state machine.
func BenchmarkPebbleInsert(b *testing.B) {
	s := benchFSM(b)
	r := rand.New(rand.NewSource(1))
	data := make([]byte, 280)
	r.Read(data)
	keys := make([][]byte, 1<<16)
	for i := range keys {
		keys[i] = fmt.Appendf(nil, "cservice-%016x", r.Uint64())
	}
	b.ResetTimer()
	batch := s.cur.db.NewBatch()
	for i := range b.N {
		noError(b, batch.Set(keys[i%len(keys)], data, nil))
		if batch.Count() == 640 {
			noError(b, batch.Commit(pebble.NoSync))
			batch = s.cur.db.NewBatch()
		}
	}
	noError(b, batch.Commit(pebble.NoSync))
}

func residentBytes(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Skip("no /proc")
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	noError(t, err)
	return pages * int64(os.Getpagesize())
}

// TestAMillionCheckpointsFitInMemory: the state lives on disk. Run it alone:
// the figure is the whole process's.
func TestAMillionCheckpointsFitInMemory(t *testing.T) {
	if os.Getenv("ROUTER_LONG") == "" {
		t.Skip("set ROUTER_LONG=1")
	}
	s := benchFSM(t)
	data := make([]byte, 256)
	rnd := rand.New(rand.NewSource(1))
	index := uint64(1)
	peak := int64(0)
	for i := 0; i < 1_000_000; {
		index++
		e := Entry{Index: index, Term: 1}
		for range 1000 {
			rnd.Read(data)
			id := binary.BigEndian.AppendUint64(nil, rnd.Uint64())
			e.Commands = append(e.Commands, marshal(t, &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{
				SaveCheckpoint: &commandpb.SaveCheckpoint{ServiceId: fmt.Sprintf("service-%x", id), CheckpointId: "c", Data: data},
			}}))
			i++
		}
		_, err := s.Apply([]Entry{e})
		noError(t, err)
		if i%50_000 == 0 {
			peak = max(peak, residentBytes(t))
		}
	}
	v := s.View()
	c, err := v.Counts()
	noError(t, err)
	_, err = v.Hash()
	noError(t, err)
	noError(t, v.Close())
	if c.Checkpoints != 1_000_000 {
		t.Fatalf("%d checkpoints", c.Checkpoints)
	}
	runtime.GC()
	debug.FreeOSMemory()
	peak = max(peak, residentBytes(t))
	t.Logf("peak %d MB, at rest %d MB", peak>>20, residentBytes(t)>>20)
	if peak > 200<<20 {
		t.Fatalf("%d MB resident at the peak, at most 200 allowed", peak>>20)
	}
}
