package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router/commandpb"
)

// maxEntryText bounds the text of one command: a checkpoint may be a megabyte.
const maxEntryText = 2 << 10

// EntryText describes the payload of a log entry on one line, for people.
func EntryText(e *raftpb.Entry) string {
	switch e.GetType() {
	case raftpb.EntryConfChange:
		var cc raftpb.ConfChange
		if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
			return "unreadable membership change: " + err.Error()
		}
		return "membership " + oneLine(&cc)
	case raftpb.EntryConfChangeV2:
		var cc raftpb.ConfChangeV2
		if err := proto.Unmarshal(e.GetData(), &cc); err != nil {
			return "unreadable membership change: " + err.Error()
		}
		return "membership " + oneLine(&cc)
	}
	if len(e.GetData()) == 0 {
		return "beginning of a term"
	}
	cmds, err := raftnode.EntryCommands(e.GetData())
	if err != nil {
		return "unreadable: " + err.Error()
	}
	parts := make([]string, len(cmds))
	for i, raw := range cmds {
		var c commandpb.Command
		if err := c.UnmarshalVT(raw); err != nil {
			parts[i] = "unreadable command: " + err.Error()
			continue
		}
		parts[i] = oneLine(&c)
	}
	return fmt.Sprintf("%d commands: %s", len(cmds), strings.Join(parts, " "))
}

// oneLine renders m as compact JSON; protojson varies its spaces on purpose.
func oneLine(m proto.Message) string {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return err.Error()
	}
	var out bytes.Buffer
	if err := json.Compact(&out, raw); err != nil {
		return err.Error()
	}
	if out.Len() > maxEntryText {
		return fmt.Sprintf("%s... (%d bytes in all)", out.Bytes()[:maxEntryText], out.Len())
	}
	return out.String()
}
