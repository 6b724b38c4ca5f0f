package control

import (
	"math"
	"time"
)

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
	b.save(now)
	// What was saved bit by bit may lack the last digit of a whole move.
	if float64(n) > b.left+1e-9 && b.left < float64(b.perMinute) {
		return false
	}
	b.left -= float64(n)
	return true
}

// wait returns after what time, measured from the last look, n moves can be taken.
func (b *budget) wait(n int) time.Duration {
	missing := min(float64(n), float64(b.perMinute)) - b.left
	// Rounded up: to be told to wait for no time at all, for want of a fraction of a
	// move, is to ask again and again.
	return max(0, time.Duration(math.Ceil(missing/float64(b.perMinute)*float64(time.Minute))))
}

// save adds what may be moved since the last look.
func (b *budget) save(now time.Time) {
	if d := now.Sub(b.last); d > 0 {
		b.left = min(float64(b.perMinute), b.left+float64(b.perMinute)*d.Minutes())
	}
	b.last = now
}

// unbounded is how many moves are looked for at once when there is no bound.
const unbounded = 10_000

// room returns how many moves can be taken, and whether one step may be of more.
func (b *budget) room(now time.Time) (n int, more bool) {
	if b.perMinute == 0 {
		return unbounded, true
	}
	b.save(now)
	return max(0, int(b.left+1e-9)), b.left >= float64(b.perMinute)
}
