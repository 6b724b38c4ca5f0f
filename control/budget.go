package control

import "time"

// budget is how many stages may be moved although nothing forces it: up to so many
// a minute, saved up to a minute's worth. It belongs to one goroutine.
type budget struct {
	perMinute int // 0 = without bound
	left      float64
	last      time.Time
}

func newBudget(perMinute int, now time.Time) *budget {
	return &budget{perMinute: perMinute, left: float64(perMinute), last: now}
}

// take spends n moves, if there are as many. One step that asks for more than a
// whole minute's is let through when the budget is full: it could never be done
// otherwise. It is paid for afterwards.
func (b *budget) take(n int, now time.Time) bool {
	if b.perMinute == 0 || n == 0 {
		return true
	}
	if d := now.Sub(b.last); d > 0 {
		b.left = min(float64(b.perMinute), b.left+float64(b.perMinute)*d.Minutes())
	}
	b.last = now
	if float64(n) > b.left && b.left < float64(b.perMinute) {
		return false
	}
	b.left -= float64(n)
	return true
}

// wait returns after what time n moves can be taken.
func (b *budget) wait(n int) time.Duration {
	missing := min(float64(n), float64(b.perMinute)) - b.left
	return max(0, time.Duration(missing/float64(b.perMinute)*float64(time.Minute)))
}
