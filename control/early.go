package control

import "time"

// maxEarly bounds the sidecars, and the services, of which early remembers something.
const maxEarly = 1 << 18

// early holds what a node hears between its election and the moment at which it has
// the leases: it has to catch up and to read the whole fleet first. Those heartbeats
// come once, the nodes they came through think that they have arrived; without them
// somebody who was silent before and is back would be given up.
type early struct{ sidecars, services map[string]time.Time }

func (e *early) add(now time.Time, sidecarID, serviceID string) {
	put := func(in *map[string]time.Time, id string) {
		if id == "" || len(*in) >= maxEarly {
			return
		}
		if *in == nil {
			*in = make(map[string]time.Time)
		}
		(*in)[id] = now
	}
	put(&e.sidecars, sidecarID)
	put(&e.services, serviceID)
}

// hearLocked tells leases of what was heard before they were there. It is no harm when
// that was long ago.
func (l *Liveness) hearLocked() {
	for _, x := range []struct {
		in map[string]time.Time
		to *leases
	}{{l.early.sidecars, l.sidecars}, {l.early.services, l.services}} {
		for id, at := range x.in {
			if e := x.to.all[id]; e != nil {
				x.to.renew(e, at.Sub(x.to.origin))
			}
		}
	}
	l.early = early{}
}
