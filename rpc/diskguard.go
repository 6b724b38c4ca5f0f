package rpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"conveyor.etl/router/router/commandpb"
)

// minDiskReserve is the least free space that is kept: room for the log to be
// compacted and for the state to rewrite its tables, both of which need space
// before they free any.
const minDiskReserve = 256 << 20

// DiskGuardOptions configures a DiskGuard; zero values get defaults.
type DiskGuardOptions struct {
	// Dir is in the file system that is watched; required.
	Dir string
	// Reserve is the free space in bytes below which commands that add data are
	// refused. At least, and by default, 256 MiB.
	Reserve uint64
	// Interval is how often the file system is asked. Default 1 s.
	Interval time.Duration
	// Free returns the bytes available in the file system of dir. Default:
	// statfs.
	Free func(dir string) (uint64, error)
	// Logger receives changes. Default: discarded.
	Logger *slog.Logger
}

// DiskGuard refuses commands that add data while the disk of this node is
// nearly full. A node whose disk is full stops, and the others are probably as
// full: refusing early keeps the cluster alive and lets deletes through, which
// are the way out. A nil DiskGuard refuses nothing. Its methods are safe for
// concurrent use.
type DiskGuard struct {
	o    DiskGuardOptions
	full atomic.Bool
	free atomic.Uint64
	// failing: the last question to the file system failed; Poll's own.
	failing atomic.Bool
}

// NewDiskGuard returns a guard that has looked at the disk once.
func NewDiskGuard(o DiskGuardOptions) (*DiskGuard, error) {
	if o.Dir == "" {
		return nil, errors.New("rpc: a disk guard needs Dir")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Reserve = max(o.Reserve, minDiskReserve)
	setDefault(&o.Interval, time.Second)
	if o.Free == nil {
		o.Free = freeBytes
	}
	g := &DiskGuard{o: o}
	g.Poll()
	return g, nil
}

// freeBytes returns what an ordinary user may still write.
func freeBytes(dir string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, fmt.Errorf("rpc: statfs %s: %w", dir, err)
	}
	return s.Bavail * uint64(s.Bsize), nil
}

// Run asks the file system every Interval until ctx is done.
func (g *DiskGuard) Run(ctx context.Context) {
	ticker := time.NewTicker(g.o.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			g.Poll()
		}
	}
}

// Poll asks the file system once. When that fails, the last answer stays.
func (g *DiskGuard) Poll() {
	free, err := g.o.Free(g.o.Dir)
	if err != nil {
		if !g.failing.Swap(true) {
			g.o.Logger.Error("cannot ask how much disk space is free; the last answer stays in force",
				"dir", g.o.Dir, "err", err)
		}
		return
	}
	g.failing.Store(false)
	g.free.Store(free)
	switch {
	case free < g.o.Reserve:
		if !g.full.Swap(true) {
			g.o.Logger.Error("the disk is nearly full: commands that add data are refused while this node leads; free space, or delete data",
				"dir", g.o.Dir, "free_bytes", free, "reserve_bytes", g.o.Reserve)
		}
	case free >= g.o.Reserve+g.o.Reserve/4:
		// A quarter more than the reserve: compaction moves the free space up
		// and down, and clients must not see the cluster change its mind with it.
		if g.full.Swap(false) {
			g.o.Logger.Info("there is disk space again; all commands are taken",
				"dir", g.o.Dir, "free_bytes", free)
		}
	}
}

// Full reports whether commands that add data are refused.
func (g *DiskGuard) Full() bool { return g != nil && g.full.Load() }

// FreeBytes returns the last answer of the file system.
func (g *DiskGuard) FreeBytes() uint64 {
	if g == nil {
		return 0
	}
	return g.free.Load()
}

// Admit returns ErrNoSpace when cmd adds data and the disk is nearly full.
func (g *DiskGuard) Admit(cmd *commandpb.Command) error {
	if g.Full() && grows(cmd) {
		return ErrNoSpace
	}
	return nil
}

// AdmitBytes is Admit for an encoded command. What cannot be decoded adds data.
func (g *DiskGuard) AdmitBytes(raw []byte) error {
	if !g.Full() {
		return nil
	}
	cmd := &commandpb.Command{}
	if err := cmd.UnmarshalVT(raw); err != nil {
		return ErrNoSpace
	}
	return g.Admit(cmd)
}

// grows reports whether cmd may add data to the state. Those that do not either
// remove something or record that something is gone, which the cluster must be
// able to do whatever the disk says.
func grows(cmd *commandpb.Command) bool {
	switch op := cmd.GetOp().(type) {
	case *commandpb.Command_DeregisterService,
		*commandpb.Command_DeregisterSidecar,
		*commandpb.Command_TransitionSidecar,
		*commandpb.Command_DeletePipeline,
		*commandpb.Command_DeleteCheckpoint,
		*commandpb.Command_LeaveGroup,
		// The way out of a restore that has filled the disk.
		*commandpb.Command_CancelOperation,
		*commandpb.Command_AbandonRestore,
		*commandpb.Command_ReportRestore:
		return false
	case *commandpb.Command_PutOperation:
		return op.PutOperation.GetOperation().GetState() == commandpb.OperationState_OPERATION_STATE_RUNNING
	case *commandpb.Command_SetPipelineEnabled:
		return op.SetPipelineEnabled.GetEnabled() // enabling leads to assignments
	case *commandpb.Command_UpdateServiceHealth:
		return op.UpdateServiceHealth.GetState() == commandpb.ServiceState_SERVICE_STATE_UNSPECIFIED
	case *commandpb.Command_ApplyAssignments:
		for _, c := range op.ApplyAssignments.GetChanges() {
			if !c.GetRevoke() {
				return true
			}
		}
		return false
	}
	return true
}
