package rpc

import (
	"strings"
	"testing"

	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// Goal: an exchange whose new node votes already is a removal; it is refused when
// fewer nodes than before could fail afterwards, and only then.
func TestReplaceNeverWeakens(t *testing.T) {
	for _, c := range []struct {
		voters   []uint64
		old, new uint64
		refused  bool
	}{
		{[]uint64{1, 2, 3}, 3, 2, true},
		{[]uint64{1, 2, 3, 4}, 3, 2, false},
		{[]uint64{1, 2, 3, 4, 5}, 3, 2, true},
	} {
		leader, _ := serveMembers(t, newGroup(c.voters...))
		resp, err := leader.cluster.ReplaceMember(leader.ctx(),
			&clusterpb.ReplaceMemberRequest{OldNodeId: c.old, NewNodeId: c.new, PreflightOnly: true})
		noError(t, err)
		refused := false
		for _, check := range resp.GetChecks() {
			if check.GetName() == "strength" && !check.GetOk() {
				refused = strings.Contains(check.GetDetail(), "router member remove 3")
			}
		}
		if refused != c.refused {
			t.Errorf("voters %v, %d by %d: refused %v, want %v: %v", c.voters, c.old, c.new, refused, c.refused, resp.GetChecks())
		}
	}
}
