package router

import (
	"encoding/json"
	"fmt"
)

// OperationReplace is the kind of the operation that exchanges a voter for
// another node. The edge begins it, the leader's loop carries it out.
const OperationReplace = "replace"

// OperationRejoin is the kind of the operation that remembers, across changes of
// leader, that a member was taken out to come back on another directory.
const OperationRejoin = "rejoin"

// RejoinDetail is the detail of an operation of kind OperationRejoin: the directory
// of the self that is taken out, 0 for that of a first member. The same id may be
// taken out later for good, with the directory it has then: an operation that was
// never ended must not bring it back.
func RejoinDetail(disk uint64) []byte { return fmt.Appendf(nil, "%016x", disk) }

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
