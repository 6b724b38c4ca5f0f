package offline

import (
	"context"
	"encoding/hex"

	"conveyor.etl/router/router"
)

// contentHash returns the hash of what a state holds, wherever its log stands:
// that of a backup and of what is made from it are equal.
func contentHash(ctx context.Context, v *router.View) (string, error) {
	sum, err := v.ContentHash(ctx)
	return hex.EncodeToString(sum), err
}

// countsByName returns the counts of what a backup holds.
func countsByName(c router.Counts) map[string]uint64 {
	return map[string]uint64{
		"pipelines": c.Pipelines, "sidecars": c.Sidecars, "services": c.Services, "groups": c.Groups,
		"source_offsets": c.SourceOffsets, "watermarks": c.Watermarks, "group_offsets": c.GroupOffsets,
		"checkpoints": c.Checkpoints, "assignments": c.Assignments, "revoked": c.Revoked, "requests": c.Requests,
	}
}
