package router

import "strconv"

// The labels that say where a sidecar, or a service on it, runs and how much it can
// take. The first two are those that Kubernetes puts on nodes.
const (
	LabelZone     = "topology.kubernetes.io/zone"
	LabelNode     = "kubernetes.io/hostname"
	LabelCapacity = "conveyor.etl/capacity"
)

// MaxCapacity is the largest capacity there is, DefaultCapacity that of who says
// none.
const (
	MaxCapacity     = 10_000
	DefaultCapacity = 1
)

// Capacity reads the value of LabelCapacity: a whole number from 1 to MaxCapacity.
// Anything else is no capacity.
func Capacity(text string) (uint32, bool) {
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n < 1 || n > MaxCapacity {
		return 0, false
	}
	return uint32(n), true
}
