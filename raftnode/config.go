package raftnode

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"go.etcd.io/raft/v3"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// Config holds every limit and interval of a Node. Zero values are filled by
// EnsureDefaults; Validate reports all faults at once.
type Config struct {
	// ID is the raft id of this node; never zero, never reused.
	ID uint64

	// TickInterval is the unit of raft's time.
	TickInterval time.Duration
	// ElectionTicks without a leader start an election; raft randomises the
	// number to [ElectionTicks, 2*ElectionTicks). 15 ticks of 10 ms give
	// elections after 150 to 300 ms.
	ElectionTicks int
	// HeartbeatTicks lie between two heartbeats of a leader.
	HeartbeatTicks int

	// MaxSizePerMsg bounds the entries of one message to a peer, in bytes.
	MaxSizePerMsg uint64
	// MaxInflightMsgs and MaxInflightBytes bound what is on its way to a peer
	// without an answer.
	MaxInflightMsgs  int
	MaxInflightBytes uint64
	// MaxCommittedBytes bounds the committed entries handed to the applier and
	// not yet applied.
	MaxCommittedBytes uint64
	// MaxUncommittedBytes bounds what a leader has appended and not applied;
	// beyond it proposals fail with ErrBusy.
	MaxUncommittedBytes uint64

	// MaxCommandBytes bounds one command; larger ones fail with ErrTooLarge.
	MaxCommandBytes int
	// MaxBatchBytes bounds the commands packed into one entry. A larger command
	// gets an entry of its own.
	MaxBatchBytes int
	// MaxBatchesInFlight bounds own batches proposed and not yet applied. One is
	// right for a local network: while a batch is on its way, the next one
	// gathers, and large batches cost a fraction of small ones. More pays only
	// when the round trip is much longer than a sync.
	MaxBatchesInFlight int
	// MaxWaiting and MaxWaitingBytes bound the commands that wait for a result,
	// proposed or not; beyond them Propose fails with ErrBusy. Commands of 64 KiB
	// and more fill no more than half of the bytes.
	MaxWaiting      int
	MaxWaitingBytes int64
	// MaxApplyBytes ends one call of StateMachine.Apply, so that the first
	// callers of a long backlog do not wait for the last.
	MaxApplyBytes int
	// MaxPeerInboxBytes bounds the messages of one peer that wait for the loop;
	// beyond it they are dropped, which raft tolerates.
	MaxPeerInboxBytes int64

	// TailBytes of readable log start a truncation; TrailingBytes are kept for
	// followers that are a little behind.
	TailBytes     int64
	TrailingBytes int64
	// MaxTailEntries starts a truncation by count.
	MaxTailEntries uint64
	// FollowerTailBytes is how long the log may grow to spare a follower that
	// can still catch up from it a whole image.
	FollowerTailBytes int64
	// PinnedTailBytes is how long the log may grow behind an image on its way.
	// Beyond it memory comes first and the follower will need another image.
	PinnedTailBytes int64

	// MaxImageSenders bounds images being sent at the same time.
	MaxImageSenders int
	// ImageTimeout bounds the sending of one image.
	ImageTimeout time.Duration
	// ImageRetry is the pause after an image could not be built, and how long a
	// fresh image holds the log while raft gets round to sending it.
	ImageRetry time.Duration
	// KeepImages of the newest images stay on disk.
	KeepImages int

	// CrowdedRounds is how many rounds of reads in a tick are so many that a leader has
	// them confirmed by no more followers than it needs, and how many batches are so
	// many that news of one's commit travels with the next.
	CrowdedRounds int
	// ReadRetry is when an unanswered ReadIndex is asked again; ReadTimeout is
	// when its callers are told.
	ReadRetry   time.Duration
	ReadTimeout time.Duration
	// AmbiguousAfter bounds how long a command proposed in a lost leadership
	// stays undecided before its caller gets ErrAmbiguous.
	AmbiguousAfter time.Duration
	// TransferTimeout bounds TransferLeader.
	TransferTimeout time.Duration
	// StallTransfer is the age of the append queue's head at which a leader
	// hands over; StallFail is the age at which the node gives up.
	StallTransfer time.Duration
	StallFail     time.Duration
	// PromoteMaxLag is how many entries a learner may lack when promoted.
	PromoteMaxLag uint64

	// Logger receives warnings and, at debug level, raft's own chatter.
	Logger *slog.Logger
	// Clock is the source of time.
	Clock Clock
	// Events are told what happens.
	Events EventListener
	// Incarnation distinguishes the batches of this run of the node from those
	// of earlier runs; zero draws one at random. Tests fix it.
	Incarnation uint64
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// EnsureDefaults fills unset fields and returns c.
func (c *Config) EnsureDefaults() *Config {
	setDefault(&c.TickInterval, 10*time.Millisecond)
	setDefault(&c.ElectionTicks, 15)
	setDefault(&c.HeartbeatTicks, 5)
	setDefault(&c.MaxSizePerMsg, 1*mib)
	setDefault(&c.MaxInflightMsgs, 256)
	setDefault(&c.MaxInflightBytes, 64*mib)
	setDefault(&c.MaxCommittedBytes, 64*mib)
	setDefault(&c.MaxUncommittedBytes, 256*mib)
	setDefault(&c.MaxCommandBytes, 4*mib+64*kib)
	setDefault(&c.MaxBatchBytes, 1*mib)
	setDefault(&c.MaxBatchesInFlight, 1)
	setDefault(&c.MaxWaiting, 100_000)
	setDefault(&c.MaxWaitingBytes, 128*mib)
	setDefault(&c.MaxApplyBytes, 8*mib)
	setDefault(&c.MaxPeerInboxBytes, 64*mib)
	setDefault(&c.TailBytes, 32*mib)
	setDefault(&c.TrailingBytes, c.TailBytes/2)
	setDefault(&c.MaxTailEntries, 200_000)
	setDefault(&c.FollowerTailBytes, 2*c.TailBytes)
	setDefault(&c.PinnedTailBytes, 8*c.TailBytes)
	setDefault(&c.MaxImageSenders, 2)
	setDefault(&c.ImageTimeout, 10*time.Minute)
	setDefault(&c.ImageRetry, 5*time.Second)
	setDefault(&c.KeepImages, 2)
	setDefault(&c.CrowdedRounds, 4)
	setDefault(&c.ReadRetry, 500*time.Millisecond)
	setDefault(&c.ReadTimeout, 5*time.Second)
	setDefault(&c.AmbiguousAfter, 5*time.Second)
	setDefault(&c.TransferTimeout, 2*time.Second)
	setDefault(&c.StallTransfer, 2*time.Second)
	setDefault(&c.StallFail, 30*time.Second)
	setDefault(&c.PromoteMaxLag, 1000)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = SystemClock{}
	}
	c.Events.ensureDefaults()
	return c
}

// Validate reports every field that cannot work. Call EnsureDefaults first.
func (c *Config) Validate() error {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("raftnode: config: "+format, args...))
		}
	}
	check(c.ID != 0 && !raft.IsLocalMsgTarget(c.ID), "ID %d is not a raft id", c.ID)
	check(c.TickInterval > 0, "TickInterval %v is not positive", c.TickInterval)
	check(c.CrowdedRounds > 0, "CrowdedRounds %d is not positive", c.CrowdedRounds)
	check(c.HeartbeatTicks > 0, "HeartbeatTicks %d is not positive", c.HeartbeatTicks)
	check(c.ElectionTicks > c.HeartbeatTicks, "ElectionTicks %d must exceed HeartbeatTicks %d", c.ElectionTicks, c.HeartbeatTicks)
	check(c.MaxInflightMsgs > 0, "MaxInflightMsgs %d is not positive", c.MaxInflightMsgs)
	check(c.MaxInflightBytes >= c.MaxSizePerMsg, "MaxInflightBytes %d is below MaxSizePerMsg %d", c.MaxInflightBytes, c.MaxSizePerMsg)
	check(c.MaxCommandBytes > 0, "MaxCommandBytes %d is not positive", c.MaxCommandBytes)
	check(c.MaxBatchBytes > 0, "MaxBatchBytes %d is not positive", c.MaxBatchBytes)
	check(c.MaxBatchesInFlight > 0, "MaxBatchesInFlight %d is not positive", c.MaxBatchesInFlight)
	check(c.MaxWaiting > 0, "MaxWaiting %d is not positive", c.MaxWaiting)
	check(c.MaxWaitingBytes >= int64(c.MaxCommandBytes), "MaxWaitingBytes %d is below MaxCommandBytes %d: such a command could never be proposed", c.MaxWaitingBytes, c.MaxCommandBytes)
	check(c.MaxApplyBytes > 0, "MaxApplyBytes %d is not positive", c.MaxApplyBytes)
	check(c.MaxPeerInboxBytes > int64(c.MaxSizePerMsg)+int64(c.MaxCommandBytes), "MaxPeerInboxBytes %d would drop every message of %d bytes", c.MaxPeerInboxBytes, c.MaxSizePerMsg)
	check(c.TrailingBytes > 0 && c.TrailingBytes <= c.TailBytes, "TrailingBytes %d must lie in (0, TailBytes %d]", c.TrailingBytes, c.TailBytes)
	check(c.FollowerTailBytes >= c.TailBytes, "FollowerTailBytes %d is below TailBytes %d", c.FollowerTailBytes, c.TailBytes)
	check(c.PinnedTailBytes >= c.FollowerTailBytes, "PinnedTailBytes %d is below FollowerTailBytes %d", c.PinnedTailBytes, c.FollowerTailBytes)
	check(c.MaxImageSenders > 0, "MaxImageSenders %d is not positive", c.MaxImageSenders)
	check(c.KeepImages > 0, "KeepImages %d is not positive", c.KeepImages)
	for _, d := range []struct {
		name string
		d    time.Duration
	}{
		{"ImageTimeout", c.ImageTimeout}, {"ImageRetry", c.ImageRetry}, {"ReadRetry", c.ReadRetry},
		{"ReadTimeout", c.ReadTimeout}, {"AmbiguousAfter", c.AmbiguousAfter}, {"TransferTimeout", c.TransferTimeout},
		{"StallTransfer", c.StallTransfer}, {"StallFail", c.StallFail},
	} {
		check(d.d > 0, "%s %v is not positive", d.name, d.d)
	}
	check(c.StallFail > c.StallTransfer, "StallFail %v must exceed StallTransfer %v", c.StallFail, c.StallTransfer)
	return errors.Join(errs...)
}
