package fleet

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Figure is one measured number.
type Figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
}

// Section is what one scenario brought.
type Section struct {
	Scenario string   `json:"scenario"`
	Seconds  float64  `json:"seconds"`
	Figures  []Figure `json:"figures"`
	// Faults are what must not happen: lost leases, refused heartbeats, a watch
	// that broke its promise, a sidecar that was told something else than the
	// cluster holds. At most some of each kind are listed.
	Faults []string `json:"faults,omitempty"`
	Notes  []string `json:"notes,omitempty"`
}

func (s *Section) figure(name string, value float64, unit string) {
	s.Figures = append(s.Figures, Figure{name, value, unit})
}

func (s *Section) millis(name string, d time.Duration) {
	s.figure(name, float64(d.Microseconds())/1000, "ms")
}

// quantiles adds the figures of a histogram, none when it is empty.
func (s *Section) quantiles(name string, l *latencies) {
	if l.count() == 0 {
		return
	}
	s.millis(name+", p50", l.at(50))
	s.millis(name+", p99", l.at(99))
	s.millis(name+", max", l.max())
}

func (s *Section) fault(format string, args ...any) {
	s.Faults = append(s.Faults, fmt.Sprintf(format, args...))
}

// Report is the outcome of one run, as printed and as JSON.
type Report struct {
	Config   Config     `json:"config"`
	Sections []*Section `json:"scenarios"`
	// Interrupted names the scenario in which the run was ended. Of others than the
	// steady one there are no figures then.
	Interrupted string `json:"interrupted,omitempty"`
}

// soFar returns what r has of a run that was ended by ctx; nil when it was not, or
// when nothing was measured.
func (r *Report) soFar(ctx context.Context) *Report {
	if ctx.Err() == nil || len(r.Sections) == 0 {
		return nil
	}
	r.Interrupted = r.Sections[len(r.Sections)-1].Scenario
	r.Sections = slices.DeleteFunc(r.Sections, func(s *Section) bool { return s.Seconds == 0 })
	if len(r.Sections) == 0 {
		return nil
	}
	return r
}

// Failed says whether anything happened that must not.
func (r *Report) Failed() bool {
	for _, s := range r.Sections {
		if len(s.Faults) > 0 {
			return true
		}
	}
	return false
}

// Text writes r for people.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	c := &r.Config
	fmt.Fprintf(&b, "%d sidecars, %d of them watching, %d pipelines, %d connections to %s; seed %d\n",
		c.Sidecars, c.Watchers, c.Pipelines, c.Connections, strings.Join(c.Endpoints, " "), c.Seed)
	for _, s := range r.Sections {
		fmt.Fprintf(&b, "\n%s  (%.1f s)\n", s.Scenario, s.Seconds)
		for _, f := range s.Figures {
			fmt.Fprintf(&b, "  %-46s %12s %s\n", f.Name, number(f.Value), f.Unit)
		}
		for _, n := range s.Notes {
			fmt.Fprintf(&b, "  note: %s\n", n)
		}
		for _, f := range s.Faults {
			fmt.Fprintf(&b, "  FAULT: %s\n", f)
		}
	}
	if r.Interrupted != "" {
		fmt.Fprintf(&b, "\ninterrupted in %q, before the end\n", r.Interrupted)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// number prints whole numbers whole and others with as many digits as count.
func number(v float64) string {
	switch {
	case v == float64(int64(v)):
		return strconv.FormatInt(int64(v), 10)
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}
