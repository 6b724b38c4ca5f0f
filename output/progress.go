package output

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// The ways a Progress can be shown.
const (
	NoProgress   ProgressMode = iota // for programs that read the result
	LineProgress                     // a line now and then, for logs
	BarProgress                      // one line that is drawn again, for terminals
)

// ProgressMode is how a Progress is shown.
type ProgressMode int

const (
	barInterval  = 100 * time.Millisecond
	lineInterval = 5 * time.Second
	barWidth     = 24
)

// Progress shows how far something is. It draws when it is told, and starts no
// goroutines. It is for one caller at a time.
type Progress struct {
	w     io.Writer
	mode  ProgressMode
	title string
	bytes bool
	now   func() time.Time

	begun, drawn time.Time
	// width is that of the line on the terminal, to be wiped.
	width int
}

// NewProgress returns the progress of title, written to w. Amounts are bytes, or
// plain numbers without inBytes.
func NewProgress(w io.Writer, mode ProgressMode, title string, inBytes bool) *Progress {
	p := &Progress{w: w, mode: mode, title: title, bytes: inBytes, now: time.Now}
	p.begun = p.now()
	p.drawn = p.begun
	return p
}

// Set shows that done of total was reached, unless something was shown just
// before. A total of 0 is unknown.
func (p *Progress) Set(done, total int64) {
	interval := lineInterval
	if p.mode == BarProgress {
		interval = barInterval
	}
	now := p.now()
	if p.mode == NoProgress || now.Sub(p.drawn) < interval {
		return
	}
	p.drawn = now
	p.draw(p.text(done, total, now))
}

// Note shows text in place of amounts, at once.
func (p *Progress) Note(text string) {
	if p.mode != NoProgress {
		p.draw(p.title + ": " + Clean(text))
	}
}

// Done ends the progress with a line that says how much it was.
func (p *Progress) Done(total int64) {
	if p.mode == NoProgress {
		return
	}
	took := p.now().Sub(p.begun)
	p.draw(fmt.Sprintf("%s: %s in %s (%s/s)", p.title, p.amount(total), took.Round(10*time.Millisecond), p.amount(perSecond(total, took))))
	p.End()
}

// End leaves the line as it is, so that something else can be written.
func (p *Progress) End() {
	if p.mode == BarProgress && p.width > 0 {
		fmt.Fprintln(p.w)
		p.width = 0
	}
}

func (p *Progress) text(done, total int64, now time.Time) string {
	took := now.Sub(p.begun)
	rate := perSecond(done, took)
	if total <= 0 {
		return fmt.Sprintf("%s: %s, %s/s", p.title, p.amount(done), p.amount(rate))
	}
	done = min(done, total)
	left := "-"
	if done > 0 {
		left = time.Duration(float64(took) * float64(total-done) / float64(done)).Round(time.Second).String()
	}
	share := float64(done) / float64(total)
	bar := ""
	if p.mode == BarProgress {
		n := int(share * barWidth)
		bar = "[" + strings.Repeat("=", n) + strings.Repeat(" ", barWidth-n) + "] "
	}
	return fmt.Sprintf("%s: %s%3.0f%% %s of %s, %s/s, %s left", p.title, bar, 100*share, p.amount(done), p.amount(total), p.amount(rate), left)
}

func (p *Progress) draw(line string) {
	if p.mode == LineProgress {
		fmt.Fprintln(p.w, line)
		return
	}
	wipe := max(p.width-len(line), 0)
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", wipe))
	p.width = len(line)
}

func perSecond(n int64, d time.Duration) int64 {
	if d < time.Millisecond {
		return n
	}
	return int64(float64(n) / d.Seconds())
}

func (p *Progress) amount(n int64) string {
	if p.bytes {
		return Bytes(n)
	}
	return fmt.Sprint(n)
}

// Bytes shows a size for people: 1.5 MiB.
func Bytes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n), -1
	for v >= 1<<10 && unit < 5 {
		v /= 1 << 10
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", v, "KMGTPE"[unit])
}
