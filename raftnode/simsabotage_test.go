package raftnode

import (
	"slices"
	"testing"
)

// TestSimulationNoticesSabotage breaks, one at a time, what raftnode has to rely
// on, or what it promises, and demands that the oracle notices. Where a check
// close to the damage would notice at once, it is blinded too, to see that the
// consequences are noticed as well.
func TestSimulationNoticesSabotage(t *testing.T) {
	const seeds = 400
	for _, c := range []struct {
		name string
		sab  sabotage
		want []string
	}{
		{"the log acknowledges before it is synced", sabotage{ackBeforeSync: true}, []string{"promises", "durability"}},
		{"the log acknowledges before it is synced, promises unchecked", sabotage{ackBeforeSync: true, blind: []string{"promises"}},
			[]string{"durability", "leader completeness"}},
		{"the log acknowledges before it is synced, seen by its consequences alone",
			sabotage{ackBeforeSync: true, blind: []string{"promises", "durability"}},
			[]string{"leader completeness", "election safety", "state equality", "start", "failure"}},
		{"what a killed process had not synced counts as stored when the log is opened again", sabotage{openWithoutSync: true},
			[]string{"promises", "durability"}},
		{"the log forgets votes", sabotage{forgetVotes: true}, []string{"promises"}},
		{"the log forgets votes, promises unchecked", sabotage{forgetVotes: true, blind: []string{"promises"}},
			[]string{"election safety", "log matching"}},
		{"the durable index lies", sabotage{durableLies: true}, []string{"start"}},
		{"an installed state is lost in a crash, and the image too", sabotage{installForgets: true}, []string{"start"}},
		{"a node comes back with an empty disk", sabotage{diskSwapped: true},
			[]string{"leader completeness", "durability", "election safety", "state equality", "start", "failure"}},
		{"answers of the disk reach the next incarnation", sabotage{ghostAnswers: true},
			[]string{"failure", "durability", "promises", "leader completeness", "state equality"}},
		{"acknowledgements count for another node", sabotage{forgeSender: true}, []string{"durability", "failure"}},
		{"entries change on the way", sabotage{garbleEntries: true}, []string{"log matching", "failure"}},
		{"one state machine swaps commands", sabotage{applyOrder: true}, []string{"state equality"}},
		{"a command is proposed twice", sabotage{proposeTwice: true}, []string{"exactly once"}},
		{"unknown outcomes are reported as not done", sabotage{lieRefused: true}, []string{"definite errors"}},
		{"reads ask nobody", sabotage{staleReads: true}, []string{"linearizability"}},
		{"one node stays cut off", sabotage{neverHeal: true}, []string{"liveness"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for seed := uint64(1); seed <= seeds; seed++ {
				s := runSeed(seed, c.sab)
				if s.violation == nil {
					continue
				}
				if !slices.Contains(c.want, s.kind) {
					t.Fatalf("seed %d: noticed as %v, want one of %q", seed, s.violation, c.want)
				}
				t.Logf("seed %d: %.200v", seed, s.violation)
				return
			}
			t.Fatalf("nothing noticed in %d seeds", seeds)
		})
	}
}
