package router

import (
	"encoding/hex"
	"flag"
	"fmt"
	"math/rand"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/router/commandpb"
)

var seedFlag = flag.Int64("seed", 0, "seed of the random tests; 0 = a new one each run")

// randomness returns a source whose seed the test's output names.
func randomness(t testing.TB) *rand.Rand {
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Int63()
	}
	t.Logf("seed %d (repeat with -seed %d)", seed, seed)
	return rand.New(rand.NewSource(seed))
}

var start = Position{Index: 1, Term: 1, ConfState: []byte("conf"), Members: []byte("members")}

func testOptions() Options {
	return Options{Bootstrap: start, MemTableBytes: 256 << 10, CacheBytes: 1 << 20}
}

func open(t testing.TB, fs vfs.FS, dir string) *FSM {
	t.Helper()
	s, err := Open(fs, dir, testOptions())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func openMem(t testing.TB) *FSM {
	t.Helper()
	s := open(t, vfs.NewMem(), "state")
	t.Cleanup(func() { noError(t, s.Close()) })
	return s
}

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// command reads a Command in text form.
func command(t testing.TB, text string) *commandpb.Command {
	t.Helper()
	c := &commandpb.Command{}
	if err := prototext.Unmarshal([]byte(text), c); err != nil {
		t.Fatalf("%v in:\n%s", err, text)
	}
	return c
}

func marshal(t testing.TB, c *commandpb.Command) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	noError(t, err)
	return b
}

// apply applies commands as one entry and returns their results.
func apply(t testing.TB, s *FSM, cmds ...*commandpb.Command) []*commandpb.Result {
	t.Helper()
	e := Entry{Index: s.Applied().Index + 1, Term: 1, Local: true}
	for _, c := range cmds {
		e.Commands = append(e.Commands, marshal(t, c))
	}
	res, err := s.Apply([]Entry{e})
	noError(t, err)
	return res[0]
}

// do applies one command in text form.
func do(t testing.TB, s *FSM, text string) *commandpb.Result {
	t.Helper()
	return apply(t, s, command(t, text))[0]
}

// text prints a message on one line. prototext varies its blanks on purpose.
func text(m proto.Message) string {
	if m == nil {
		return "-"
	}
	s := prototext.MarshalOptions{}.Format(m)
	for strings.Contains(s, "  ") {
		s = strings.ReplaceAll(s, "  ", " ")
	}
	return strings.TrimSpace(s)
}

func hash(t testing.TB, s *FSM) string {
	t.Helper()
	v := s.View()
	defer v.Close()
	h, err := v.Hash()
	noError(t, err)
	return hex.EncodeToString(h)
}

// dump prints the whole state, one record a line, through the read API.
func dump(t testing.TB, s *FSM) string {
	t.Helper()
	v := s.View()
	defer v.Close()
	var b strings.Builder
	line := func(kind string, m proto.Message) bool {
		fmt.Fprintf(&b, "%s %s\n", kind, text(m))
		return true
	}
	noError(t, v.Pipelines("", 0, func(m *commandpb.Pipeline) bool { return line("pipeline", m) }))
	noError(t, v.Sidecars("", 0, func(m *commandpb.Sidecar) bool { return line("sidecar", m) }))
	noError(t, v.Services("", 0, func(m *commandpb.Service) bool { return line("service", m) }))
	noError(t, v.Groups("", 0, func(m *commandpb.Group) bool {
		line("group", m)
		noError(t, v.GroupOffsets(m.GroupId, "", func(source string, p uint32, o *commandpb.Offset) bool {
			return line(fmt.Sprintf("  group-offset %s/%d", source, p), o)
		}))
		return true
	}))
	noError(t, v.Sources("", 0, func(source string) bool {
		noError(t, v.SourceOffsets(source, func(p uint32, o *commandpb.Offset) bool {
			return line(fmt.Sprintf("offset %s/%d", source, p), o)
		}))
		noError(t, v.Watermarks(source, func(w *commandpb.Watermark) bool { return line("watermark", w) }))
		return true
	}))
	noError(t, v.Checkpoints("", 0, func(m *commandpb.Checkpoint) bool { return line("checkpoint", m) }))
	noError(t, v.AllAssignments(func(m *commandpb.Assignment) bool { return line("assignment", m) }))
	noError(t, v.Handovers(func(m *commandpb.Handover) bool { return line("handover", m) }))
	noError(t, v.Operations(func(m *commandpb.Operation) bool { return line("operation", m) }))
	stage, err := v.Stage()
	noError(t, err)
	if stage != nil {
		line("stage", stage)
	}
	c, err := v.Counts()
	noError(t, err)
	now, err := v.Time()
	noError(t, err)
	fmt.Fprintf(&b, "revision %d applied %d time %d", v.Revision(), v.Applied(), now)
	if v.Epoch() != 0 {
		fmt.Fprintf(&b, " epoch %d", v.Epoch())
	}
	fmt.Fprintf(&b, "\n%+v\n", c)
	return b.String()
}
