package router

import (
	"reflect"

	"conveyor.etl/router/router/commandpb"
)

// handler applies one kind of command. It returns a Rejection to refuse it;
// whatever it did until then is taken back.
type handler struct {
	name string
	op   uint32 // field number in Command
	run  func(*tx, any) *commandpb.Rejection
}

type row struct {
	kind reflect.Type
	handler
}

// on makes a row of the command table. W is the wrapper of the oneof, O the
// operation in it.
func on[W, O any](op uint32, name string, get func(W) O, run func(*tx, O) *commandpb.Rejection) row {
	return row{
		kind: reflect.TypeFor[W](),
		handler: handler{name: name, op: op, run: func(t *tx, w any) *commandpb.Rejection {
			return run(t, get(w.(W)))
		}},
	}
}

// commandTable is every command this release understands.
func commandTable() map[reflect.Type]handler {
	rows := []row{
		on(10, "RegisterService", func(w *commandpb.Command_RegisterService) *commandpb.RegisterService { return w.RegisterService }, (*tx).registerService),
		on(11, "DeregisterService", func(w *commandpb.Command_DeregisterService) *commandpb.DeregisterService { return w.DeregisterService }, (*tx).deregisterService),
		on(12, "RenewLease", func(w *commandpb.Command_RenewLease) *commandpb.RenewLease { return w.RenewLease }, (*tx).renewLease),
		on(13, "UpdateServiceHealth", func(w *commandpb.Command_UpdateServiceHealth) *commandpb.UpdateServiceHealth {
			return w.UpdateServiceHealth
		}, (*tx).updateServiceHealth),
		on(14, "DrainService", func(w *commandpb.Command_DrainService) *commandpb.DrainService { return w.DrainService }, (*tx).drainService),
		on(15, "PurgeServices", func(w *commandpb.Command_PurgeServices) *commandpb.PurgeServices { return w.PurgeServices }, (*tx).purgeServices),

		on(20, "PutPipeline", func(w *commandpb.Command_PutPipeline) *commandpb.PutPipeline { return w.PutPipeline }, (*tx).putPipeline),
		on(21, "DeletePipeline", func(w *commandpb.Command_DeletePipeline) *commandpb.DeletePipeline { return w.DeletePipeline }, (*tx).deletePipeline),
		on(22, "SetPipelineEnabled", func(w *commandpb.Command_SetPipelineEnabled) *commandpb.SetPipelineEnabled {
			return w.SetPipelineEnabled
		}, (*tx).setPipelineEnabled),

		on(30, "CommitSourceOffset", func(w *commandpb.Command_CommitSourceOffset) *commandpb.CommitSourceOffset {
			return w.CommitSourceOffset
		}, (*tx).commitSourceOffset),
		on(31, "AdvanceWatermark", func(w *commandpb.Command_AdvanceWatermark) *commandpb.AdvanceWatermark { return w.AdvanceWatermark }, (*tx).advanceWatermark),
		on(32, "SaveCheckpoint", func(w *commandpb.Command_SaveCheckpoint) *commandpb.SaveCheckpoint { return w.SaveCheckpoint }, (*tx).saveCheckpoint),
		on(33, "CommitGroupOffset", func(w *commandpb.Command_CommitGroupOffset) *commandpb.CommitGroupOffset { return w.CommitGroupOffset }, (*tx).commitGroupOffset),
		on(34, "CommitBatch", func(w *commandpb.Command_CommitBatch) *commandpb.CommitBatch { return w.CommitBatch }, (*tx).commitBatch),
		on(35, "DeleteCheckpoint", func(w *commandpb.Command_DeleteCheckpoint) *commandpb.DeleteCheckpoint { return w.DeleteCheckpoint }, (*tx).deleteCheckpoint),

		on(40, "JoinGroup", func(w *commandpb.Command_JoinGroup) *commandpb.JoinGroup { return w.JoinGroup }, (*tx).joinGroup),
		on(41, "LeaveGroup", func(w *commandpb.Command_LeaveGroup) *commandpb.LeaveGroup { return w.LeaveGroup }, (*tx).leaveGroup),
		on(42, "AssignPartitions", func(w *commandpb.Command_AssignPartitions) *commandpb.AssignPartitions { return w.AssignPartitions }, (*tx).assignPartitions),

		on(50, "RegisterSidecar", func(w *commandpb.Command_RegisterSidecar) *commandpb.RegisterSidecar { return w.RegisterSidecar }, (*tx).registerSidecar),
		on(51, "DeregisterSidecar", func(w *commandpb.Command_DeregisterSidecar) *commandpb.DeregisterSidecar { return w.DeregisterSidecar }, (*tx).deregisterSidecar),
		on(52, "TransitionSidecar", func(w *commandpb.Command_TransitionSidecar) *commandpb.TransitionSidecar { return w.TransitionSidecar }, (*tx).transitionSidecar),
		on(53, "ApplyAssignments", func(w *commandpb.Command_ApplyAssignments) *commandpb.ApplyAssignments { return w.ApplyAssignments }, (*tx).applyAssignments),
		on(54, "DrainSidecar", func(w *commandpb.Command_DrainSidecar) *commandpb.DrainSidecar { return w.DrainSidecar }, (*tx).drainSidecar),
		on(55, "UndrainSidecar", func(w *commandpb.Command_UndrainSidecar) *commandpb.UndrainSidecar { return w.UndrainSidecar }, (*tx).undrainSidecar),
		on(56, "EndHandovers", func(w *commandpb.Command_EndHandovers) *commandpb.EndHandovers { return w.EndHandovers }, (*tx).endHandovers),

		on(60, "PutOperation", func(w *commandpb.Command_PutOperation) *commandpb.PutOperation { return w.PutOperation }, (*tx).putOperation),
		on(61, "CancelOperation", func(w *commandpb.Command_CancelOperation) *commandpb.CancelOperation { return w.CancelOperation }, (*tx).cancelOperation),

		on(70, "BeginRestore", func(w *commandpb.Command_BeginRestore) *commandpb.BeginRestore { return w.BeginRestore }, (*tx).beginRestore),
		on(71, "StageRestore", func(w *commandpb.Command_StageRestore) *commandpb.StageRestore { return w.StageRestore }, (*tx).stageRestore),
		on(72, "SealRestore", func(w *commandpb.Command_SealRestore) *commandpb.SealRestore { return w.SealRestore }, (*tx).sealRestore),
		on(73, "ReportRestore", func(w *commandpb.Command_ReportRestore) *commandpb.ReportRestore { return w.ReportRestore }, (*tx).reportRestore),
		on(74, "SwapRestore", func(w *commandpb.Command_SwapRestore) *commandpb.SwapRestore { return w.SwapRestore }, (*tx).swapRestore),
		on(75, "AbandonRestore", func(w *commandpb.Command_AbandonRestore) *commandpb.AbandonRestore { return w.AbandonRestore }, (*tx).abandonRestore),
	}
	table := make(map[reflect.Type]handler, len(rows))
	for _, r := range rows {
		table[r.kind] = r.handler
	}
	return table
}
