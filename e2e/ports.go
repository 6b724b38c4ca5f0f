package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
)

// claims holds the ports that tests of this process were given, for as long as it
// lives.
var claims struct {
	sync.Mutex
	held []net.Listener
}

// freePorts returns n ports on which nobody listens, and which nobody is given while
// the process of the test lives, other test processes included.
//
// Asking the kernel for a free port would give one of those that it also gives to
// outgoing connections: while a node is down, between its death and its next start,
// a connection of any process on this machine may take it, and the node cannot start
// ("address already in use"). So they lie below that range, and who uses one says so
// to the others by a name of its own in the abstract namespace of sockets, which ends
// with the process.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	const first = 10000
	end := ephemeralStart()
	claims.Lock()
	defer claims.Unlock()
	var ports []int
	for range 1000 * n {
		if len(ports) == n {
			return ports
		}
		port := first + rand.IntN(end-first)
		claim, err := net.Listen("unix", fmt.Sprintf("@conveyor-router-e2e-port-%d", port))
		if err != nil {
			continue // another test's
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			claim.Close() // that of something else
			continue
		}
		l.Close()
		claims.held = append(claims.held, claim)
		ports = append(ports, port)
	}
	t.Fatalf("no %d free ports from %d to %d", n, first, end)
	return nil
}

// ephemeralStart is where the ports begin that outgoing connections are given.
func ephemeralStart() int {
	const usual = 32768
	raw, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	var low int
	if _, serr := fmt.Sscan(string(raw), &low); err != nil || serr != nil || low < 20000 || low > usual {
		return usual
	}
	return low
}
