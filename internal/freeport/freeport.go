// Package freeport finds ports for the nodes of tests, which have to know each
// other's addresses before they listen and come back to them when they are started
// again.
//
// Asking the kernel for a free port would give one of those that it also gives to
// outgoing connections: while a node is down, between its death and its next start,
// a connection of any process on this machine may take it, and the node cannot start
// ("address already in use"). So they lie below that range. Looking whether somebody
// listens is not enough either: two tests, or two nodes of one, may be given a port
// before either of them listens. So each is claimed for as long as the process lives,
// by its namesake of UDP, which nobody else here uses.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
)

// first is the lowest port that is given.
const first = 10000

var claims struct {
	sync.Mutex
	held []net.PacketConn
}

// Take returns n ports of the loopback address on which nobody listens, and which
// nobody is given while this process lives, tests of other processes included. It is
// safe for concurrent use.
func Take(n int) ([]int, error) {
	var ports []int
	for range 1000 * n {
		if len(ports) == n {
			return ports, nil
		}
		if port := Any(); Claim(port) {
			ports = append(ports, port)
		}
	}
	return nil, fmt.Errorf("freeport: no %d free ports from %d to %d", n, first, ephemeralStart())
}

// Addr returns the address of one port, as Take does.
func Addr() (string, error) {
	ports, err := Take(1)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0]), nil
}

// Any returns a port that Take could return, without a claim: where a block of them
// may begin.
func Any() int { return first + rand.IntN(ephemeralStart()-first) }

// Claim takes all of ports, as Take does, or none of them and returns false.
func Claim(ports ...int) bool {
	claims.Lock()
	defer claims.Unlock()
	if slices.Min(ports) < first || slices.Max(ports) >= ephemeralStart() {
		return false
	}
	var held []net.PacketConn
	for _, port := range ports {
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		claim, err := net.ListenPacket("udp", addr)
		if err == nil {
			held = append(held, claim)
			var l net.Listener
			if l, err = net.Listen("tcp", addr); err == nil {
				err = l.Close()
			}
		}
		if err != nil {
			for _, c := range held {
				c.Close()
			}
			return false
		}
	}
	claims.held = append(claims.held, held...)
	return true
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
