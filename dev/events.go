package dev

import (
	"fmt"
	"sync"
	"time"
)

// keptEvents bounds what is kept for the picture.
const keptEvents = 200

// event is something that happened.
type event struct {
	at   time.Time
	text string
}

// events gathers what happens, from all parts.
type events struct {
	mu   sync.Mutex
	list []event
	// line prints each event at once when there is no picture; nil otherwise.
	line func(event)
	// changed wakes the picture.
	changed chan struct{}
}

func newEvents(line func(event)) *events {
	return &events{line: line, changed: make(chan struct{}, 1)}
}

func (e *events) add(format string, args ...any) {
	ev := event{time.Now(), fmt.Sprintf(format, args...)}
	e.mu.Lock()
	e.list = append(e.list, ev)
	if len(e.list) > keptEvents {
		e.list = append([]event(nil), e.list[len(e.list)-keptEvents:]...)
	}
	if e.line != nil {
		e.line(ev) // under the lock: lines keep their order
	}
	e.mu.Unlock()
	select {
	case e.changed <- struct{}{}:
	default:
	}
}

// last returns the newest n events, oldest first.
func (e *events) last(n int) []event {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]event(nil), e.list[max(0, len(e.list)-n):]...)
}
