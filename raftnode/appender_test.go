package raftnode

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
)

func entry(index, term uint64, data string) *raftpb.Entry {
	return &raftpb.Entry{Index: new(index), Term: new(term), Data: []byte(data)}
}

func storageAppend(ents []*raftpb.Entry, hs *raftpb.HardState, resps ...*raftpb.Message) *raftpb.Message {
	m := &raftpb.Message{Type: raftpb.MsgStorageAppend.Enum(), To: new(raft.LocalAppendThread), Entries: ents, Responses: resps}
	if hs != nil {
		m.Term, m.Vote, m.Commit = new(hs.GetTerm()), new(hs.GetVote()), new(hs.GetCommit())
	}
	return m
}

func hard(term, vote, commit uint64) *raftpb.HardState {
	return &raftpb.HardState{Term: new(term), Vote: new(vote), Commit: new(commit)}
}

func resp(to, index uint64) *raftpb.Message {
	return &raftpb.Message{Type: raftpb.MsgAppResp.Enum(), From: new(uint64(1)), To: new(to), Index: new(index)}
}

// Several messages become one append with one sync, in order, later runs
// overwriting earlier ones, and the answers keep their order.
func TestAppenderCoalesces(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	// Raft hands out a window of its own array, with room behind it.
	window := make([]*raftpb.Entry, 2, 8)
	window[0], window[1] = entry(2, 2, "a"), entry(3, 2, "b")
	var sizes []int
	h.Node.cfg.Events.AppendSynced = func(_ time.Duration, n int, _ int64) { sizes = append(sizes, n) }
	h.appendQ.push(storageAppend(window, hard(2, 0, 1), resp(2, 3)))
	h.appendQ.push(storageAppend([]*raftpb.Entry{entry(3, 3, "c"), entry(4, 3, "d")}, nil, resp(1, 4)))
	h.appendQ.push(storageAppend(nil, hard(3, 3, 2), resp(3, 4), resp(1, 5)))
	h.appendStep()
	if h.log.syncs != 1 || len(sizes) != 1 || sizes[0] != 4 {
		t.Fatalf("%d syncs of %v entries", h.log.syncs, sizes)
	}
	if rest := window[:cap(window)]; rest[2] != nil {
		t.Fatal("raft's array was written to")
	}
	if term, _ := h.log.Term(3); term != 3 || h.log.last() != 4 {
		t.Fatalf("log ends at %d, entry 3 has term %d", h.log.last(), term)
	}
	if h.log.hs.GetVote() != 3 || h.log.hs.GetCommit() != 2 {
		t.Fatalf("hard state %v", h.log.hs)
	}
	var order []uint64
	for _, m := range h.tr.take() {
		order = append(order, m.GetTo())
	}
	if fmt.Sprint(order) != "[2 3]" {
		t.Fatalf("answers to peers %v", order)
	}
	if in := h.inbox.in.local; len(in) != 2 || in[0].GetIndex() != 4 || in[1].GetIndex() != 5 {
		t.Fatalf("own answers %v", in)
	}
}

// An fsync is made exactly when an answer rests on something not yet synced.
func TestAppenderSyncsWhenNeeded(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	want := 0
	step := func(what string, sync bool, m *raftpb.Message) {
		t.Helper()
		if sync {
			want++
		}
		h.appendQ.push(m)
		h.appendStep()
		if h.log.syncs != want {
			t.Fatalf("%s: %d syncs, want %d", what, h.log.syncs, want)
		}
	}
	step("entries", true, storageAppend([]*raftpb.Entry{entry(2, 2, "a")}, hard(2, 0, 1), resp(2, 2)))
	step("commit alone", false, storageAppend(nil, hard(2, 0, 2)))
	step("commit with an answer about synced entries", false, storageAppend(nil, hard(2, 0, 2), resp(2, 2)))
	step("a new term nobody is told of", false, storageAppend(nil, hard(3, 0, 2)))
	step("an answer that rests on that term", true, storageAppend(nil, nil, resp(2, 2)))
	step("an answer alone", false, storageAppend(nil, nil, resp(2, 2)))
	step("a vote", true, storageAppend(nil, hard(3, 2, 2), resp(2, 0)))
	if h.log.hs.GetCommit() != 2 || h.log.hs.GetVote() != 2 {
		t.Fatalf("hard state %v", h.log.hs)
	}
	// Each answer left, synced or not.
	if n := len(h.tr.take()); n != 5 {
		t.Fatalf("%d answers left, want 5", n)
	}
}

// A failed append is final: no answer leaves.
func TestAppenderFailure(t *testing.T) {
	h := newHarness(t, 1, nil, 1, 2, 3)
	boom := errors.New("disk on fire")
	h.log.fail = func(string) error { return boom }
	h.appendQ.push(storageAppend([]*raftpb.Entry{entry(2, 2, "a")}, hard(2, 0, 1), resp(2, 2), resp(1, 2)))
	if _, err := h.appender.step(); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if len(h.tr.take()) != 0 || len(h.inbox.in.local) != 0 {
		t.Fatal("an answer left after a failed write")
	}
}
