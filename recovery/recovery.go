package recovery

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// What can be wrong with a request; nothing was changed.
var (
	// ErrBusy: this node carries out as many transfers as it may.
	ErrBusy = errors.New("recovery: too many transfers at a time")
	// ErrDamaged: the snapshot is not what it was when it was made.
	ErrDamaged = errors.New("recovery: the snapshot is damaged")
	// ErrNoUndo: no restore has replaced a state that is still here.
	ErrNoUndo = errors.New("recovery: there is nothing to go back to")
)

// Node is what a Recovery needs of the local replica.
type Node interface {
	Leadership() raftnode.Leadership
	Status() raftnode.Status
	ReadIndex(ctx context.Context) (uint64, error)
}

// Config wires a Recovery.
type Config struct {
	NodeID      uint64
	ClusterID   uint64
	ClusterName string
	// Version is that of this program, for people.
	Version string
	// Endpoint is where clients reach this node; written into backups.
	Endpoint string
	// Schedule says when the leader backs the state up by itself.
	Schedule backup.Schedule
	Node     Node
	State    *router.FSM
	Submit   Submitter
	Shelf    *shelf.Shelf
	// Judge says of an error of Submit whether it means that nothing was and will
	// be done, and whether trying again does not help. Required.
	Judge func(err error) (notDone, final bool)
	// Trusted returns why the state of this node may be wrong, nil while nothing is
	// known against it. It must not block. Default: nothing ever is.
	Trusted func() error
	// Compare has the states of the members compared soon, whose result comes to
	// Agreed; nil when they are never compared: then backups that this node makes by
	// itself do not wait for it, and do not say that they were. It must not block.
	Compare func()
	// CompareWait bounds the wait for that. Default 1 min.
	CompareWait time.Duration
	// FS is the file system of State and Shelf.
	FS vfs.FS
	// MaxTransfers bounds the uploads and downloads of this node at a time.
	// Default 4.
	MaxTransfers int
	// MaxUploadBytes bounds the state in an uploaded archive. Default 64 GiB.
	MaxUploadBytes int64
	// StallAfter is how long a restore may stand still before the leader takes
	// it for given up. Default 1 min.
	StallAfter time.Duration
	// ReadyWait bounds how long a swap waits for replicas other than the leader
	// and this one to have prepared. Default 10 s.
	ReadyWait time.Duration
	Now       func() time.Time
	Logger    *slog.Logger
}

func (c *Config) ensureDefaults() {
	if c.MaxTransfers <= 0 {
		c.MaxTransfers = 4
	}
	if c.MaxUploadBytes <= 0 {
		c.MaxUploadBytes = 64 << 30
	}
	if c.StallAfter <= 0 {
		c.StallAfter = time.Minute
	}
	if c.ReadyWait <= 0 {
		c.ReadyWait = 10 * time.Second
	}
	if c.CompareWait <= 0 {
		c.CompareWait = time.Minute
	}
	if c.Trusted == nil {
		c.Trusted = func() error { return nil }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Recovery makes, keeps and restores the snapshots of one node. Its methods are
// safe for concurrent use.
type Recovery struct {
	c   Config
	log *slog.Logger

	// undoMu is held while the undo point is put among the snapshots, so that who
	// asks for it finds it there.
	undoMu sync.Mutex

	// ctx ends when Run does; restores of this node run in it.
	mu      sync.Mutex
	ctx     context.Context
	wg      sync.WaitGroup
	running map[string]bool // operations this process carries out
	// transfers holds the uploads and downloads in progress.
	transfers map[*transfer]struct{}
	agreement agreement
	// prepared holds the restores this process has prepared, or when it failed to.
	prepared map[string]preparation
}

// preparation is what came of preparing a restore.
type preparation struct {
	done   bool
	failed time.Time
	sealed bool // the restore was, when it ended
}

// New returns a Recovery; Run starts what works by itself.
func New(c Config) (*Recovery, error) {
	c.ensureDefaults()
	if c.Node == nil || c.State == nil || c.Submit == nil || c.Shelf == nil || c.FS == nil || c.Judge == nil || c.NodeID == 0 {
		return nil, errors.New("recovery: NodeID, Node, State, Submit, Judge, Shelf and FS are required")
	}
	if err := c.Schedule.Validate(); err != nil {
		return nil, err
	}
	return &Recovery{
		agreement: agreement{changed: make(chan struct{})},
		c:         c, log: c.Logger, transfers: map[*transfer]struct{}{}, running: map[string]bool{}, prepared: map[string]preparation{},
	}, nil
}

// Run follows the restores of the cluster until ctx is done: it prepares what is
// staged, goes on with what this node had begun before it was restarted, keeps
// the undo point where users find it, and, on the leader, gives up what stands
// still. It returns when everything it started has ended.
func (r *Recovery) Run(ctx context.Context) {
	r.mu.Lock()
	r.ctx = ctx
	r.mu.Unlock()
	r.wg.Go(func() { r.follow(ctx) })
	r.wg.Go(func() { r.watch(ctx) })
	if r.c.Schedule.Enabled() {
		r.wg.Go(func() { r.runSchedule(ctx) })
	}
	<-ctx.Done()
	// Nothing is spawned from here on, so that Wait sees everything there is.
	r.mu.Lock()
	r.ctx = nil
	r.mu.Unlock()
	r.wg.Wait()
}

// claim makes the caller the one that carries out operation id in this process;
// false when somebody does so already. It comes before the operation can be seen
// in the state, or follow would take it for one to go on with.
func (r *Recovery) claim(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running[id] {
		return false
	}
	r.running[id] = true
	return true
}

func (r *Recovery) release(id string) {
	r.mu.Lock()
	delete(r.running, id)
	r.mu.Unlock()
}

// spawn runs fn for a claimed operation and releases it afterwards. It reports
// false, and releases at once, when the process is about to end.
func (r *Recovery) spawn(id string, fn func(ctx context.Context)) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx == nil {
		delete(r.running, id)
		return false
	}
	ctx := r.ctx
	r.wg.Go(func() {
		defer r.release(id)
		fn(ctx)
	})
	return true
}
