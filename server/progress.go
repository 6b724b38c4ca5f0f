package server

import (
	"fmt"
	"log/slog"
	"time"
)

// progressLog returns a function that logs now and then how far a transfer is,
// how fast, and how long the rest will take.
func progressLog(log *slog.Logger, now func() time.Time, every time.Duration) func(done, total int64) {
	var began, last time.Time
	var first int64
	return func(done, total int64) {
		t := now()
		if began.IsZero() {
			began, last, first = t, t, done
			return
		}
		if t.Sub(last) < every {
			return
		}
		last = t
		rate := float64(done-first) / t.Sub(began).Seconds()
		left := "unknown"
		if rate > 0 {
			left = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second).String()
		}
		log.Info("the state is being transferred", "bytes", done, "of", total, "rate", fmt.Sprintf("%.0f MB/s", rate/1e6), "left", left)
	}
}
