package rpc

import (
	"strconv"
	"sync"
	"time"
)

// delayBounds are the upper bounds of the buckets of delays, in seconds. What an
// operator asks is whether it was a push (milliseconds), a heartbeat (seconds) or
// never.
var delayBounds = [...]float64{0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60}

// delays is a histogram of times. Its zero value is empty; its methods are safe
// for concurrent use.
type delays struct {
	mu     sync.Mutex
	counts [len(delayBounds) + 1]uint64
	sum    time.Duration
}

func (d *delays) observe(took time.Duration) {
	i := 0
	for i < len(delayBounds) && took.Seconds() > delayBounds[i] {
		i++
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts[i]++
	d.sum += took
}

// metrics adds the histogram to m as Prometheus writes one: cumulative buckets,
// sum and count.
func (d *delays) metrics(name string, m map[string]float64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	total := uint64(0)
	for i, n := range d.counts {
		total += n
		le := "+Inf"
		if i < len(delayBounds) {
			le = strconv.FormatFloat(delayBounds[i], 'g', -1, 64)
		}
		m[name+`_bucket{le="`+le+`"}`] = float64(total)
	}
	m[name+"_sum"] = d.sum.Seconds()
	m[name+"_count"] = float64(total)
}
