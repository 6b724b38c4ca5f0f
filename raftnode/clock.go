package raftnode

import "time"

// Clock is the only source of time of a Node. Everything that must not depend
// on the moment it runs (the log, the state) never asks it.
type Clock interface {
	// Now returns the current time; differences must be monotonic.
	Now() time.Time
	// Ticker returns a channel that receives about every d, dropping ticks
	// nobody took, and a function that stops it.
	Ticker(d time.Duration) (<-chan time.Time, func())
}

// SystemClock is the wall clock of the process.
type SystemClock struct{}

// Now implements Clock.
func (SystemClock) Now() time.Time { return time.Now() }

// Ticker implements Clock.
func (SystemClock) Ticker(d time.Duration) (<-chan time.Time, func()) {
	t := time.NewTicker(d)
	return t.C, t.Stop
}
