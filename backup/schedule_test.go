package backup

import (
	"math/rand/v2"
	"testing"
	"time"
)

func at(text string) time.Time {
	t, err := time.Parse("2006-01-02 15:04:05", "2026-03-"+text)
	if err != nil {
		panic(err)
	}
	return t
}

func TestScheduleNext(t *testing.T) {
	daily := Schedule{Every: 24 * time.Hour, Dest: "/backups"}
	hour := time.Hour
	for _, c := range []struct {
		name   string
		now    string
		h      History
		jitter time.Duration
		want   string
	}{
		{"none before", "10 12:00:00", History{}, hour, "10 12:00:00"},
		{"yesterday's", "10 12:00:00", History{Last: at("10 01:00:05")}, hour, "11 01:00:00"},
		{"took a while, no drift", "10 12:00:00", History{Last: at("10 03:40:00")}, hour, "11 01:00:00"},
		{"missed while down", "15 12:00:00", History{Last: at("10 01:00:00")}, hour, "11 01:00:00"},
		{"just before its time", "10 00:59:59", History{Last: at("10 00:59:58")}, hour, "11 01:00:00"},
		{"from the future", "10 12:00:00", History{Last: at("12 01:00:00")}, hour, "11 01:00:00"},
		{"failed once", "10 01:00:30", History{Last: at("09 01:00:00"), Failed: at("10 01:00:20"), Failures: 1}, hour, "10 01:01:20"},
		{"failed thrice", "10 01:10:00", History{Last: at("09 01:00:00"), Failed: at("10 01:09:00"), Failures: 3}, hour, "10 01:13:00"},
		{"fails for long", "10 12:00:00", History{Last: at("01 01:00:00"), Failed: at("10 11:59:00"), Failures: 99}, hour, "10 12:59:00"},
		{"never beyond the grid", "10 00:50:00", History{Last: at("01 01:00:00"), Failed: at("10 00:50:00"), Failures: 99}, hour, "10 01:00:00"},
		{"first one failed", "10 12:00:00", History{Failed: at("10 11:59:30"), Failures: 1}, hour, "10 12:00:30"},
		{"failed before the last", "10 12:00:00", History{Last: at("10 02:00:00"), Failed: at("10 01:00:00"), Failures: 1}, hour, "11 01:00:00"},
		{"failed in the future", "10 12:00:00", History{Last: at("09 02:00:00"), Failed: at("20 01:00:00"), Failures: 1}, hour, "10 12:01:00"},
	} {
		now := at(c.now)
		if got := daily.Next(now, c.h, c.jitter); !got.Equal(at(c.want)) {
			t.Errorf("%s: next is %s, want %s", c.name, got.Format(time.DateTime), at(c.want).Format(time.DateTime))
		}
	}
}

// Whoever follows the plan makes one backup per slot, neither two nor none,
// and a new leader plans what the old one did.
func TestScheduleIsFollowed(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		s := Schedule{Every: time.Duration(1+rng.IntN(50)) * time.Hour, Dest: "/b"}
		jitter := s.Jitter(string(rune('a' + rng.IntN(26))))
		if jitter < 0 || jitter >= s.Every/10 {
			t.Fatalf("jitter %s of %s", jitter, s.Every)
		}
		now := at("10 00:00:00").Add(time.Duration(rng.Int64N(int64(100 * time.Hour))))
		var h History
		slots := map[time.Time]int{}
		for range 20 {
			next := s.Next(now, h, jitter)
			if again := s.Next(now.Add(time.Second), h, jitter); !h.Last.IsZero() && !again.Equal(next) {
				t.Fatalf("planned %s, and a second later %s", next, again)
			}
			if next.After(now) {
				now = next
			}
			h = History{Last: now.Add(time.Duration(rng.Int64N(int64(s.Every / 20))))}
			slots[s.slot(h.Last, jitter)]++
			now = h.Last.Add(time.Duration(rng.Int64N(int64(s.Every / 20))))
		}
		for slot, n := range slots {
			if n > 1+1 { // the first one may come at any time
				t.Fatalf("%d backups before %s (every %s)", n, slot, s.Every)
			}
		}
	}
}

func TestScheduleValidate(t *testing.T) {
	if err := (Schedule{}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (Schedule{Every: time.Hour, Dest: "s3://bucket/x", Keep: 3}).Validate(); err != nil {
		t.Error(err)
	}
	for _, s := range []Schedule{
		{Every: time.Second, Dest: "/b"}, {Every: -1, Dest: "/b"}, {Every: 10_000 * time.Hour, Dest: "/b"},
		{Every: time.Hour}, {Every: time.Hour, Dest: "/b", Keep: -1}, {Keep: 3}, {Dest: "/b"},
		{Every: time.Hour, Dest: "ftp://x"}, {Every: time.Hour, Dest: "/b", Keep: 1 << 30},
	} {
		if s.Validate() == nil {
			t.Errorf("%+v was accepted", s)
		}
	}
}
