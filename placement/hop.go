package placement

import "fmt"

// NextHop is where one instance of a stage hands on what a stage downstream is to
// get.
type NextHop struct {
	From  string // sidecar that runs the stage
	Stage string // downstream
	// To is the sidecar that runs it, From itself when the records stay there;
	// empty when nobody does. Endpoint is that of To, empty when the records stay.
	To, Endpoint string
	// Why says why it is To.
	Why string
}

// String returns the name of s as people write it.
func (s Strategy) String() string {
	switch s {
	case LeastConnections:
		return "least connections"
	case WeightedRandom:
		return "weighted random"
	case ConsistentHash:
		return "consistent hash"
	}
	return "round robin"
}

// nextHops lists where the instances of stage k hand records on by their present
// assignments, limit of them at most, and counts all.
func (e *Engine) nextHops(x *pipe, k int32, runs [][]string, limit int) (out []NextHop, all int) {
	down := x.stages[k].down
	all = len(runs[k]) * len(down)
	for _, from := range runs[k] {
		at, ok := x.find(from)
		if !ok {
			continue
		}
		for _, d := range down {
			if len(out) == limit {
				return out, all
			}
			out = append(out, e.nextHop(x, x.recorded[at], d, runs[d]))
		}
	}
	return out, all
}

// nextHop tells where a hands stage d over to, which the sidecars of runs run.
func (e *Engine) nextHop(x *pipe, a *Assignment, d int32, runs []string) NextHop {
	h := NextHop{From: a.Sidecar, Stage: x.stages[d].ID}
	for i := range a.Stages {
		st := &a.Stages[i]
		if st.Stage != h.Stage {
			continue
		}
		if st.Remote == "" {
			h.To, h.Why = a.Sidecar, "it runs on the same sidecar"
			return h
		}
		h.To, h.Endpoint = st.Remote, st.RemoteEndpoint
		h.Why = e.whyThere(x, d, a.Sidecar, st.Remote, runs)
		return h
	}
	h.Why = "nobody runs it"
	if len(runs) > 0 {
		h.Why = "it has not been told yet where to"
	}
	return h
}

// whyThere says why from hands stage d over to to and not to another of runs.
func (e *Engine) whyThere(x *pipe, d int32, from, to string, runs []string) string {
	f, ok1 := e.hostID[from]
	t, ok2 := e.hostID[to]
	if !ok1 || !ok2 {
		return "as it was before the sidecar was gone"
	}
	far, steady := e.distance(f, t), e.steady(t)
	alike, nearer, other := 0, 0, ""
	for _, id := range runs {
		h, ok := e.hostID[id]
		if !ok {
			continue
		}
		switch c := e.distance(f, h); {
		case c == far && e.steady(h) == steady:
			alike++
		case c < far && e.steady(h) <= steady:
			if nearer++; other == "" {
				other = id
			}
		}
	}
	where := e.whereabouts(f, t, far)
	switch {
	case len(runs) == 1 && runs[0] == to:
		return "the only one that runs it, " + where
	case nearer > 0:
		return fmt.Sprintf("%s; %d that run it are nearer, such as %s, but an edge that works stays, and none may lead records back", where, nearer, other)
	case alike > 1:
		return fmt.Sprintf("one of %d %s, by %s", alike, where, x.stages[d].Strategy)
	}
	return "the nearest that runs it, " + where
}

// whereabouts says in words how near t is to f.
func (e *Engine) whereabouts(f, t int32, far int8) string {
	switch {
	case far == 1:
		return "on the same node"
	case far == 2:
		return "in the same zone"
	case e.hosts[f].zone == 0 || e.hosts[t].zone == 0:
		return "at an unknown distance"
	}
	return "in another zone"
}
