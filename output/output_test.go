package output

import (
	"bytes"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/backuppb"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func TestDocuments(t *testing.T) {
	message := &adminpb.PipelineConfig{Id: "a", Name: "true", Description: "two\nlines", Metadata: map[string]string{"n": "12", "é": "ü"}}
	for _, c := range []struct {
		name   string
		format Format
		value  any
		want   string
	}{
		{"message as JSON", JSON, message, `{
  "id": "a",
  "name": "true",
  "description": "two\nlines",
  "metadata": {
    "n": "12",
    "é": "ü"
  }
}
`},
		// Texts that would read as something else stay quoted.
		{"message as YAML", YAML, message, `id: a
name: "true"
description: |-
  two
  lines
metadata:
  "n": "12"
  é: ü
`},
		{"names and numbers", JSON, &clusterpb.Operation{
			OperationId: "1", Done: 1 << 62, NodeId: 3, StartedAt: &timestamppb.Timestamp{Seconds: 5}, State: clusterpb.OperationState_OPERATION_STATE_DONE,
			Message: "<7> & 8",
		}, `{
  "operation_id": "1",
  "state": "OPERATION_STATE_DONE",
  "node_id": 3,
  "done": 4611686018427387904,
  "message": "<7> & 8",
  "started_at": "1970-01-01T00:00:05Z"
}
`},
		{"texts that look like numbers", JSON, &backuppb.SnapshotInfo{SnapshotId: "12", SizeBytes: 34}, `{
  "snapshot_id": "12",
  "size_bytes": 34
}
`},
		{"maps of numbers", JSON, &checkpointpb.PartitionOffsets{Offsets: map[uint32]uint64{3: 1 << 60}}, `{
  "offsets": {
    "3": 1152921504606846976
  }
}
`},
		{"lists of numbers", YAML, &clusterpb.ListMembersResponse{Removed: []uint64{1, 2}}, "removed:\n  - 1\n  - 2\n"},
		{"list", YAML, Messages([]*adminpb.PipelineConfig{message, {Id: "b"}})[1:], "- id: b\n"},
		{"empty list", JSON, []proto.Message{}, "[]\n"},
		{"empty list as YAML", YAML, []proto.Message{}, "[]\n"},
		{"struct", YAML, struct {
			A uint64 `json:"a"`
			B string `json:"b,omitempty"`
		}{A: 1 << 63}, "a: 9223372036854775808\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := Document(&out, c.format, c.value); err != nil {
				t.Fatal(err)
			}
			if out.String() != c.want {
				t.Errorf("got\n%s\nwant\n%s", out.String(), c.want)
			}
		})
	}
}

// Names come from clients: one with an escape sequence must not reach the
// terminal as such.
func TestTableIsSafeForTerminals(t *testing.T) {
	g := &Grid{Header: []string{"ID", "N"}}
	g.Add("evil\x1b[2J\u009b\ttab\nline", 1)
	g.Add("", 22)
	var out bytes.Buffer
	if err := g.Write(&out); err != nil {
		t.Fatal(err)
	}
	want := "ID                  N\nevil?[2J??tab?line  1\n-                   22\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestFormatFlag(t *testing.T) {
	for _, name := range []string{"table", "json", "yaml"} {
		var f Format
		if err := f.Set(name); err != nil || f.String() != name {
			t.Errorf("%s: %v, %s", name, err, f.String())
		}
	}
	var f Format
	if err := f.Set("xml"); err == nil || !strings.Contains(err.Error(), "table") {
		t.Errorf("xml: %v", err)
	}
}
