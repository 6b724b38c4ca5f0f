package server

import (
	"testing"
	"testing/synctest"
	"time"
)

// Images are sent slowly beside commands, until the log grows beyond what is kept for who
// receives them.
func TestCommandsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var written, log int64
		u := &commandsUnderWay{
			written:  func() (all, unflushed int64) { return written, 0 },
			logBytes: func() int64 { return log }, maxLogBytes: 1000, now: time.Now,
		}
		want := func(when string, busy bool) {
			t.Helper()
			if u.busy() != busy {
				t.Errorf("%s: %v", when, !busy)
			}
		}
		want("before the first command", false)
		written++
		want("after a command", true)
		<-time.After(busyFor - time.Millisecond)
		want("a little later", true)
		<-time.After(time.Millisecond)
		want("when none has come for a while", false)
		written, log = written+1, 1001
		want("with a long log", false)
		log = 1000
		want("with a shorter one", true)
		written = 0
		want("after the state was replaced", true)
		<-time.After(busyFor)
		want("and nothing was written since", false)
	})
}
