package dev

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestRemovedNodeStaysDown: a node that says that it was removed from the cluster is
// started once, also when it says so at once, and the others go on.
func TestRemovedNodeStaysDown(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "router")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\nexit 9\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	o := &Options{Nodes: 1, DataDir: dir, Binary: binary, Respawn: time.Millisecond}
	said := make(chan string, 100)
	start := newStarter()
	defer start.close()
	n := &node{id: 1, o: o, start: start, events: newEvents(func(ev event) { said <- ev.text }), log: filepath.Join(dir, "node-1.log")}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- n.run(ctx) }()
	runs := 0
	for {
		select {
		case text := <-said:
			if strings.Contains(text, "runs, pid") {
				runs++
			}
			if !strings.Contains(text, "was removed from the cluster") {
				continue
			}
			if pid, back := n.status(); runs != 1 || pid != 0 || !back.IsZero() {
				t.Errorf("%d runs, pid %d, back at %v", runs, pid, back)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			return
		case err := <-ended:
			t.Fatalf("it ended by itself: %v", err)
		case <-time.After(30 * time.Second):
			t.Fatal("nothing was said of the removal")
		}
	}
}
