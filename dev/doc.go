// Package dev runs a complete cluster on this machine for people to look at:
// nodes as child processes with real disks, the example pipelines, and a
// handful of demo sidecars that speak the same RPCs as those of the field.
//
// Nothing is pretended. The nodes are `router serve` of the same binary, the
// picture is drawn from what the API answers, and a node that is killed is
// really dead. What differs from production is said in the picture: everything
// on loopback, and leases of seconds instead of half a minute, so that what
// happens after a loss can be watched.
//
// # Goroutines
//
// Run owns all of them and returns after they and all child processes have
// ended. Children die with this process, even when it is killed: the kernel
// sends them SIGKILL (PR_SET_PDEATHSIG). That signal follows the death of the
// thread that started the child, so one thread starts all of them and lives as
// long as Run; see starter.
package dev
