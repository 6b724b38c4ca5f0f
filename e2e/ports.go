package e2e

import (
	"testing"

	"conveyor.etl/router/internal/freeport"
)

// freePorts returns n ports on which nobody listens, and which nobody is given while
// the process of the test lives, other test processes included.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	ports, err := freeport.Take(n)
	if err != nil {
		t.Fatal(err)
	}
	return ports
}
