package output

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
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
// goroutines. Its methods are safe for concurrent use.
type Progress struct {
	w     io.Writer
	mode  ProgressMode
	title string
	bytes bool
	now   func() time.Time
	// columns returns the width of the terminal, 0 when it is not known.
	columns func() int

	mu           sync.Mutex
	begun, drawn time.Time
	// line is what stands on the terminal, to be wiped or drawn again.
	line string
}

// NewProgress returns the progress of title, written to w. Amounts are bytes, or
// plain numbers without inBytes.
func NewProgress(w io.Writer, mode ProgressMode, title string, inBytes bool) *Progress {
	p := &Progress{w: w, mode: mode, title: title, bytes: inBytes, now: time.Now, columns: func() int { return 0 }}
	p.begun = p.now()
	p.drawn = p.begun
	return p
}

// Fit makes bars fit into the columns of the terminal: a line that wraps could
// not be wiped. columns is asked for each line; 0 is unknown.
func (p *Progress) Fit(columns func() int) { p.columns = columns }

// Set shows that done of total was reached, unless something was shown just
// before. A total of 0 is unknown.
func (p *Progress) Set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dueLocked() {
		p.draw(p.text(done, total, p.drawn))
	}
}

// Note shows text in place of amounts, at once.
func (p *Progress) Note(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode != NoProgress {
		p.draw(p.title + ": " + Clean(text))
	}
}

// Tell shows text in place of amounts, unless something was shown just before.
func (p *Progress) Tell(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dueLocked() {
		p.draw(p.title + ": " + Clean(text))
	}
}

// dueLocked reports whether it is time to show something again.
func (p *Progress) dueLocked() bool {
	interval := lineInterval
	if p.mode == BarProgress {
		interval = barInterval
	}
	now := p.now()
	if p.mode == NoProgress || now.Sub(p.drawn) < interval {
		return false
	}
	p.drawn = now
	return true
}

// Say writes a line of its own, above the bar if there is one, in any mode.
func (p *Progress) Say(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.line == "" {
		fmt.Fprintln(p.w, line)
		return
	}
	wipe := max(utf8.RuneCountInString(p.line)-utf8.RuneCountInString(line), 0)
	fmt.Fprintf(p.w, "\r%s%s\n%s", line, strings.Repeat(" ", wipe), p.line)
}

// Done ends the progress with a line that says how much it was.
func (p *Progress) Done(total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == NoProgress {
		return
	}
	took := p.now().Sub(p.begun)
	p.draw(fmt.Sprintf("%s: %s in %s (%s/s)", p.title, p.amount(total), took.Round(10*time.Millisecond), p.amount(perSecond(total, took))))
	p.endLocked()
}

// End leaves the line as it is, so that something else can be written.
func (p *Progress) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked()
}

func (p *Progress) endLocked() {
	if p.line != "" {
		fmt.Fprintln(p.w)
		p.line = ""
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
	// The last column stays free: terminals wrap when it is written.
	if room := p.columns() - 1; room > 0 && utf8.RuneCountInString(line) > room {
		line = string([]rune(line)[:room])
	}
	wipe := max(utf8.RuneCountInString(p.line)-utf8.RuneCountInString(line), 0)
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", wipe))
	p.line = line
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
