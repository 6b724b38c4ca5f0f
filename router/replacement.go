package router

import (
	"encoding/json"
	"fmt"
)

// OperationReplace is the kind of the operation that exchanges a voter for
// another node. The edge begins it, the leader's loop carries it out.
const OperationReplace = "replace"

// Replacement is the detail of an operation of kind OperationReplace.
type Replacement struct {
	Old uint64 `json:"old"`
	New uint64 `json:"new"`
}

// Encode returns r as the detail of an operation.
func (r Replacement) Encode() ([]byte, error) { return json.Marshal(r) }

// DecodeReplacement is the inverse of Encode.
func DecodeReplacement(detail []byte) (Replacement, error) {
	var r Replacement
	if err := json.Unmarshal(detail, &r); err != nil {
		return r, fmt.Errorf("the detail of a replacement cannot be read: %w", err)
	}
	return r, nil
}
