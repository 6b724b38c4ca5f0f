package raftnode

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"syscall"
	"testing"
	"time"
)

func (h *harness) truncate() uint64 {
	h.t.Helper()
	if _, err := h.truncator.step(h.clock.Now()); err != nil {
		h.t.Fatal(err)
	}
	first, _ := h.log.FirstIndex()
	return first
}

func filled(t *testing.T, n int) *harness {
	t.Helper()
	h := newHarness(t, 1, func(c *Config) {
		c.TailBytes, c.TrailingBytes = 2000, 1000
		c.FollowerTailBytes, c.PinnedTailBytes = 5000, 10000
	}, 1)
	h.campaign()
	h.settle()
	h.fill(n)
	return h
}

func (h *harness) fill(n int) {
	for i := range n {
		a := h.propose(fmt.Sprintf("%0100d", i))
		h.settle()
		a.mustBe(h.t, true, nil)
	}
}

// The log is cut to about TrailingBytes, only behind durable state.
func TestTruncateKeepsTrailingBytes(t *testing.T) {
	h := filled(t, 5)
	if h.truncate() != 2 {
		t.Fatal("truncated below TailBytes")
	}
	h.fill(15)
	first := h.truncate()
	if b := h.log.Bytes(); first == 2 || b > 1000+240 || b < 1000-240 {
		t.Fatalf("log begins at %d and holds %d bytes", first, b)
	}
	if d := h.sm.Durable(); d < first-1 {
		t.Fatalf("log begins at %d, durable is %d", first, d)
	}
	// It can be restarted from what is left.
	want := len(h.sm.commands())
	h.crash(0)
	h.campaign()
	h.settle()
	if got := len(h.sm.commands()); got != want {
		t.Fatalf("%d commands after a crash, want %d", got, want)
	}
}

func TestTruncateRespectsPins(t *testing.T) {
	h := filled(t, 20)
	h.snaps.sending[4] = 1
	if first := h.truncate(); first != 5 {
		t.Fatalf("log begins at %d, pinned at 4", first)
	}
	h.fill(60) // beyond PinnedTailBytes
	if first := h.truncate(); first < 50 {
		t.Fatalf("log begins at %d: a pin holds it beyond all bounds", first)
	}

	h = filled(t, 12)
	h.loop.followerFloor.Store(6)
	if first := h.truncate(); first != 7 {
		t.Fatalf("log begins at %d, a follower needs 7", first)
	}
	h.loop.followerFloor.Store(6)
	h.fill(40) // beyond FollowerTailBytes
	h.loop.followerFloor.Store(6)
	if first := h.truncate(); first < 30 {
		t.Fatalf("log begins at %d: a follower holds it beyond all bounds", first)
	}

	h = filled(t, 20)
	h.loop.followerFloor.Store(math.MaxUint64)
	h.loop.acked.Store(5)
	if first := h.truncate(); first != 6 {
		t.Fatalf("log begins at %d, raft has heard of 5 applied entries", first)
	}
}

// A full disk is no reason to stop: the log stays as it is until there is space.
func TestTruncateDiskFull(t *testing.T) {
	h := filled(t, 20)
	h.sm.fail = failOn("flush", fmt.Errorf("no space left for the state: %w", syscall.ENOSPC))
	if first := h.truncate(); first != 2 {
		t.Fatalf("log begins at %d, of a state that is not durable", first)
	}
	h.sm.fail = nil
	h.fill(20)
	if first := h.truncate(); first == 2 {
		t.Fatal("not truncated although there is space again")
	}
}

func TestTruncateFlushFails(t *testing.T) {
	h := filled(t, 20)
	boom := errors.New("disk on fire")
	h.sm.fail = failOn("flush", boom)
	if _, err := h.truncator.step(time.Time{}); !errors.Is(err, boom) {
		t.Fatalf("got %v", err)
	}
	if first, _ := h.log.FirstIndex(); first != 2 {
		t.Fatalf("the log was cut to %d", first)
	}
}

func TestConfigValidate(t *testing.T) {
	if err := (&Config{ID: 1}).EnsureDefaults().Validate(); err != nil {
		t.Fatal(err)
	}
	bad := (&Config{ElectionTicks: 3, StallFail: 1, TrailingBytes: 1 << 40}).EnsureDefaults()
	err := bad.Validate()
	for _, want := range []string{"ID 0", "ElectionTicks 3", "StallFail", "TrailingBytes"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not mention %s", err, want)
		}
	}
}
