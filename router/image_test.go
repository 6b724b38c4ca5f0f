package router

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router/commandpb"
)

// files reads a directory: names and contents.
func files(t testing.TB, fs vfs.FS, dir string) map[string]string {
	t.Helper()
	names, err := fs.List(dir)
	noError(t, err)
	out := map[string]string{}
	for _, n := range names {
		path := fs.PathJoin(dir, fs.PathBase(n))
		info, err := fs.Stat(path)
		noError(t, err)
		f, err := fs.Open(path)
		noError(t, err)
		b := make([]byte, info.Size())
		if len(b) > 0 {
			_, err = f.ReadAt(b, 0)
			noError(t, err)
		}
		noError(t, f.Close())
		out[fs.PathBase(n)] = string(b)
	}
	return out
}

// TestImagesAreOnlyRead, by several at once, and say the same as the state they
// were made of.
func TestImagesAreOnlyRead(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	_, err := s.Apply((&commands{r: randomness(t), time: 1_000_000}).log(t, 2, 200))
	noError(t, err)
	pos, err := s.Image("image")
	noError(t, err)
	before := files(t, fs, "image")
	a, err := OpenImage(fs, "image", testOptions())
	noError(t, err)
	b, err := OpenImage(fs, "image", testOptions())
	noError(t, err)
	if got := a.Position(); got.Index != pos.Index || string(got.Members) != "members" {
		t.Fatalf("position %+v", got)
	}
	v, w := a.View(), b.View()
	noError(t, a.Close()) // the view stays
	noError(t, a.Close())
	if err := a.View().check(t.Context(), false); !errors.Is(err, ErrClosed) {
		t.Fatalf("a view of a closed image: %v", err)
	}
	h, err := v.Hash()
	noError(t, err)
	live, err := s.View().Hash()
	noError(t, err)
	if string(h) != string(live) || v.Revision() != s.Revision() {
		t.Fatal("the image says something else than the state")
	}
	noError(t, w.check(t.Context(), false))
	if _, err := w.Counts(); err != nil {
		t.Fatal(err)
	}
	src, err := b.checkedSource(t.Context(), false)
	noError(t, err)
	if string(src.ContentHash) != contentHash(t, s) || src.Index != pos.Index || src.Clock.Revision != s.Revision() {
		t.Fatalf("source %s", text(src))
	}
	noError(t, errors.Join(v.Close(), w.Close(), b.Close()))
	after := files(t, fs, "image")
	if len(before) != len(after) {
		t.Fatalf("%d files before, %d after", len(before), len(after))
	}
	for n, c := range before {
		if after[n] != c {
			t.Fatalf("%s has changed", n)
		}
	}
	if _, err := OpenImage(fs, "nothing", testOptions()); err == nil {
		t.Fatal("nothing was opened as an image")
	}
}

// TestCheckFindsDamage of every kind, in an image that Pebble has nothing to say
// against.
func TestCheckFindsDamage(t *testing.T) {
	graph := `put_pipeline { spec { id: "p" enabled: true stages { id: "a" type: STAGE_TYPE_SOURCE } stages { id: "b" type: STAGE_TYPE_SINK } edges { from_stage: "a" to_stage: "b" } } }`
	build := []string{
		graph,
		`register_sidecar { sidecar { sidecar_id: "x" services { name: "a" } } }`,
		`register_service { service { service_id: "v" name: "a" sidecar_id: "x" } }`,
		`join_group { service_id: "v" group_id: "g" partition_count: 2 }`,
		`commit_group_offset { group_id: "g" source_id: "s" offset: 1 }`,
		`commit_source_offset { source_id: "s" offset: 1 }`,
		`advance_watermark { source_id: "s" position: 1 }`,
		`save_checkpoint { service_id: "v" checkpoint_id: "c" }`,
		`apply_assignments { changes { sidecar_id: "x" pipeline_id: "p" sidecar_generation: 1 pipeline_version: 1 } }`,
		`request_id: "r" apply_assignments { changes { sidecar_id: "x" pipeline_id: "p" sidecar_generation: 1 revoke: true } }`,
	}
	set := func(k key, v []byte) func(db *pebble.DB) error {
		return func(db *pebble.DB) error { return db.Set(k, v, pebble.NoSync) }
	}
	drop := func(k key) func(db *pebble.DB) error {
		return func(db *pebble.DB) error { return db.Delete(k, pebble.NoSync) }
	}
	encoded := func(m message) []byte {
		b, err := encode(m)
		noError(t, err)
		return b
	}
	k := func() key { return nil }
	cases := map[string]struct {
		damage func(db *pebble.DB) error
		want   string
	}{
		"nothing":           {func(*pebble.DB) error { return nil }, ""},
		"unknown table":     {set(key("Zx"), nil), "of no table"},
		"undecodable":       {set(k().single(prefixPipeline, "p"), []byte{0xff}), "record"},
		"another id":        {set(k().single(prefixPipeline, "q"), encoded(&commandpb.Pipeline{Spec: &commandpb.PipelineSpec{Id: "p"}, Version: 1})), "record"},
		"a bad graph":       {set(k().single(prefixPipeline, "p"), encoded(&commandpb.Pipeline{Spec: &commandpb.PipelineSpec{Id: "p"}, Version: 1})), "NoStages"},
		"a lost pipeline":   {drop(k().single(prefixPipeline, "p")), "pipelines"},
		"an offset more":    {set(k().partition(prefixSourceOffset, "s", 9), encodeOffset(1, 0, 0)), "source offsets"},
		"another offset":    {set(k().partition(prefixSourceOffset, "s", 0), encodeOffset(9, 0, 0)), "sums"},
		"another position":  {set(k().partition(prefixWatermark, "s", 0), encodeWatermark(&commandpb.AdvanceWatermark{Position: 9})), "sums"},
		"an illegal id":     {set(k().partition(prefixSourceOffset, "a\nb", 0), encodeOffset(9, 0, 0)), "unprintable"},
		"no local name":     {drop(k().pair(prefixLocalName, "a", "x")), "missing"},
		"no service name":   {drop(k().pair(prefixByName, "a", "v")), "missing"},
		"no service of x":   {drop(k().pair(prefixBySidecar, "x", "v")), "missing"},
		"a name more":       {set(k().pair(prefixByName, "b", "v"), nil), "services by name"},
		"no membership":     {drop(k().pair(prefixMembership, "v", "g")), "missing"},
		"no assignment of":  {drop(k().pair(prefixByPipeline, "p", "x")), "missing"},
		"no revoked count":  {drop(k().single(prefixRevokedCount, "x")), "counter says 0"},
		"no revocation":     {drop(k().sequence(prefixRevokedQueue, 0)), "queue"},
		"no request":        {drop(k().single(prefixRequest, "r")), "sums"},
		"no queued request": {drop(k().sequence(prefixRequestQueue, 0)), "place in the queue"},
		"two owners": {set(k().single(prefixGroup, "g"), encoded(&commandpb.Group{GroupId: "g", PartitionCount: 2, Generation: 1,
			Members: []*commandpb.GroupMember{{ServiceId: "v", Partitions: []uint32{0, 0}}}})), "another owner"},
		"no owner": {set(k().single(prefixGroup, "g"), encoded(&commandpb.Group{GroupId: "g", PartitionCount: 2, Generation: 1,
			Members: []*commandpb.GroupMember{{ServiceId: "v", Partitions: []uint32{1}}}})), "no owner"},
		"the future": {set(k().single(prefixCheckpoint, "v"), encoded(&commandpb.Checkpoint{ServiceId: "v", CheckpointId: "c", ModRevision: 99})), "revision 99"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem()
			s := open(t, fs, "state")
			for _, b := range build {
				accepted(t, s, command(t, b))
			}
			noError(t, c.damage(s.cur.db))
			_, err := s.Image("image")
			noError(t, err)
			noError(t, s.Close())
			im, err := OpenImage(fs, "image", testOptions())
			noError(t, err)
			defer func() { noError(t, im.Close()) }()
			err = im.Check(t.Context())
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (!errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.want)):
				t.Fatalf("got %v, want something about %q", err, c.want)
			}
		})
	}
}

// TestDiff names what a restore would do.
func TestDiff(t *testing.T) {
	fs := vfs.NewMem()
	s := open(t, fs, "state")
	defer func() { noError(t, s.Close()) }()
	accepted(t, s, put("same", ""), put("changed", "1"), put("gone", ""), offsetCommand("s", 1),
		command(t, `commit_group_offset { group_id: "g" source_id: "s" partition: 3 offset: 1 }`))
	_, err := s.Image("image")
	noError(t, err)
	accepted(t, s, put("changed", "2"), command(t, `delete_pipeline { pipeline_id: "gone" }`), offsetCommand("s", 2))
	for i := range 12 {
		accepted(t, s, put(fmt.Sprintf("new-%02d", i), ""))
	}
	im, err := OpenImage(fs, "image", testOptions())
	noError(t, err)
	defer func() { noError(t, im.Close()) }()
	snapshot, live := im.View(), s.View()
	defer func() { noError(t, errors.Join(snapshot.Close(), live.Close())) }()
	diff, err := Diff(t.Context(), live, snapshot)
	noError(t, err)
	var got []string
	for _, d := range diff {
		if d.Live+d.InSnapshot > 0 {
			got = append(got, fmt.Sprintf("%+v", d))
		}
	}
	want := []string{
		"{Table:pipelines InSnapshot:3 Live:14 Added:1 Removed:12 Changed:1 Examples:[~changed +gone -new-00 -new-01 -new-02 -new-03 -new-04 -new-05 -new-06 -new-07]}",
		"{Table:source offsets InSnapshot:1 Live:1 Added:0 Removed:0 Changed:1 Examples:[~s/0]}",
		"{Table:group offsets InSnapshot:1 Live:1 Added:0 Removed:0 Changed:0 Examples:[]}",
	}
	if !slices.Equal(got, want) {
		t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestCreateFromSurvivesACrashAnywhere: there is the whole new state or none, and
// it can be made then.
func TestCreateFromSurvivesACrashAnywhere(t *testing.T) {
	base := vfs.NewCrashableMem()
	src := open(t, base, "source")
	_, err := src.Apply((&commands{r: randomness(t), time: 1_000_000}).log(t, 2, 60))
	noError(t, err)
	accepted(t, src, command(t, `put_operation { create: true operation { operation_id: "o" kind: "backup" state: OPERATION_STATE_DONE } }`))
	_, err = src.Image("image")
	noError(t, err)
	g := &commands{}
	accepted(t, src, g.abandon("restore-0"), g.abandon("restore-1"))
	accepted(t, src, stageCommands(t, base, "image", "op")...)
	noError(t, base.RemoveAll("image"))
	_, err = src.Image("image") // in the middle of a restore
	noError(t, err)
	content, revision := contentHash(t, src), src.Revision()
	noError(t, errors.Join(src.Close(), syncDir(base, "image"), syncDir(base, "")))
	pos := Position{Index: 5, Term: 2, ConfState: []byte("new conf"), Members: []byte("new members")}
	check := func(t *testing.T, fs vfs.FS) string {
		t.Helper()
		if err := CreateFrom(fs, "data/state", "image", pos, testOptions()); !errors.Is(err, ErrStateExists) {
			t.Fatalf("over a state: %v", err)
		}
		s := open(t, fs, "data/state")
		defer func() { noError(t, s.Close()) }()
		if p := s.Applied(); p.Index != 5 || p.Term != 2 || string(p.ConfState) != "new conf" || string(p.Members) != "new members" || s.Durable() != 5 {
			t.Fatalf("position %+v, durable %d", p, s.Durable())
		}
		if contentHash(t, s) != content || s.Revision() != revision || s.Epoch() != 0 || s.RevisionBase() != revision-5 {
			t.Fatalf("another state: %s", dump(t, s))
		}
		sound(t, s)
		v := s.View()
		defer v.Close()
		stage, err := v.Stage()
		c, cerr := v.Counts()
		if stage != nil || c.Operations != 0 || errors.Join(err, cerr) != nil {
			t.Fatalf("something of the old cluster is left: %v, %+v, %v", stage, c, errors.Join(err, cerr))
		}
		return hash(t, s)
	}
	want := ""
	everyWrite(t, func(t *testing.T, inj *nthWrite, crashed func(*vfs.MemFS) []*vfs.MemFS) {
		fs := crash(base, 0, 1)
		crashed(fs)
		err := CreateFrom(faulty(fs, inj), "data/state", "image", pos, testOptions())
		if err == nil && !inj.fired.Load() {
			inj.off.Store(true)
			want = check(t, crash(fs, 0, 1))
		}
		for _, c := range crashed(fs) {
			if names, err := c.List("data/state"); err != nil || len(names) == 0 {
				noError(t, CreateFrom(c, "data/state", "image", pos, testOptions()))
			}
			got := check(t, c)
			if want != "" && got != want {
				t.Fatal("the same image made another state")
			}
			// The state goes on where the revisions end.
			s := open(t, c, "data/state")
			if r := accepted(t, s, put("next", "")); r.Revision != revision+1 {
				t.Fatalf("the next revision is %d after %d", r.Revision, revision)
			}
			noError(t, s.Close())
			names, err := c.List("data")
			noError(t, err)
			if len(names) != 1 {
				t.Fatalf("left beside the state: %v", names)
			}
		}
	})
	if err := CreateFrom(base, "other", "nothing", pos, testOptions()); err == nil {
		t.Fatal("a state was made of nothing")
	}
	if _, err := base.Stat("other"); err == nil {
		t.Fatal("a failed creation left a directory")
	}
}
