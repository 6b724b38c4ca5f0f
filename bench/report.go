package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"time"
)

// Report is the outcome of one run, as printed and as JSON.
type Report struct {
	Config    Config  `json:"config"`
	Loop      string  `json:"loop"` // "closed", "open" or "stream"
	Seconds   float64 `json:"seconds"`
	Commands  int64   `json:"commands"`
	Calls     int64   `json:"calls"`
	Errors    int64   `json:"errors"`
	LastError string  `json:"last_error,omitempty"`
	// Unanswered of the errors had no answer when the run ended, after a second or more.
	Unanswered int64 `json:"unanswered,omitempty"`
	// Interrupted says that the run was ended before its time; Seconds is what was
	// measured of Config.Duration.
	Interrupted bool `json:"interrupted,omitempty"`
	// Unsent calls of an open loop were due and had no free client.
	Unsent     int64   `json:"unsent,omitempty"`
	Throughput float64 `json:"commands_per_second"`
	// Latencies of calls, in milliseconds.
	P50  float64 `json:"p50_ms"`
	P95  float64 `json:"p95_ms"`
	P99  float64 `json:"p99_ms"`
	P999 float64 `json:"p999_ms"`
	Max  float64 `json:"max_ms"`
	Mean float64 `json:"mean_ms"`
	// CPU time per command in microseconds: of each server of Config.Pids, of
	// all of them, and of this process.
	ServerCPU    []float64 `json:"server_cpu_us_per_command,omitempty"`
	ServersCPU   float64   `json:"servers_cpu_us_per_command,omitempty"`
	GeneratorCPU float64   `json:"generator_cpu_us_per_command,omitempty"`
	// UnknownCPU says why the CPU time of the servers is not known.
	UnknownCPU string `json:"servers_cpu_unknown,omitempty"`
}

func newReport(c *Config, m *Measurement, cpu *cpuMeter) *Report {
	r := &Report{
		Config: *c, Loop: "closed", Seconds: m.Took.Seconds(),
		Commands: m.Commands, Calls: m.Calls, Errors: m.Errors, LastError: m.LastError, Unanswered: m.Unanswered, Unsent: m.Unsent,
		Throughput: m.Throughput(),
		P50:        Millis(m.Percentile(50)), P95: Millis(m.Percentile(95)), P99: Millis(m.Percentile(99)),
		P999: Millis(m.Percentile(99.9)), Max: Millis(m.Max()), Mean: m.Latency.Mean() / 1000,
	}
	switch {
	case c.Streams > 0:
		r.Loop = "stream"
	case c.Rate > 0:
		r.Loop = "open"
	}
	if cpu.err != nil {
		r.UnknownCPU = cpu.err.Error()
	}
	if m.Commands > 0 {
		per := func(d time.Duration) float64 { return float64(d.Microseconds()) / float64(m.Commands) }
		if cpu.err == nil {
			for _, d := range cpu.servers() {
				r.ServerCPU = append(r.ServerCPU, per(d))
				r.ServersCPU += per(d)
			}
		}
		r.GeneratorCPU = per(cpu.selfEnd.CPU - cpu.self.CPU)
	}
	return r
}

// Millis returns d in milliseconds, to the microsecond.
func Millis(d time.Duration) float64 { return math.Round(float64(d)/1000) / 1000 }

// Text writes r for people.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	c := &r.Config
	if c.Streams > 0 {
		fmt.Fprintf(&b, "%d streams on %d connections, %d commits in flight each, %d a message", c.Streams, c.Conns, c.InFlight, c.Batch)
	} else {
		fmt.Fprintf(&b, "%d clients on %d connections, %s loop", c.Clients, c.Conns, r.Loop)
		if c.Rate > 0 {
			fmt.Fprintf(&b, " at %.0f calls/s", c.Rate)
		}
	}
	var mix []string
	for _, s := range c.Mix {
		if len(c.Mix) == 1 {
			mix = append(mix, s.Op)
		} else {
			mix = append(mix, fmt.Sprintf("%s=%d", s.Op, s.Weight))
		}
	}
	fmt.Fprintf(&b, "; %s; %s\n", strings.Join(mix, ","), strings.Join(c.Endpoints, " "))
	if r.Interrupted {
		fmt.Fprintf(&b, "interrupted after %.1f s of %.1f s, of which these figures are\n", r.Seconds, c.Duration.Seconds())
	}
	fmt.Fprintf(&b, "throughput  %.0f commands/s (%d in %.1f s)\n", r.Throughput, r.Commands, r.Seconds)
	fmt.Fprintf(&b, "latency     p50 %.2f ms   p95 %.2f ms   p99 %.2f ms   p99.9 %.2f ms   max %.2f ms\n", r.P50, r.P95, r.P99, r.P999, r.Max)
	if r.Errors > 0 {
		fmt.Fprintf(&b, "errors      %d, the last one: %s\n", r.Errors, r.LastError)
	}
	if r.Unanswered > 0 {
		fmt.Fprintf(&b, "no answer   %d of these calls were still without one when the run ended\n", r.Unanswered)
	}
	if r.Unsent > 0 {
		fmt.Fprintf(&b, "not sent    %d calls that were due: every client waited for an answer; the cluster, or --clients, is too slow for this rate\n", r.Unsent)
	}
	if len(r.ServerCPU) > 0 {
		var each []string
		for _, v := range r.ServerCPU {
			each = append(each, fmt.Sprintf("%.1f", v))
		}
		fmt.Fprintf(&b, "CPU         servers %.1f us a command (%s), this process %.1f us\n", r.ServersCPU, strings.Join(each, " + "), r.GeneratorCPU)
	}
	if r.UnknownCPU != "" {
		fmt.Fprintf(&b, "CPU         of the servers is not known: %s\n", r.UnknownCPU)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// JSON writes r as one indented document.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
