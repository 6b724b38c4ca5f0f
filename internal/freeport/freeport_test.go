package freeport

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Goal: a port is given once, though nobody listens on it yet, and not while somebody
// does.
func TestEachPortIsGivenOnce(t *testing.T) {
	ports, err := Take(200)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, p := range ports {
		if seen[p] || Claim(p) {
			t.Errorf("port %d was given twice", p)
		}
		seen[p] = true
	}
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	inUse := Any()
	busy, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", inUse))
	for ; err != nil; busy, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", inUse)) {
		inUse = Any()
	}
	defer busy.Close()
	if Claim(inUse) {
		t.Errorf("port %d was given while somebody listens on it", inUse)
	}
}

// Goal: nor is one given that another process was given. Method: this test in a
// process of its own.
func TestOtherProcessesAreHeard(t *testing.T) {
	if ports := os.Getenv("FREEPORT_TAKEN"); ports != "" {
		for _, text := range strings.Fields(ports) {
			var port int
			if _, err := fmt.Sscan(text, &port); err != nil || Claim(port) {
				t.Errorf("port %s of the other process was given (%v)", text, err)
			}
		}
		return
	}
	ports, err := Take(10)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestOtherProcessesAreHeard$")
	cmd.Env = append(os.Environ(), "FREEPORT_TAKEN="+strings.Trim(fmt.Sprint(ports), "[]"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
