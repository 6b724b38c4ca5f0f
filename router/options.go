package router

import (
	"errors"
	"fmt"
	"log/slog"
)

// Options holds what may differ between replicas without making their states
// differ: nothing here may influence the outcome of a command.
type Options struct {
	// Bootstrap is the position a state begins at when the directory is empty.
	// Every initial node of a cluster starts from the identical one.
	Bootstrap Position
	Logger    *slog.Logger
	// MemTableBytes is the size of one Pebble memtable. Everything in it is
	// lost by a crash and replayed from the log.
	MemTableBytes int64
	// CacheBytes bounds Pebble's block cache, beside the memtables.
	CacheBytes int64
	// HotBytes bounds the records kept decoded between batches: offsets,
	// watermarks and groups that are written again and again.
	HotBytes int64
	// RecordBytes bounds the records kept in memory because they are read.
	RecordBytes int64
	// HistoryBytes bounds the changes kept for subscribers.
	HistoryBytes int64
	// BatchBytes is where a long run of entries is cut into several Pebble
	// batches, always between two entries.
	BatchBytes int64
	// Installed is called by Install, with what removes the old state and lets
	// compactions of the new one begin. To call it later leaves the node that time
	// for catching up; Close calls it at the latest. Installed must not block. nil:
	// it is called at once.
	Installed func(settle func())
}

// EnsureDefaults fills the zero fields and returns o.
func (o Options) EnsureDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.MemTableBytes, 32<<20)
	def(&o.CacheBytes, 64<<20)
	def(&o.HotBytes, 16<<20)
	def(&o.RecordBytes, 64<<20)
	def(&o.HistoryBytes, 32<<20)
	def(&o.BatchBytes, 4<<20)
	return o
}

// Validate reports every fault of o at once.
func (o Options) Validate() error {
	var errs []error
	check := func(name string, v, low, high int64) {
		if v < low || v > high {
			errs = append(errs, fmt.Errorf("router: %s is %d, must be between %d and %d", name, v, low, high))
		}
	}
	if o.Bootstrap.Index == 0 || o.Bootstrap.Term == 0 {
		errs = append(errs, errors.New("router: Bootstrap needs an index and a term above 0"))
	}
	check("MemTableBytes", o.MemTableBytes, 256<<10, 1<<30)
	check("CacheBytes", o.CacheBytes, 1<<20, 1<<36)
	check("HotBytes", o.HotBytes, 64<<10, 1<<34)
	check("RecordBytes", o.RecordBytes, 64<<10, 1<<36)
	check("HistoryBytes", o.HistoryBytes, 1<<10, 1<<34)
	check("BatchBytes", o.BatchBytes, 4<<10, 1<<30)
	return errors.Join(errs...)
}
