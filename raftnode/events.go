package raftnode

import "time"

// EventListener receives what a Node does, for metrics and logs. Every field may
// be nil. The functions are called by the goroutine that did the work: they must
// return at once, must not call the Node, and may be called concurrently.
type EventListener struct {
	// LeaderChanged: this node follows another leader or term, or none (Leader 0).
	LeaderChanged func(Leadership)
	// BatchProposed: commands were packed into one entry and handed to raft.
	BatchProposed func(commands int, bytes int)
	// AppendSynced: the log made entries durable.
	AppendSynced func(d time.Duration, entries int, bytes int64)
	// Applied: the state machine took entries holding commands in all.
	Applied func(d time.Duration, entries, commands int)
	// ProposalsLost: commands of an earlier leadership were overwritten; their
	// callers were told that they will never take effect.
	ProposalsLost func(commands int)
	// MembershipChanged: a configuration change was applied here.
	MembershipChanged func(Position)
	// ImageBuilt: an image of the state was made (err nil) or not.
	ImageBuilt func(d time.Duration, index uint64, bytes int64, err error)
	// ImageSent: a peer has stored an image (err nil) or not.
	ImageSent func(to uint64, d time.Duration, bytes int64, err error)
	// ImageInstalled: the state was replaced by a received image.
	ImageInstalled func(d time.Duration, index uint64)
	// LogTruncated: the log now begins after index.
	LogTruncated func(index uint64)
	// DiskStalled: the head of the append queue has waited for age.
	DiskStalled func(age time.Duration)
	// MessagesDropped: peer messages found the inbox over its budget.
	MessagesDropped func(from uint64, n int)
}

// ensureDefaults replaces nil functions so that callers need no check.
func (e *EventListener) ensureDefaults() {
	if e.LeaderChanged == nil {
		e.LeaderChanged = func(Leadership) {}
	}
	if e.BatchProposed == nil {
		e.BatchProposed = func(int, int) {}
	}
	if e.AppendSynced == nil {
		e.AppendSynced = func(time.Duration, int, int64) {}
	}
	if e.Applied == nil {
		e.Applied = func(time.Duration, int, int) {}
	}
	if e.ProposalsLost == nil {
		e.ProposalsLost = func(int) {}
	}
	if e.MembershipChanged == nil {
		e.MembershipChanged = func(Position) {}
	}
	if e.ImageBuilt == nil {
		e.ImageBuilt = func(time.Duration, uint64, int64, error) {}
	}
	if e.ImageSent == nil {
		e.ImageSent = func(uint64, time.Duration, int64, error) {}
	}
	if e.ImageInstalled == nil {
		e.ImageInstalled = func(time.Duration, uint64) {}
	}
	if e.LogTruncated == nil {
		e.LogTruncated = func(uint64) {}
	}
	if e.DiskStalled == nil {
		e.DiskStalled = func(time.Duration) {}
	}
	if e.MessagesDropped == nil {
		e.MessagesDropped = func(uint64, int) {}
	}
}
