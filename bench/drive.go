package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Latencies are recorded in microseconds, up to maxLatency, with three digits.
const (
	maxLatency = 5 * time.Minute
	digits     = 3
)

// Call does one operation and returns how many commands it carried.
type Call func(ctx context.Context) (commands int, err error)

// DriveConfig says how to drive calls.
type DriveConfig struct {
	// Callers do one call at a time each; at least one.
	Callers []Call
	// Rate, when not zero, is the number of calls due per second in all.
	Rate float64
	// Warmup runs before anything is counted.
	Warmup, Duration time.Duration
	// Started is called when the measurement begins and Ended when it ends;
	// may be nil.
	Started, Ended func()
}

// Measurement is what came of one drive.
type Measurement struct {
	Took      time.Duration
	Calls     int64
	Commands  int64
	Errors    int64
	LastError string
	// Unanswered of the errors are calls under way in the end that had waited for long;
	// their age is in Latency, as the least that they would have taken.
	Unanswered int64
	// Unsent are calls of an open loop that were due, for which no caller was free.
	Unsent  int64
	Latency *hdrhistogram.Histogram // per call, microseconds
}

// Throughput returns commands per second.
func (m *Measurement) Throughput() float64 {
	if m.Took <= 0 {
		return 0
	}
	return float64(m.Commands) / m.Took.Seconds()
}

// Percentile returns the latency that q percent of the calls did not exceed.
func (m *Measurement) Percentile(q float64) time.Duration {
	return time.Duration(m.Latency.ValueAtQuantile(q)) * time.Microsecond
}

// Max returns the longest latency.
func (m *Measurement) Max() time.Duration {
	return time.Duration(m.Latency.Max()) * time.Microsecond
}

// NewHistogram returns a histogram of the shape all of this package have.
func NewHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, maxLatency.Microseconds(), digits)
}

// ErrAllFailed: no call of a drive got through.
var ErrAllFailed = errors.New("bench: every call failed")

// recorder is what one caller counts by itself, so that callers share nothing.
type recorder struct {
	latency   *hdrhistogram.Histogram
	calls     int64
	commands  int64
	errors    int64
	lastError error
	// left are the ages of what was under way in the end.
	left []time.Duration
}

func (r *recorder) record(d time.Duration, commands int, err error) {
	if err != nil {
		r.errors++
		r.lastError = err
		return
	}
	r.calls++
	r.commands += int64(commands)
	// A value out of range is counted as the largest instead of being lost.
	_ = r.latency.RecordValue(min(max(1, d.Microseconds()), maxLatency.Microseconds()))
}

// phases tells callers whether what ends now is counted.
type phases struct {
	measured atomic.Bool
}

// Drive runs the callers and returns what it measured. A failed call is counted
// and does not end the drive, but a drive in which every call failed is an
// error, ErrAllFailed. One that ctx ends while it measures returns what it has
// measured until then beside the error of ctx; before, it returns the error alone.
func Drive(ctx context.Context, c DriveConfig) (*Measurement, error) {
	if len(c.Callers) == 0 || c.Duration <= 0 {
		return nil, errors.New("bench: a drive needs callers and a duration")
	}
	return measure(ctx, len(c.Callers), c, func(ctx context.Context, i int, p *phases, s *schedule, r *recorder) {
		drive(ctx, p, s, c.Callers[i], r)
	})
}

// measure has n of run work side by side until the drive is over, and merges what they
// recorded.
func measure(ctx context.Context, n int, c DriveConfig, run func(context.Context, int, *phases, *schedule, *recorder)) (*Measurement, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var p phases
	start := time.Now()
	schedule := newSchedule(c.Rate, start)

	recorders := make([]*recorder, n)
	var running sync.WaitGroup
	for i := range n {
		r := &recorder{latency: NewHistogram()}
		recorders[i] = r
		running.Go(func() { run(ctx, i, &p, schedule, r) })
	}
	if !rest(ctx, c.Warmup) {
		running.Wait()
		return nil, ctx.Err()
	}
	if c.Started != nil {
		c.Started()
	}
	begin := time.Now()
	p.measured.Store(true)
	rest(ctx, c.Duration)
	p.measured.Store(false)
	took := time.Since(begin)
	if c.Ended != nil {
		c.Ended()
	}
	unsent := schedule.unsent(begin.Add(took), took)
	interrupted := ctx.Err()
	cancel()
	running.Wait()
	m := merge(recorders, c.Duration)
	m.Took, m.Unsent = took, unsent
	if interrupted != nil {
		return m, interrupted
	}
	if m.Calls == 0 && m.Errors > 0 {
		return m, fmt.Errorf("%w: all %d, the last one with: %s", ErrAllFailed, m.Errors, m.LastError)
	}
	return m, nil
}

// overdue is how long a call must have been under way in the end to count as one that
// is not answered: of those who are answered all the time each has one under way, too.
const overdue = time.Second

func merge(recorders []*recorder, duration time.Duration) *Measurement {
	m := &Measurement{Latency: NewHistogram()}
	oldest := time.Duration(0)
	for _, r := range recorders {
		m.Latency.Merge(r.latency)
		m.Calls += r.calls
		m.Commands += r.commands
		m.Errors += r.errors
		if r.lastError != nil {
			m.LastError = r.lastError.Error()
		}
		for _, age := range r.left {
			if age >= min(overdue, duration/2) {
				m.Unanswered++
				oldest = max(oldest, age)
				_ = m.Latency.RecordValue(min(age.Microseconds(), maxLatency.Microseconds())) // it is in range
			}
		}
	}
	if m.Errors += m.Unanswered; m.Unanswered > 0 && m.LastError == "" {
		m.LastError = fmt.Sprintf("no answer for %v, until the end", oldest.Round(time.Millisecond))
	}
	return m
}

// After a failure a caller pauses, the longer the more follow each other: a node
// that is down refuses a hundred thousand calls a second, which measures nothing
// and takes the machine from the others.
const (
	minPause = time.Millisecond
	maxPause = 200 * time.Millisecond
)

// drive calls until ctx is done. A call counts when it ended while measured.
func drive(ctx context.Context, p *phases, s *schedule, call Call, r *recorder) {
	pause := minPause
	for {
		due := time.Now()
		if s != nil {
			var ok bool
			if due, ok = s.next(ctx); !ok {
				return
			}
		}
		n, err := call(ctx)
		if ctx.Err() != nil {
			r.left = append(r.left, time.Since(due))
			return
		}
		if p.measured.Load() {
			r.record(time.Since(due), n, err)
		}
		if err == nil {
			pause = minPause
			continue
		}
		if !rest(ctx, pause) {
			return
		}
		pause = min(2*pause, maxPause)
	}
}

// rest waits for d and reports whether ctx has not ended meanwhile.
func rest(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// schedule hands out the times at which calls are due, one every 1/rate s.
type schedule struct {
	start  time.Time
	every  float64 // nanoseconds
	ticket atomic.Int64
}

func newSchedule(rate float64, start time.Time) *schedule {
	if rate <= 0 {
		return nil
	}
	return &schedule{start: start, every: float64(time.Second) / rate}
}

// unsent returns how many calls were due in the time before end and have not been sent
// by then. s may be nil.
func (s *schedule) unsent(end time.Time, before time.Duration) int64 {
	if s == nil {
		return 0
	}
	due := int64(float64(end.Sub(s.start))/s.every) + 1
	all := int64(float64(before) / s.every)
	// The last tickets belong to callers that wait for the time of their call.
	return min(max(0, due-s.ticket.Load()), all)
}

// next waits until a call is due and returns when it was. It does not wait for
// calls that are overdue already.
func (s *schedule) next(ctx context.Context) (time.Time, bool) {
	due := s.start.Add(time.Duration(float64(s.ticket.Add(1)-1) * s.every))
	if wait := time.Until(due); wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return due, false
		}
	}
	return due, ctx.Err() == nil
}
