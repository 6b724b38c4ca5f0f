package rpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// WatchPipelineAssignments streams what a sidecar has to run: the state as
// ASSIGNED, SYNCED when that is complete, then each change as it happens, with
// SYNCED again now and then so that a quiet watch has a recent revision to
// resume from.
//
// The stream carries states and not events: changes that come while the
// sidecar is not reading melt into the newest.
func (a *sidecarAPI) WatchPipelineAssignments(req *sidecarpb.WatchAssignmentsRequest, stream sidecarpb.SidecarCoordinator_WatchPipelineAssignmentsServer) error {
	id := req.GetSidecarId()
	if err := checkID("sidecar_id", id); err != nil {
		return err
	}
	closeWatch, err := a.openWatch()
	if err != nil {
		return err
	}
	defer closeWatch()
	ctx := stream.Context()
	b := newBell()
	defer a.feed.watchSidecar(id, b)()

	w := &assignmentWatch{sidecar: id, marks: &a.push.marks, sent: make(map[string]uint64)}
	if err := a.firstState(ctx, w, req); err != nil {
		return err
	}
	if err := sendAll(stream, w.take()); err != nil {
		return err
	}
	return a.followAssignments(ctx, w, b, stream)
}

// firstState works out what a new watch is sent first.
func (a *sidecarAPI) firstState(ctx context.Context, w *assignmentWatch, req *sidecarpb.WatchAssignmentsRequest) error {
	// All who wait here share one read index; the turn comes after that, or the
	// workers would wait for the group.
	if err := a.reader.Wait(ctx); err != nil {
		return err
	}
	a.push.waiting.Add(1)
	var revision uint64
	var err error
	missed := turn(ctx, a.push.first, func() { revision, err = a.beginWatch(ctx, w, req) })
	a.push.waiting.Add(-1)
	if missed != nil {
		return missed
	}
	if err == nil {
		a.push.firsts.Add(1)
		a.reader.SetHeader(ctx, revision, w.epoch)
	}
	return err
}

// beginWatch puts the first state, or what a resumed watch missed, into w. It
// returns the revision of that.
func (a *sidecarAPI) beginWatch(ctx context.Context, w *assignmentWatch, req *sidecarpb.WatchAssignmentsRequest) (uint64, error) {
	shared := a.push.views.take()
	defer shared.Close()
	v := shared.View
	w.epoch = v.Epoch()
	sc, err := v.Sidecar(w.sidecar)
	if err != nil {
		return 0, err
	}
	if sc == nil {
		return 0, FromRejection(&commandpb.Rejection{
			Code:    commandpb.Code_CODE_NOT_FOUND,
			Reason:  fmt.Sprintf("no sidecar %q is registered; register it, then watch", w.sidecar),
			Subject: "sidecar " + w.sidecar,
		}).Err()
	}
	if from := req.GetFromRevision(); from > 0 {
		floor, ferr := a.feed.resumeFloor(ctx, v.Revision())
		switch {
		case req.FromEpoch != 0 && req.FromEpoch != v.Epoch():
			err = w.resync(restoredReason(req.FromEpoch, v.Epoch()))
		case ferr != nil:
			err = ferr
		case from > v.Revision():
			err = w.resync(fmt.Sprintf("revision %d does not exist in this cluster, the newest is %d", from, v.Revision()))
		case from < floor:
			err = w.resync(fmt.Sprintf("revision %d is too old to resume from, the oldest is %d", from, floor))
		default:
			w.resumed = from
		}
	}
	if err == nil {
		err = w.push(v)
	}
	if err == nil {
		err = w.synced(v.Revision())
	}
	return v.Revision(), err
}

// followAssignments sends what changes until the stream ends.
func (a *sidecarAPI) followAssignments(ctx context.Context, w *assignmentWatch, b bell, stream sidecarpb.SidecarCoordinator_WatchPipelineAssignmentsServer) error {
	// Not in step with the watches that began at the same time.
	mark := time.NewTimer(a.cfg.SyncEvery/2 + rand.N(a.cfg.SyncEvery/2+1))
	defer mark.Stop()
	last := time.Now()
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b:
			if err = settle(ctx, b, last); err == nil {
				err = a.pushChanges(ctx, w)
			}
			last = time.Now()
		case <-mark.C:
			mark.Reset(a.cfg.SyncEvery)
			err = a.markProgress(ctx, w, b)
		}
		if err == nil {
			err = sendAll(stream, w.take())
		}
		if err != nil {
			return err
		}
	}
}

// pushChanges puts into w what differs between the state and what was sent.
func (a *sidecarAPI) pushChanges(ctx context.Context, w *assignmentWatch) error {
	var err error
	missed := turn(ctx, a.push.deltas, func() {
		shared := a.push.views.take()
		defer shared.Close()
		v := shared.View
		over := v.Epoch() != w.epoch
		if over {
			err = w.startOver(v.Epoch())
		}
		if err == nil {
			err = w.push(v)
		}
		if err == nil && over {
			err = w.synced(v.Revision())
		}
	})
	if missed != nil {
		return missed
	}
	a.push.pushes.Add(1)
	a.push.events.Add(uint64(len(w.out)))
	return err
}

// markProgress puts a SYNCED into w if there is a newer revision to resume from.
// It does not look at the state: up to the revision that the feed has reached b
// was rung for every change that concerns this watch.
func (a *sidecarAPI) markProgress(ctx context.Context, w *assignmentWatch, b bell) error {
	revision := a.feed.rungUp()
	select {
	case <-b:
		if err := a.pushChanges(ctx, w); err != nil {
			return err
		}
	default:
	}
	if revision <= w.reached {
		return nil
	}
	return w.synced(revision)
}
