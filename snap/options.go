package snap

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Options holds the limits of a Store; EnsureDefaults fills zero values.
type Options struct {
	// Logger receives what the store repairs or ignores. Default: discarded.
	Logger *slog.Logger
	// Now is the clock that stamps images and ages partial receives.
	// Default: time.Now.
	Now func() time.Time
	// Sums remembers the checksums of tables. Stores of images of one state
	// may share it. Default: one of its own.
	Sums *SumCache

	// MaxManifestBytes bounds a manifest, which is held in memory.
	// Default 16 MiB: MaxFiles entries of at most 160 bytes in usual images.
	MaxManifestBytes int64
	// MaxFiles bounds the files of one image. Default 100,000, some 200 GiB
	// in tables of 2 MiB.
	MaxFiles int
	// MaxImageBytes bounds the files of one image together. It guards against
	// nonsense in a header, not against growth: default 1 TiB.
	MaxImageBytes int64
	// MaxChunkBytes bounds one chunk. Default 1 MiB, which leaves room for
	// framing under the 4 MiB message limit of common transports.
	MaxChunkBytes int

	// MaxPartials bounds the partial receives kept on disk; the one idle for
	// longest makes room for a new one. Default 2: the image being received
	// and one whose sender was replaced.
	MaxPartials int
	// MaxPartialAge is how long an idle partial receive is kept. Default 24 h.
	MaxPartialAge time.Duration
	// SyncBytes is how much is received at most between two fsyncs of the journal
	// and of the file that grows, which bounds what a power failure takes away.
	// Default 64 MiB.
	SyncBytes int64
	// WriteBackBytes is how much is received before its being written to the disk
	// is begun. What waits in memory for an fsync all goes to the disk then, and
	// holds up every other fsync there, the raft log's included. Default 512 KiB.
	WriteBackBytes int64

	// Inline makes a Receiver do everything by turns, on the goroutine of its caller:
	// for tests that count operations, and for simulations.
	Inline bool
}

// EnsureDefaults fills every zero value and returns o.
func (o *Options) EnsureDefaults() *Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Sums == nil {
		o.Sums = NewSumCache()
	}
	setDefault(&o.MaxManifestBytes, 16<<20)
	setDefault(&o.MaxFiles, 100_000)
	setDefault(&o.MaxImageBytes, 1<<40)
	setDefault(&o.MaxChunkBytes, 1<<20)
	setDefault(&o.MaxPartials, 2)
	setDefault(&o.MaxPartialAge, 24*time.Hour)
	setDefault(&o.SyncBytes, 64<<20)
	setDefault(&o.WriteBackBytes, 512<<10)
	return o
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Validate reports every fault of o at once. It expects defaults to be filled.
func (o *Options) Validate() error {
	var errs []error
	check := func(ok bool, name string, got any, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("snap: option %s is %v, must be %s", name, got, want))
		}
	}
	check(o.MaxManifestBytes > headerLen, "MaxManifestBytes", o.MaxManifestBytes, "more than the header")
	check(o.MaxManifestBytes <= maxBodyBytes, "MaxManifestBytes", o.MaxManifestBytes, "at most 9999999999")
	check(o.MaxFiles > 0, "MaxFiles", o.MaxFiles, "positive")
	check(o.MaxImageBytes > 0, "MaxImageBytes", o.MaxImageBytes, "positive")
	check(o.MaxImageBytes <= 1<<62, "MaxImageBytes", o.MaxImageBytes, "at most 2^62")
	check(o.MaxChunkBytes > 0, "MaxChunkBytes", o.MaxChunkBytes, "positive")
	check(o.MaxChunkBytes <= 1<<30, "MaxChunkBytes", o.MaxChunkBytes, "at most 2^30")
	check(o.MaxPartials > 0, "MaxPartials", o.MaxPartials, "positive")
	check(o.MaxPartialAge > 0, "MaxPartialAge", o.MaxPartialAge, "positive")
	check(o.SyncBytes > 0, "SyncBytes", o.SyncBytes, "positive")
	check(o.WriteBackBytes > 0, "WriteBackBytes", o.WriteBackBytes, "positive")
	return errors.Join(errs...)
}
