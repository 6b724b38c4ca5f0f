package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// runRouter runs a command line in memory.
func runRouter(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = run(t.Context(), args, strings.NewReader(""), &out, &errs, nil)
	return code, out.String(), errs.String()
}

// deadAddr is an address at which nobody listens.
func deadAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// muteAddr is an address that takes connections and never says a word, as a node
// does that was stopped.
func muteAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

// Goal: a command that cannot reach a node, or is given what is not there, says which,
// why, and that nothing was done, in the words of people and with the exit code of the
// table, whatever the command is.
func TestUnreachableNodes(t *testing.T) {
	dead, mute := deadAddr(t), muteAddr(t)
	node, err := startNode(filepath.Join(t.TempDir(), "node"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = node.Stop(context.WithoutCancel(t.Context())) }()
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("kind: Nonsense\nspec: {"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		code   int
		stderr []string
	}{
		{[]string{"cluster", "members", "-s", dead}, 5, []string{dead + ": connection refused", "Nothing was done"}},
		{[]string{"backup", "restore", "x", "-t", dead, "-y"}, 5, []string{dead + ": connection refused", "Nothing was done"}},
		{[]string{"backup", "undo-restore", "-y", "--server", dead}, 5, []string{dead + ": connection refused"}},
		{[]string{"bench", "-s", dead, "--duration", "1s"}, 5, []string{dead + ": connection refused"}},
		{[]string{"operation", "list", "-s", mute, "--timeout", "2500ms"}, 5, []string{"waiting for " + mute + " to answer; giving up in 1s", mute + ": no answer", "Nothing was done"}},
		{[]string{"cluster", "status", "-s", "10.0.0.1"}, 2, []string{"has no port", "10.0.0.1:50051"}},
		{[]string{"cluster", "status", "-s", node.RaftAddr()}, 5, []string{"does not serve clients", "peer address"}},
		{[]string{"cluster", "status", "-s", dead + "," + node.Addr()}, 0, nil},
		{[]string{"cluster", "status", "-s", mute + "," + node.Addr()}, 0, nil},
		{[]string{"cluster", "transfer-leader", "7", "-s", node.Addr()}, 3, []string{"node 7 is no member of the cluster"}},
		{[]string{"member", "remove", "7", "-y", "-s", node.Addr()}, 3, []string{"node 7 is no member of the cluster"}},
		{[]string{"member", "promote", "7", "-s", node.Addr()}, 3, []string{"node 7 is no member of the cluster"}},
		{[]string{"member", "update", "7", "a:1", "-s", node.Addr()}, 3, []string{"node 7 is no member of the cluster"}},
		{[]string{"member", "replace", "1", "7", "-y", "-s", node.Addr()}, 3, []string{"node 7 is no member of the cluster"}},
		{[]string{"pipeline", "apply", "-f", bad, "-s", node.Addr()}, 2, []string{bad, "nothing was applied"}},
		{[]string{"pipeline", "apply", "-f", bad + ".gone", "-s", node.Addr()}, 2, []string{"nothing was applied"}},
		{[]string{"pipeline", "validate", "-f", bad}, 8, []string{bad}},
		{[]string{"snapshot", "restore", "--data-dir", bad + ".new", "--node-id", "9", "--peers", "1:a:1", "--peers", "2:b:1", "--peers", "3:c:1", bad}, 2,
			[]string{"--node-id 9 is none of --peers (1, 2, 3)", "nothing was made"}},
	} {
		code, _, stderr := runRouter(t, c.args...)
		if code != c.code {
			t.Errorf("%v: exit code %d, want %d: %s", c.args, code, c.code, stderr)
		}
		for _, text := range c.stderr {
			if !strings.Contains(stderr, text) {
				t.Errorf("%v: %q does not say %q", c.args, stderr, text)
			}
		}
		for _, text := range []string{"rpc error", "desc =", "transport:", "code =", "again"} {
			if strings.Contains(stderr, text) {
				t.Errorf("%v: %q says %q", c.args, stderr, text)
			}
		}
	}
}

// Goal: a command whose calls do not get through says so within two seconds, and
// then now and again; calls that take long by their nature are left alone.
func TestWaiterSaysWhatItWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		w := &waiter{a: &app{stderr: &out}}
		said := func(after time.Duration) string {
			<-time.After(after)
			synctest.Wait()
			defer out.Reset()
			return out.String()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		w.begin(ctx, "/x.Cluster/ListMembers", "passthrough:///a:1", nil)
		if got := said(2 * time.Second); got != "waiting for a:1 to answer; giving up in 58s\n" && got != "waiting for a:1 to answer; giving up in 59s\n" {
			t.Errorf("%q", got)
		}
		w.end(status.Error(codes.Unavailable, "rpc: no leader"))
		w.begin(ctx, "/x.Cluster/ListMembers", "passthrough:///a:1", nil)
		if got := said(noticeAgain); !strings.HasPrefix(got, "trying again: no leader; giving up in ") {
			t.Errorf("%q", got)
		}
		w.end(nil)
		w.begin(ctx, "/x.Cluster/WaitOperation", "passthrough:///a:1", nil)
		if got := said(time.Second * 20); got != "" {
			t.Errorf("%q", got)
		}
		w.close()
		w.begin(ctx, "/x.Cluster/ListMembers", "passthrough:///a:1", nil)
		if got := said(5 * time.Second); got != "" {
			t.Errorf("after the end: %q", got)
		}
	})
}
