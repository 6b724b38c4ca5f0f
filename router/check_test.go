package router

import (
	"errors"
	"math/rand"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/encoding/protowire"

	"conveyor.etl/router/router/commandpb"
)

// Goal: the table of handlers and the log format name the same operations, under
// the same numbers: a command that can be made can be applied.
func TestEveryOperationHasAHandler(t *testing.T) {
	numbers := map[uint32]string{}
	for _, h := range commandTable() {
		numbers[h.op] = h.name
	}
	ops := (&commandpb.Command{}).ProtoReflect().Descriptor().Oneofs().ByName("op").Fields()
	for i := range ops.Len() {
		f := ops.Get(i)
		if got, want := numbers[uint32(f.Number())], string(f.Message().Name()); got != want {
			t.Errorf("operation %d is %s, its handler is called %q", f.Number(), want, got)
		}
	}
	if len(numbers) != ops.Len() {
		t.Errorf("%d handlers for %d operations", len(numbers), ops.Len())
	}
}

// Goal: commands as they are made pass both checks; damaged ones pass only if
// Apply takes them.
func TestChecksAgreeWithApply(t *testing.T) {
	r := randomness(t)
	g := &commands{r: r, time: 1000}
	s := open(t, vfs.NewMem(), "state")
	defer func() { noError(t, s.Close()) }()
	passed, refused := 0, 0
	for range 5000 {
		c := g.next()
		raw := marshal(t, c)
		if err := errors.Join(CheckCommand(c), CheckEncoded(raw)); err != nil {
			t.Fatalf("%v\n%s", err, text(c))
		}
		for range 1 + r.Intn(3) {
			if len(raw) > 0 {
				raw[r.Intn(len(raw))] = byte(r.Intn(256))
			}
		}
		checked := CheckEncoded(raw)
		_, err := s.Apply([]Entry{{Index: s.Applied().Index + 1, Term: 1, Commands: [][]byte{raw}, Local: true}})
		if checked == nil && err != nil {
			t.Fatalf("the check passes what Apply stops at: %v\n%x", err, raw)
		}
		if checked == nil {
			passed++
		} else {
			refused++
		}
		if err != nil {
			s.broken = nil
			clear(s.overlay)
			noError(t, s.adopt(s.cur))
		}
	}
	if passed == 0 || refused == 0 {
		t.Errorf("%d passed, %d were refused: the test tests nothing", passed, refused)
	}
}

// Goal: what no release could know, and what only a later one can, is refused
// with the reason.
func TestCheckEncoded(t *testing.T) {
	field := func(num protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), value)
	}
	number := func(num protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
	}
	condition := func(depth int) []byte {
		var c []byte
		for range depth {
			c = field(7, c)
		}
		return field(20, field(1, field(5, field(3, c)))) // an edge of a pipeline to put
	}
	for _, c := range []struct {
		name string
		raw  []byte
		want string // "": accepted
	}{
		{"nothing", nil, ""},
		{"no operation", number(1, 7), ""},
		{"an empty operation", field(12, nil), ""},
		{"packed numbers", field(40, field(4, []byte{1, 2, 0x80, 1})), ""},
		{"numbers one by one", field(40, append(number(4, 1), number(4, 2)...)), ""},
		{"an entry of a map", field(10, field(1, field(8, append(field(1, []byte("k")), field(2, []byte("v"))...)))), ""},
		{"conditions as deep as allowed", condition(maxConditionDepth), ""},
		{"conditions without end", condition(maxNesting), "nested too deeply"},
		{"a later operation", field(90, nil), "field 90 of a Command"},
		{"a later field", field(12, field(9, nil)), "field 9 of a RenewLease"},
		{"a later field of a map's entry", field(10, field(1, field(8, field(3, nil)))), "field 3 of a LabelsEntry"},
		{"a later operation of a batch", field(34, field(1, field(9, nil))), "field 9 of a CommitOp"},
		{"a text for a number", field(1, []byte("x")), "wire type 2"},
		{"a number for a message", number(12, 1), "wire type 0"},
		{"half a packed number", field(40, field(4, []byte{0x80})), "field 4 of a JoinGroup"},
		{"half a field", field(12, field(1, []byte("service")))[:5], "field 12 of a Command"},
		{"half a tag", []byte{0x80}, "field 0 of a Command"},
		{"a group", append(protowire.AppendTag(nil, 12, protowire.StartGroupType), protowire.AppendTag(nil, 12, protowire.EndGroupType)...), "wire type 3"},
	} {
		err := CheckEncoded(c.raw)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	raw := condition(3)
	if allocs := testing.AllocsPerRun(100, func() { _ = CheckEncoded(raw) }); allocs > 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// FuzzCheckEncoded: whatever passes the check, Apply takes.
func FuzzCheckEncoded(f *testing.F) {
	g := &commands{r: rand.New(rand.NewSource(1)), time: 1000}
	for range 100 {
		f.Add(marshal(f, g.next()))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		if CheckEncoded(raw) != nil {
			return
		}
		var c commandpb.Command
		if err := c.UnmarshalVT(raw); err != nil {
			t.Fatal(err)
		}
		if err := CheckCommand(&c); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkCheckEncoded(b *testing.B) {
	g := &commands{r: rand.New(rand.NewSource(1)), time: 1000}
	small := marshal(b, &commandpb.Command{TimeMs: 1 << 40, Op: &commandpb.Command_CommitSourceOffset{CommitSourceOffset: g.sourceOffset()}})
	batch := &commandpb.CommitBatch{}
	for range 64 {
		batch.Ops = append(batch.Ops, &commandpb.CommitOp{Op: &commandpb.CommitOp_SourceOffset{SourceOffset: g.sourceOffset()}})
	}
	large := marshal(b, &commandpb.Command{TimeMs: 1 << 40, Op: &commandpb.Command_CommitBatch{CommitBatch: batch}})
	for name, raw := range map[string][]byte{"offset": small, "batch64": large} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := CheckEncoded(raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
