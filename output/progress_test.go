package output

import (
	"strings"
	"testing"
	"time"
)

func newTestProgress(mode ProgressMode, bytes bool) (*Progress, *strings.Builder, *time.Time) {
	var out strings.Builder
	now := time.Unix(1000, 0)
	p := NewProgress(&out, mode, "upload", bytes)
	p.now = func() time.Time { return now }
	p.begun, p.drawn = now, now
	return p, &out, &now
}

func TestProgress(t *testing.T) {
	for _, c := range []struct {
		mode ProgressMode
		want string
	}{
		{NoProgress, ""},
		{LineProgress, "upload:  50% 10.0 MiB of 20.0 MiB, 1.0 MiB/s, 10s left\nupload: 20.0 MiB in 20s (1.0 MiB/s)\n"},
		{BarProgress, "\rupload: [============            ]  50% 10.0 MiB of 20.0 MiB, 1.0 MiB/s, 10s left" +
			"\rupload: 20.0 MiB in 20s (1.0 MiB/s)" + strings.Repeat(" ", 46) + "\n"},
	} {
		p, out, now := newTestProgress(c.mode, true)
		p.Set(1, 20<<20) // too soon
		*now = now.Add(10 * time.Second)
		p.Set(10<<20, 20<<20)
		p.Set(10<<20+1, 20<<20) // too soon
		*now = now.Add(10 * time.Second)
		p.Done(20 << 20)
		if out.String() != c.want {
			t.Errorf("mode %d:\n%q, want\n%q", c.mode, out, c.want)
		}
	}
	p, out, now := newTestProgress(LineProgress, false)
	*now = now.Add(10 * time.Second)
	p.Set(500, 0)
	p.Note("swap\x1b[2J")
	if want := "upload: 500, 50/s\nupload: swap?[2J\n"; out.String() != want {
		t.Errorf("%q, want %q", out, want)
	}
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 << 30: "5.0 GiB", 1<<63 - 1: "8.0 EiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
