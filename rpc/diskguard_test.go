package rpc

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"conveyor.etl/router/router/commandpb"
)

func TestDiskGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var free atomic.Uint64
		var fail atomic.Bool
		free.Store(1 << 40)
		g, err := NewDiskGuard(DiskGuardOptions{Dir: "data", Reserve: 1 << 30, Free: func(string) (uint64, error) {
			if fail.Load() {
				return 0, errors.New("statfs failed")
			}
			return free.Load(), nil
		}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go g.Run(ctx)
		add := &commandpb.Command{Op: &commandpb.Command_SaveCheckpoint{SaveCheckpoint: &commandpb.SaveCheckpoint{}}}
		remove := onceCommand("p")
		step := func(f uint64, full bool) {
			t.Helper()
			free.Store(f)
			<-time.After(time.Second) // one tick of the fake clock
			synctest.Wait()
			if g.Full() != full {
				t.Fatalf("%d bytes free: full is %v", f, g.Full())
			}
			for _, admit := range []func(*commandpb.Command) error{g.Admit, func(c *commandpb.Command) error {
				raw, err := c.MarshalVT()
				if err != nil {
					t.Fatal(err)
				}
				return g.AdmitBytes(raw)
			}} {
				if err := admit(add); errors.Is(err, ErrNoSpace) != full {
					t.Errorf("%d bytes free: adding data: %v", f, err)
				}
				if err := admit(remove); err != nil {
					t.Errorf("%d bytes free: a delete: %v", f, err)
				}
			}
		}
		step(1<<30, false)
		step(1<<30-1, true)
		step(1<<30+1<<27, true) // more than the reserve, not enough to recover
		step(1<<30+1<<28, false)
		step(1<<30, false)
		step(0, true)
		fail.Store(true)
		step(1<<40, true) // no answer: the last one stays
		fail.Store(false)
		step(1<<40, false)
		if err := g.AdmitBytes([]byte{0xff}); err != nil {
			t.Errorf("with space, commands are not even looked at: %v", err)
		}
	})
}

func TestDiskGuardReserve(t *testing.T) {
	g, err := NewDiskGuard(DiskGuardOptions{Dir: t.TempDir(), Reserve: 1})
	if err != nil {
		t.Fatal(err)
	}
	if g.o.Reserve != minDiskReserve {
		t.Errorf("a reserve of %d bytes", g.o.Reserve)
	}
	if g.FreeBytes() == 0 {
		t.Error("the real file system reports no free space")
	}
	var none *DiskGuard
	if none.Full() || none.Admit(onceCommand("p")) != nil || none.AdmitBytes(nil) != nil {
		t.Error("no guard refuses")
	}
}

// Every kind of command has been judged: one that is forgotten is refused,
// which must not happen to those that free space.
func TestGrowingCommands(t *testing.T) {
	frees := []*commandpb.Command{
		onceCommand("p"),
		{Op: &commandpb.Command_DeregisterService{}},
		{Op: &commandpb.Command_DeregisterSidecar{}},
		{Op: &commandpb.Command_TransitionSidecar{}},
		{Op: &commandpb.Command_DeleteCheckpoint{}},
		{Op: &commandpb.Command_LeaveGroup{}},
		{Op: &commandpb.Command_SetPipelineEnabled{SetPipelineEnabled: &commandpb.SetPipelineEnabled{Enabled: false}}},
		{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
			Changes: []*commandpb.AssignmentChange{{Revoke: true}}}}},
		{Op: &commandpb.Command_UpdateServiceHealth{UpdateServiceHealth: &commandpb.UpdateServiceHealth{
			State: commandpb.ServiceState_SERVICE_STATE_EXPIRED}}},
	}
	for _, c := range frees {
		if grows(c) {
			t.Errorf("%T is refused on a full disk", c.GetOp())
		}
	}
	adds := []*commandpb.Command{
		{},
		{Op: &commandpb.Command_SetPipelineEnabled{SetPipelineEnabled: &commandpb.SetPipelineEnabled{Enabled: true}}},
		{Op: &commandpb.Command_ApplyAssignments{ApplyAssignments: &commandpb.ApplyAssignments{
			Changes: []*commandpb.AssignmentChange{{Revoke: true}, {}}}}},
		{Op: &commandpb.Command_RegisterService{}},
		{Op: &commandpb.Command_CommitSourceOffset{}},
	}
	for _, c := range adds {
		if !grows(c) {
			t.Errorf("%T is taken on a full disk", c.GetOp())
		}
	}
}
