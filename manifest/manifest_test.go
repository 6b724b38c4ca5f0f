package manifest

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

func configs(s *Set) []*adminpb.PipelineConfig {
	var out []*adminpb.PipelineConfig
	for _, p := range s.Pipelines {
		out = append(out, p.Config)
	}
	return out
}

// Goal: what a file becomes does not change unnoticed. Method: each input in
// testdata and each example is compared with its golden file.
func TestGolden(t *testing.T) {
	inputs, _ := filepath.Glob("testdata/*.yaml")
	examples, _ := filepath.Glob("../examples/*.*")
	for _, in := range append(inputs, examples...) {
		if !isManifest(filepath.Base(in)) {
			continue
		}
		t.Run(filepath.Base(in), func(t *testing.T) {
			set, err := Load([]string{in}, nil)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if err := output.Document(&got, output.YAML, output.Messages(configs(set))); err != nil {
				t.Fatal(err)
			}
			for _, w := range set.Warnings {
				got.WriteString("# warning: " + w.String() + "\n")
			}
			if err := set.CheckReferences(); err != nil {
				for _, line := range strings.Split(err.Error(), "\n") {
					got.WriteString("# reference: " + line + "\n")
				}
			}
			golden := filepath.Join("testdata", filepath.Base(in)+".golden")
			if *rewrite {
				if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("differs from %s (go test ./manifest -rewrite makes it anew):\n%s", golden, diff)
			}
			// What is printed is what apply reads: the round trip is exact.
			again, err := Load([]string{"-"}, bytes.NewReader(got.Bytes()))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(configs(set), configs(again), protocmp.Transform()); diff != "" {
				t.Errorf("printed and read again: %s", diff)
			}
		})
	}
}

// A Pipeline must become what the Kubernetes operator sends, to the field:
// otherwise the two undo each other's work for ever.
func TestPipelineAsTheOperatorMapsIt(t *testing.T) {
	set, err := Load([]string{"-"}, strings.NewReader(`apiVersion: conveyor.etl/v1
kind: Pipeline
metadata: {name: p, namespace: n, labels: {a: b}}
spec: {source: src, steps: [one, two], sink: out, enabled: false, dlq: {sink: dead, maxRetries: 3}}
`))
	if err != nil {
		t.Fatal(err)
	}
	stage := func(id, service string, kind adminpb.StageType) *adminpb.Stage {
		return &adminpb.Stage{Id: id, Name: service, StageType: kind, Parallelism: 1, ServiceSelector: &adminpb.ServiceSelector{
			ServiceName: service, LoadBalance: adminpb.LoadBalanceStrategy_LOAD_BALANCE_ROUND_ROBIN}}
	}
	want := []*adminpb.PipelineConfig{{
		Id: "n/p", Name: "p", Metadata: map[string]string{"a": "b"},
		Stages: []*adminpb.Stage{
			stage("p-source", "src", adminpb.StageType_STAGE_TYPE_SOURCE),
			stage("p-transform-0", "one", adminpb.StageType_STAGE_TYPE_TRANSFORM),
			stage("p-transform-1", "two", adminpb.StageType_STAGE_TYPE_TRANSFORM),
			stage("p-sink", "out", adminpb.StageType_STAGE_TYPE_SINK),
		},
		Edges: []*adminpb.Edge{{FromStage: "p-source", ToStage: "p-transform-0"},
			{FromStage: "p-transform-0", ToStage: "p-transform-1"}, {FromStage: "p-transform-1", ToStage: "p-sink"}},
	}}
	if diff := cmp.Diff(want, configs(set), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := func(id string) string { return "id: " + id + "\nstages: []\n" }
	write("b/deep/er.yml", config("deeper"))
	write("a.yaml", config("a")+"---\n"+config("a2"))
	write("c.json", "{\n\t\"id\": \"c\",\n\t\"stages\": []\n}\n")
	write("README.md", "not: [a manifest")
	write(".hidden/x.yaml", "not: [a manifest")
	set, err := Load([]string{dir}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, p := range set.Pipelines {
		ids = append(ids, p.Config.GetId())
	}
	if diff := cmp.Diff([]string{"a", "a2", "deeper", "c"}, ids); diff != "" {
		t.Error(diff)
	}
}

const source = "apiVersion: v1\nkind: Source\nmetadata: {name: s}\nspec: {grpc: {endpoint: 'h:1'}}\n"

func TestFaults(t *testing.T) {
	head := "apiVersion: v1\nkind: Pipeline\nmetadata: {name: p}\n"
	for _, c := range []struct {
		name string
		text string
		want []string
	}{
		{"syntax", "a: b\n c: [\n", []string{"standard input:2: not valid YAML"}},
		{"a text", "hello\n", []string{"standard input:1: the document must hold fields and values"}},
		{"kind missing", "apiVersion: v1\n", []string{"kind is missing", "metadata is missing", "spec is missing"}},
		{"kind unknown", "apiVersion: v1\nkind: Deployment\n", []string{`standard input:2: unknown kind "Deployment"`}},
		{"apiVersion missing", "kind: Source\nmetadata: {name: s}\nspec: {grpc: {endpoint: h}}\n", []string{"apiVersion is missing"}},
		{"name missing", "apiVersion: v1\nkind: Sink\nmetadata: {}\nspec: {grpc: {endpoint: h}}\n", []string{"standard input:3: Sink metadata: name is missing"}},
		{"name with a slash", "apiVersion: v1\nkind: Sink\nmetadata: {name: a/b}\nspec: {grpc: {endpoint: h}}\n", []string{"must not contain '/'"}},
		{"name empty", "apiVersion: v1\nkind: Sink\nmetadata: {name: ''}\nspec: {grpc: {endpoint: h}}\n", []string{"name must not be empty"}},
		{"label no text", "apiVersion: v1\nkind: Sink\nmetadata: {name: a, labels: {x: 1}}\nspec: {grpc: {endpoint: h}}\n", []string{`the value of "x" must be a text; quote it`}},
		{"grpc missing", "apiVersion: v1\nkind: Transform\nmetadata: {name: a}\nspec: {config: 1}\n", []string{"Transform default/a: grpc is missing"}},
		{"endpoint missing", "apiVersion: v1\nkind: Source\nmetadata: {name: a}\nspec:\n  grpc: {proto: x}\n", []string{"standard input:5: Source default/a grpc: endpoint is missing"}},
		{"tls", "apiVersion: v1\nkind: Source\nmetadata: {name: a}\nspec: {grpc: {endpoint: h, tls: {insecureSkipVerify: 5}}}\n", []string{"insecureSkipVerify must be true or false"}},
		{"pipeline empty", head + "spec: {}\n", []string{"source is missing", "sink is missing"}},
		{"steps no list", head + "spec: {source: a, sink: b, steps: c}\n", []string{"steps must be a list"}},
		{"step empty", head + "spec:\n  source: a\n  sink: b\n  steps:\n  - ''\n  - {x: 1}\n", []string{"standard input:8: ", "standard input:9: "}},
		{"enabled", head + "spec: {source: a, sink: b, enabled: 'yes'}\n", []string{"enabled must be true or false"}},
		{"dlq", head + "spec: {source: a, sink: b, dlq: {maxRetries: many}}\n", []string{"sink is missing", "maxRetries must be a whole number"}},
		{"resource twice", source + "---\n" + source, []string{"standard input:6: Source default/s is declared twice; first at standard input:1"}},
		{"pipeline twice in two forms", head + "spec: {source: a, sink: b}\n---\nid: default/p\nstages: []\n", []string{"standard input:6: pipeline default/p is declared twice; first at standard input:1"}},
		{"field twice", "apiVersion: v1\napiVersion: v2\nkind: Source\nmetadata: {name: s}\nspec: {grpc: {endpoint: h}}\n", []string{"standard input:2: the document: apiVersion is set twice"}},
		{"config without id", "stages: []\n", []string{"PipelineConfig: id is missing"}},
		{"config of a kind", "kind: PipelineConfig\nid: x\nstagez: []\n", []string{`standard input:3: PipelineConfig has no field "stagez"; it has id, name`}},
		{"config fields", "id: x\nenabled: maybe\nmetadata: [a]\nstages:\n- id: a\n  stageType: SPRING\n  parallelism: -1\n  serviceSelector: {labels: {a: {}}}\n- nothing\nedges: {}\n", []string{
			`standard input:2: enabled: "maybe" is not true or false`, "standard input:3: metadata must hold names and values",
			`standard input:6: stageType: "SPRING" is not one of STAGE_TYPE_SOURCE, STAGE_TYPE_TRANSFORM, STAGE_TYPE_SINK`,
			`standard input:7: parallelism: "-1" is not a whole number from 0 to 4294967295`,
			"standard input:8: labels must be one value", "standard input:9: Stage must hold fields and values", "standard input:10: edges must be a list"}},
		{"two conditions", "id: x\nstages: []\nedges:\n- condition:\n    recordType: a\n    always: b\n", []string{"standard input:6: Condition: only one of recordType and always can be set"}},
		{"faults of several documents", "kind: Nope\n---\nid: x\nstages: 5\n", []string{"unknown kind", "stages must be a list"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Load([]string{"-"}, strings.NewReader(c.text))
			var faults Faults
			if !errors.As(err, &faults) {
				t.Fatalf("got %v, want faults", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no fault says %q", want)
				}
			}
			if len(faults) != len(c.want) {
				t.Errorf("%d faults, want %d", len(faults), len(c.want))
			}
			if t.Failed() {
				t.Log(err)
			}
		})
	}
	for _, path := range []string{"absent.yaml", t.TempDir()} {
		if _, err := Load([]string{path}, nil); err == nil {
			t.Errorf("%s: no fault", path)
		}
	}
}

// References are looked up in the pipeline's namespace, and the texts are those
// people know from the original command line.
func TestReferences(t *testing.T) {
	set, err := Load([]string{"-"}, strings.NewReader(source+`---
apiVersion: v1
kind: Pipeline
metadata: {name: p, namespace: other}
spec:
  source: s
  steps: [t]
  sink: k
  dlq: {sink: d}
`))
	if err != nil {
		t.Fatal(err)
	}
	err = set.CheckReferences()
	if err == nil {
		t.Fatal("nothing was found missing")
	}
	want := `standard input:10: pipeline 'p': source 's' not found in namespace 'other'
standard input:11: pipeline 'p': transform 't' not found in namespace 'other'
standard input:12: pipeline 'p': sink 'k' not found in namespace 'other'
standard input:13: pipeline 'p': DLQ sink 'd' not found in namespace 'other'`
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Error(diff)
	}
}

// The strict reader takes exactly what protojson takes.
func FuzzConfig(f *testing.F) {
	f.Add("x", "n", uint32(3), "^a", true)
	f.Fuzz(func(t *testing.T, id, name string, parallelism uint32, pattern string, enabled bool) {
		c := &adminpb.PipelineConfig{Id: "i" + id, Name: name, Enabled: enabled, Metadata: map[string]string{name: pattern},
			Stages: []*adminpb.Stage{{Id: id, Parallelism: parallelism, StageType: adminpb.StageType_STAGE_TYPE_SINK}},
			Edges: []*adminpb.Edge{{Condition: &adminpb.Condition{Condition: &adminpb.Condition_Not{Not: &adminpb.NotCondition{
				Condition: &adminpb.Condition{Condition: &adminpb.Condition_RecordType{RecordType: pattern}}}}}}}}
		raw, err := protojson.Marshal(c)
		if err != nil {
			t.Skip() // not UTF-8
		}
		set, err := Load([]string{"-"}, bytes.NewReader(raw))
		if err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if len(set.Pipelines) != 1 || !proto.Equal(c, set.Pipelines[0].Config) {
			t.Errorf("%s was read as %v", raw, configs(set))
		}
	})
}

func FuzzLoad(f *testing.F) {
	f.Add(source)
	f.Add("id: x\nstages: [{id: a, routingRules: [{condition: {always: ''}}]}]\n")
	f.Fuzz(func(t *testing.T, text string) {
		set, err := Load([]string{"-"}, strings.NewReader(text))
		if err != nil {
			return
		}
		for _, p := range set.Pipelines {
			if p.Config.GetId() == "" {
				t.Errorf("accepted a pipeline without an id: %q", text)
			}
		}
		_ = set.CheckReferences()
	})
}
