package server

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/router"
	"conveyor.etl/router/snap"
)

const (
	// warmEvery is how often a node looks for tables it has not read since it was
	// started: those it began with. The others were summed up while they were written,
	// or received.
	warmEvery = time.Minute
	// warmRate bounds how fast they are read, in bytes a second: nobody waits.
	warmRate = 64 << 20
)

// warmer reads the tables of the state ahead of the images that will be made of
// it. Otherwise the first image after a start, which a client may wait for, would
// read the whole state.
type warmer struct {
	images *snap.Store
	root   string // of the state
	log    *slog.Logger
}

// run works until ctx is done.
func (w *warmer) run(ctx context.Context) {
	limit := snap.NewRateLimit(warmRate, 1<<20)
	tick := time.NewTicker(warmEvery)
	defer tick.Stop()
	for {
		dir, err := router.CurrentDir(vfs.Default, w.root)
		if err == nil {
			_, err = w.images.Warm(ctx, dir, limit)
		}
		// The state may be replaced meanwhile, and its directory removed.
		if err != nil && ctx.Err() == nil && !errors.Is(err, fs.ErrNotExist) {
			w.log.Warn("could not read the tables of the state ahead of the next image, which will take longer", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
