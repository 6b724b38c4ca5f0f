package rpc

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Goal: a greeting that is over in the very moment in which its time is up counts as
// late, with the reason, also before the timer has said so. A session that ended
// without a reason brought the whole node down.
func TestGreetingAtTheLastMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := errors.New("late")
		for limit, want := range map[time.Duration]error{time.Second: late, time.Second + 1: nil} {
			ctx, cancel := context.WithCancelCause(t.Context())
			err := within(ctx, limit, cancel, late, func() error {
				<-time.After(time.Second)
				return nil
			})
			if !errors.Is(err, want) || context.Cause(ctx) != want {
				t.Errorf("of %v: %v, the context ended with %v; want %v", limit, err, context.Cause(ctx), want)
			}
			cancel(nil)
		}
	})
}
