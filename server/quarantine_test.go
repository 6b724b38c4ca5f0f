package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"conveyor.etl/router/config"
)

func TestQuarantineNote(t *testing.T) {
	dir := t.TempDir()
	if q, err := readQuarantine(dir); q != nil || err != nil {
		t.Fatalf("without a note: %v %v", q, err)
	}
	want := &quarantine{Reason: "so it is", Index: 128, Epoch: 1, Own: []string{"01"}, Expected: []string{"02"}, Agreed: []uint64{1, 2},
		Since: time.Unix(1_800_000_000, 0).UTC()}
	if err := writeQuarantine(dir, want); err != nil {
		t.Fatal(err)
	}
	if q, err := readQuarantine(dir); err != nil || !reflect.DeepEqual(q, want) {
		t.Errorf("read %+v %v, wrote %+v", q, err, want)
	}
	name := filepath.Join(dir, quarantineName)
	for what, raw := range map[string]string{"half": `{"reason": "so`, "other": "please", "huge": strings.Repeat(" ", maxQuarantineBytes+1)} {
		if err := os.WriteFile(name, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if q, err := readQuarantine(dir); !errors.Is(err, ErrIncomplete) || !strings.Contains(err.Error(), "empty file") {
			t.Errorf("%s: %+v %v", what, q, err)
		}
	}
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if q, err := readQuarantine(dir); err != nil || q == nil || len(q.Agreed) != 0 {
		t.Errorf("an operator's: %+v %v", q, err)
	}
	if err := removeQuarantine(dir); err != nil {
		t.Fatal(err)
	}
	if q, err := readQuarantine(dir); q != nil || err != nil {
		t.Errorf("removed: %v %v", q, err)
	}
}

// Goal: an operator's note makes a node take the state of the others before it
// answers anybody, at the addresses it has always had; what it holds of the log
// stays. A node alone waits, refuses, and can be stopped.
func TestRebuildOnDemand(t *testing.T) {
	all := settings(t, t.TempDir(), 3)
	var nodes []*Server
	for _, c := range all {
		nodes = append(nodes, start(t, c))
	}
	commit(t, leader(t, nodes...), 1, 42)
	note := func(c config.Config) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(c.DataDir, quarantineName), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop(t, nodes[2])
	note(all[2])
	nodes[2] = start(t, all[2])
	if got := offsets(t, nodes[2]); got[1] != 42 {
		t.Errorf("offsets of the rebuilt node: %v", got)
	}
	if q, err := readQuarantine(all[2].DataDir); q != nil || err != nil {
		t.Errorf("the note is still there: %v %v", q, err)
	}
	kept, err := filepath.Glob(filepath.Join(all[2].DataDir, keptPrefix+"*"))
	if err != nil || len(kept) != 1 {
		t.Errorf("kept %v %v", kept, err)
	}
	commit(t, leader(t, nodes...), 2, 43)
	for _, s := range nodes {
		stop(t, s)
	}

	note(all[2])
	ctx, cancel := context.WithCancel(within(t))
	done := make(chan error, 1)
	go func() { done <- Run(ctx, &all[2], Options{Logger: logTo(t)}) }()
	health := healthgrpc.NewHealthClient(dial(t, all[2].ListenAddr))
	for {
		r, err := health.Check(ctx, &healthgrpc.HealthCheckRequest{})
		if err == nil {
			if r.GetStatus() != healthgrpc.HealthCheckResponse_NOT_SERVING {
				t.Errorf("a node that waits for a state says %v", r.GetStatus())
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("a node that waits for a state was stopped: %v", err)
	}
	if q, err := readQuarantine(all[2].DataDir); q == nil || err != nil {
		t.Errorf("the note went without a rebuilding: %v %v", q, err)
	}
}
