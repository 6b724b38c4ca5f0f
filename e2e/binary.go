package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// builds holds the binaries built for this run of the tests.
var builds struct {
	sync.Mutex
	dir   string
	byTag map[string]string
}

// binary returns the router under test: CONVEYOR_E2E_BIN when set, else one
// built from this checkout.
func binary(t testing.TB) string {
	t.Helper()
	if b := os.Getenv("CONVEYOR_E2E_BIN"); b != "" {
		return b
	}
	return build(t, "")
}

// binaryOf returns what n runs.
func binaryOf(n *Node) string {
	if n.bin != "" {
		return n.bin
	}
	return binary(n.t)
}

// crashBinary returns a router that can be told where to die, see package
// crashpoint: CONVEYOR_E2E_CRASH_BIN when set, else one built from this checkout.
func crashBinary(t testing.TB) string {
	t.Helper()
	if b := os.Getenv("CONVEYOR_E2E_CRASH_BIN"); b != "" {
		return b
	}
	return build(t, "crashpoints")
}

func build(t testing.TB, tag string) string {
	t.Helper()
	builds.Lock()
	defer builds.Unlock()
	if b, ok := builds.byTag[tag]; ok {
		return b
	}
	if builds.dir == "" {
		dir, err := os.MkdirTemp("", "conveyor-router-e2e")
		if err != nil {
			t.Fatal(err)
		}
		builds.dir, builds.byTag = dir, map[string]string{}
	}
	bin := filepath.Join(builds.dir, "router"+tag)
	out, err := exec.Command("go", "build", "-tags", tag, "-o", bin, "conveyor.etl/router/cmd/router").CombinedOutput()
	if err != nil {
		t.Fatal(fmt.Errorf("building the router: %w\n%s", err, strings.TrimSpace(string(out))))
	}
	builds.byTag[tag] = bin
	return bin
}

func removeBuilds() {
	if builds.dir != "" {
		os.RemoveAll(builds.dir)
	}
}
