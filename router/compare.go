package router

// KnowsCheckpoints reports whether the sums hold that of the checkpoints. It is
// a chain over all writes ever made: a state of an older release has none, and
// neither says then anything about the other.
func (s Sums) KnowsCheckpoints() bool {
	return len(s.Sums) > int(sumCheckpoints) && s.Sums[sumCheckpoints] != 0
}

// WithoutCheckpoints returns the sums without that of the checkpoints, and
// without that of the clock, which holds it: what can be compared with sums that
// do not know it.
func (s Sums) WithoutCheckpoints() Sums {
	out := Sums{Index: s.Index, Epoch: s.Epoch, Sums: append([]uint64(nil), s.Sums...)}
	for _, i := range []sumKind{sumCheckpoints, sumKinds} {
		if int(i) < len(out.Sums) {
			out.Sums[i] = 0
		}
	}
	return out
}
