package rpc

import (
	"fmt"
	"testing"

	"conveyor.etl/router/router/commandpb"
)

// Goal: pushes that follow each other share a view for as long as nothing changes, see
// each change that was applied before they began, and keep nothing once none is left.
func TestPushViewsAreShared(t *testing.T) {
	a := newAPI(t)
	p := &pushViews{state: a.node.fsm}
	register := func(i int) {
		a.node.must(a.t, &commandpb.Command{Op: &commandpb.Command_RegisterSidecar{RegisterSidecar: &commandpb.RegisterSidecar{
			Sidecar: &commandpb.Sidecar{SidecarId: fmt.Sprint("s-", i), Endpoint: "10.0.0.1:50053"},
		}}})
	}
	register(0)
	alone := p.take()
	if p.cur != nil || alone.refs != 1 {
		t.Fatal("a view was kept while no worker is busy")
	}
	alone.Close()
	p.begin()
	p.begin()
	one, two := p.take(), p.take()
	if one != two {
		t.Fatal("two pushes at one revision have two views")
	}
	register(1)
	three := p.take()
	if three == one {
		t.Fatal("the view of a push is older than what was applied before it")
	}
	for v, want := range map[*pushView]bool{one: false, three: true} {
		if sc, err := v.Sidecar("s-1"); err != nil || (sc != nil) != want {
			t.Fatalf("revision %d shows %v, %v", v.Revision(), sc, err)
		}
	}
	one.Close()
	if sc, err := two.Sidecar("s-0"); err != nil || sc == nil {
		t.Fatalf("a view that is in use was closed: %v, %v", sc, err)
	}
	two.Close()
	if _, err := two.Sidecar("s-0"); err == nil {
		t.Fatal("a view that nobody uses any more is open")
	}
	three.Close()
	if _, err := three.Sidecar("s-0"); err != nil {
		t.Fatalf("the newest view was closed between two pushes: %v", err)
	}
	p.end()
	if p.cur == nil {
		t.Fatal("the view went although a worker is busy")
	}
	p.end()
	if _, err := three.Sidecar("s-0"); err == nil || p.cur != nil {
		t.Fatal("a view is kept although no worker is busy")
	}
}
