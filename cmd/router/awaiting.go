package main

import (
	"context"
	"time"
)

// awaiting says on stderr what a command waits for that asks again and again. The
// waiter does not: each of its calls is answered at once.
type awaiting struct {
	a    *app
	next time.Time
}

func (a *app) awaiting() *awaiting { return &awaiting{a, time.Now().Add(noticeAfter)} }

// say prints what is waited for, if it is time to. ctx bounds the wait. what is only
// called when it is.
func (w *awaiting) say(ctx context.Context, what func() string) {
	if time.Now().Before(w.next) || ctx.Err() != nil {
		return
	}
	w.a.notice("waiting %s%s", what(), remaining(ctx))
	w.next = time.Now().Add(noticeAgain)
}
