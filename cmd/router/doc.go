// Command router is the Conveyor router: the node of the metadata cluster and
// the tools of those who run it, in one binary.
//
// This package holds command definitions and wiring, no logic. What a command
// does lives in the package it is about: config (settings), server (one node),
// offline (a data directory without a node), manifest (pipeline files), output
// (tables and documents), rpc/client (calls).
//
// # Exit codes
//
//	0  done
//	1  error
//	2  wrong use: unknown command or flag, bad argument
//	3  not found
//	4  conflict: the state does not allow it, or it changed meanwhile; a node
//	   runs on the data directory
//	5  unavailable: no node answered, the cluster has no leader, or it is busy;
//	   not done
//	6  denied
//	7  deadline passed or connection broken: the outcome of a change is unknown,
//	   or the operation goes on
//	8  a check failed (config check, pipeline validate, cluster check, wal verify,
//	   state check, snap check), an operation failed, bench had failed calls, a
//	   backup or data directory is damaged
//	9  serve: the node was removed from its cluster
//	130  bench: interrupted
//
// errorCodes, statusCode and exitCode in exit.go decide them, for all commands.
package main
