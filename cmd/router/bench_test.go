package main

import (
	"bytes"
	"context"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// Goal: who ends a bench with Ctrl-C gets the figures of what was measured until then,
// is told if that is nothing, and sees in the exit code that it was ended. Method: the
// context of the command is cancelled, as the signal does, once the node has taken
// enough commits.
func TestInterruptedBench(t *testing.T) {
	s, err := startNode(filepath.Join(t.TempDir(), "node"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("passthrough:///"+s.Addr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	revision := func() uint64 {
		st, err := adminpb.NewRouterAdminClient(conn).GetClusterStatus(t.Context(), &adminpb.GetClusterStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return st.GetRevision()
	}
	bench := func(args ...string) (code int, stdout, stderr string) {
		t.Helper()
		ctx, interrupt := context.WithCancel(t.Context())
		defer interrupt()
		before := revision()
		var out, errs bytes.Buffer
		ended := make(chan int, 1)
		go func() {
			ended <- run(ctx, append([]string{"bench", "-s", s.Addr(), "--clients", "4", "--conns", "1"}, args...), strings.NewReader(""), &out, &errs, nil)
		}()
		for revision() < before+100 {
			select {
			case code = <-ended:
				t.Fatalf("it ended by itself: %d\n%s%s", code, &out, &errs)
			case <-time.After(10 * time.Millisecond):
			}
		}
		interrupt()
		code = <-ended
		return code, out.String(), errs.String()
	}
	code, out, errs := bench("--warmup", "0s", "--duration", "1h")
	measured := regexp.MustCompile(`(?s)interrupted after \d+\.\d s of 3600\.0 s.*throughput +\d+ commands/s \([1-9]\d* in .*latency`)
	if code != exitInterrupted || !measured.MatchString(out) || strings.Contains(out, "errors") || !strings.Contains(errs, "until then") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
	code, out, errs = bench("--warmup", "0s", "--duration", "1h", "-o", "json")
	if code != exitInterrupted || !strings.Contains(out, `"interrupted": true`) {
		t.Errorf("as a document, exit code %d\n%s%s", code, out, errs)
	}
	code, out, errs = bench("--warmup", "1h")
	if code != exitInterrupted || out != "" || !strings.Contains(errs, "interrupted before anything was measured") {
		t.Errorf("in the warm-up, exit code %d\n%s%s", code, out, errs)
	}
	code, out, errs = bench("--fill", "--keys", "100000000")
	if code != exitInterrupted || out != "" || !strings.Contains(errs, "interrupted before anything was measured") {
		t.Errorf("while ids are filled, exit code %d\n%s%s", code, out, errs)
	}
}
