package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// run1 is one measurement of one load on one system.
type run1 struct {
	Rate        float64   `json:"per_second"`
	P50         float64   `json:"p50_ms"`
	P95         float64   `json:"p95_ms"`
	P99         float64   `json:"p99_ms"`
	Max         float64   `json:"max_ms"`
	CPU         float64   `json:"servers_cpu_us_per_command"`
	CPUEach     []float64 `json:"server_cpu_us_per_command,omitempty"`
	Errors      int64     `json:"errors"`
	LastError   string    `json:"last_error,omitempty"`
	LeaderMoved bool      `json:"leader_moved,omitempty"`
}

func (r *run1) get(figure string) float64 {
	switch figure {
	case "rate":
		return r.Rate
	case "p50":
		return r.P50
	case "p99":
		return r.P99
	case "cpu":
		return r.CPU
	}
	return 0
}

// results gathers everything measured.
type results struct {
	When    time.Time `json:"when"`
	Machine string    `json:"machine"`
	Command string    `json:"command"`
	// Runs of loads by row and system, one a pair.
	Runs map[string]map[string][]run1 `json:"runs"`
	// Figures of special rows by row, system and name.
	Figures map[string]map[string]map[string]float64 `json:"figures"`
}

func newResults(o *options) *results {
	return &results{
		When: time.Now().UTC().Truncate(time.Second), Machine: machine(o.data),
		Command: command(o),
		Runs:    make(map[string]map[string][]run1), Figures: make(map[string]map[string]map[string]float64),
	}
}

func command(o *options) string {
	if rows, err := chooseRows(o.rows); err == nil && rows[0].recovery != nil {
		return fmt.Sprintf("make bench-recovery ROWS=%s OBJECTS=%d CONTENT=%s", o.rows, o.objects, o.content)
	}
	return fmt.Sprintf("make bench ROWS=%s PAIRS=%d DURATION=%v", o.rows, o.pairs, o.duration)
}

func (r *results) add(row, system string, m run1) {
	if r.Runs[row] == nil {
		r.Runs[row] = make(map[string][]run1)
	}
	r.Runs[row][system] = append(r.Runs[row][system], m)
}

func (r *results) figure(row, system, name string, v float64) {
	if r.Figures[row] == nil {
		r.Figures[row] = make(map[string]map[string]float64)
	}
	if r.Figures[row][system] == nil {
		r.Figures[row][system] = make(map[string]float64)
	}
	r.Figures[row][system][name] = v
}

// value returns a figure of a row: the median of its runs, or of a special row
// the figure itself.
func (r *results) value(row, system, figure string) (float64, bool) {
	if v, ok := r.Figures[row][system][figure]; ok {
		return v, true
	}
	runs := r.Runs[row][system]
	if len(runs) == 0 {
		return 0, false
	}
	var all []float64
	for i := range runs {
		all = append(all, runs[i].get(figure))
	}
	return median(all), true
}

// ratio returns router / etcd: the median of the ratios of the pairs, which
// were measured minutes apart at most, not the ratio of medians.
func (r *results) ratio(row, figure string) (float64, bool) {
	ours, theirs := r.Runs[row]["router"], r.Runs[row]["etcd"]
	var all []float64
	for i := range min(len(ours), len(theirs)) {
		if t := theirs[i].get(figure); t > 0 {
			all = append(all, ours[i].get(figure)/t)
		}
	}
	if len(all) > 0 {
		return median(all), true
	}
	a, ok1 := r.Figures[row]["router"][figure]
	b, ok2 := r.Figures[row]["etcd"][figure]
	return a / b, ok1 && ok2 && b > 0
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// markdown renders the table with the goals and whether they were reached.
func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s\n`%s`\n\n", r.When.Format(time.RFC3339), r.Machine, r.Command)
	b.WriteString("| load | etcd 3.7.3 | router | ratio (each pair) | goal | reached |\n|---|---|---|---|---|---|\n")
	for _, row := range allRows() {
		if r.Runs[row.name] == nil && r.Figures[row.name] == nil {
			continue
		}
		if row.load != nil {
			fmt.Fprintf(&b, "| %s | %s | %s | %s | | |\n", row.title, r.cell(row.name, "etcd"), r.cell(row.name, "router"), r.pairs(row.name))
		} else {
			fmt.Fprintf(&b, "| %s | %s | %s | | | |\n", row.title, r.special(row.name, "etcd"), r.special(row.name, "router"))
			if t := r.special(row.name, "etcd 50/300"); t != "" {
				fmt.Fprintf(&b, "| the same, etcd with 50 ms heartbeats, 300 ms election | %s | | | | |\n", t)
			}
		}
		for _, g := range row.goals {
			got, ok := r.ratio(row.name, g.figure)
			unit := "x"
			if g.absolute {
				got, ok = r.value(row.name, "router", g.figure)
				unit = ""
			}
			if !ok {
				continue
			}
			fmt.Fprintf(&b, "| &nbsp;&nbsp;%s | | | %s%s | %s | %s |\n", g.figure, number(got), unit, g.text(unit), g.verdict(got))
		}
	}
	b.WriteString("\nMedian of the pairs. CPU is user and system time of all three servers per command. rate: commands a second.\n")
	return b.String()
}

func (r *results) cell(row, system string) string {
	if len(r.Runs[row][system]) == 0 {
		return "-"
	}
	v := func(f string) float64 { x, _ := r.value(row, system, f); return x }
	out := fmt.Sprintf("%.0f/s, p50 %.2f ms, p99 %.1f ms, %.0f us CPU", v("rate"), v("p50"), v("p99"), v("cpu"))
	var errs int64
	moved := 0
	for _, m := range r.Runs[row][system] {
		errs += m.Errors
		if m.LeaderMoved {
			moved++
		}
	}
	if errs > 0 {
		out += fmt.Sprintf(", %d errors", errs)
	}
	if moved > 0 {
		out += fmt.Sprintf(", leader moved in %d", moved)
	}
	return out
}

func (r *results) pairs(row string) string {
	ours, theirs := r.Runs[row]["router"], r.Runs[row]["etcd"]
	var out []string
	for i := range min(len(ours), len(theirs)) {
		out = append(out, fmt.Sprintf("%.2f", ours[i].Rate/theirs[i].Rate))
	}
	return strings.Join(out, " ")
}

func (r *results) special(row, system string) string {
	figures := r.Figures[row][system]
	var out []string
	for name := range figures {
		out = append(out, fmt.Sprintf("%s %s", name, number(figures[name])))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 0.1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.4f", v)
}

func (g goal) text(unit string) string {
	word := "at least"
	if g.atMost {
		word = "at most"
	}
	out := fmt.Sprintf("%s %s%s", word, number(g.must), unit)
	if g.aim > 0 {
		out += fmt.Sprintf(", aim %s%s", number(g.aim), unit)
	}
	return out
}

func (g goal) verdict(got float64) string {
	reaches := func(bound float64) bool {
		if g.atMost {
			return got <= bound
		}
		return got >= bound
	}
	switch {
	case !reaches(g.must):
		return fmt.Sprintf("no, %.0f %% off", 100*max(got/g.must, g.must/got)-100)
	case g.aim > 0 && reaches(g.aim):
		return "yes, with the aim"
	}
	return "yes"
}

func (r *results) write(dir string) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "results.json"), append(raw, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, "results.md"), []byte(r.markdown()), 0o644))
}

// machine describes where this ran.
func machine(dir string) string {
	model := "unknown processor"
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for l := range strings.Lines(string(raw)) {
			if name, v, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	memory := ""
	if raw, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kb int64
		if _, err := fmt.Sscanf(string(raw), "MemTotal: %d kB", &kb); err == nil {
			memory = fmt.Sprintf(", %d GB", kb/1_000_000)
		}
	}
	kernel := ""
	if out, err := exec.Command("uname", "-sr").Output(); err == nil {
		kernel = ", " + strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%d x %s%s%s, %s", runtime.NumCPU(), model, memory, kernel, runtime.Version())
}
