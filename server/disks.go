package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/rpc"
)

// disksName is the file that remembers the data directories of the other nodes.
const disksName = "PEERS"

// disks implements rpc.Disks over a file.
type disks struct {
	name   string
	points *crashpoint.Points

	// mu is held while the file is written: nobody is accepted before.
	mu    sync.Mutex
	known map[uint64]uint64
}

var _ rpc.Disks = (*disks)(nil)

func openDisks(dir string, points *crashpoint.Points) (*disks, error) {
	d := &disks{points: points, name: filepath.Join(dir, disksName), known: map[uint64]uint64{}}
	raw, err := os.ReadFile(d.name)
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the data directories of the other nodes: %w", err)
	}
	stored := map[string]string{}
	if err := json.Unmarshal(raw, &stored); err != nil {
		return nil, fmt.Errorf("%w: %s is damaged (%v); restore it, or remove it when every other node still has its data directory",
			ErrIncomplete, d.name, err)
	}
	for node, disk := range stored {
		n, err1 := strconv.ParseUint(node, 10, 64)
		v, err2 := strconv.ParseUint(disk, 16, 64)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrIncomplete, d.name, err)
		}
		d.known[n] = v
	}
	return d, nil
}

// Check implements rpc.Disks.
func (d *disks) Check(node, disk uint64) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if have, ok := d.known[node]; ok {
		return have == disk, nil
	}
	return true, d.setLocked(map[uint64]uint64{node: disk})
}

// learn takes over what the group has agreed on. Failing to write it down is no
// harm: the group says so again at the next start.
func (d *disks) learn(members []raftnode.Member) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	news := map[uint64]uint64{}
	for _, m := range members {
		if !m.Removed && m.Disk != 0 && d.known[m.ID] != m.Disk {
			news[m.ID] = m.Disk
		}
	}
	if len(news) == 0 {
		return nil
	}
	return d.setLocked(news)
}

func (d *disks) setLocked(news map[uint64]uint64) error {
	stored := map[string]string{}
	for n, v := range d.known {
		stored[strconv.FormatUint(n, 10)] = fmt.Sprintf("%016x", v)
	}
	for n, v := range news {
		stored[strconv.FormatUint(n, 10)] = fmt.Sprintf("%016x", v)
	}
	raw, err := json.MarshalIndent(stored, "", "  ")
	if err == nil {
		d.points.Pass("peers:before")
		err = datadir.WriteFile(d.name, append(raw, '\n'))
		d.points.Pass("peers:after")
	}
	if err != nil {
		return fmt.Errorf("record the data directories of the other nodes: %w", err)
	}
	for n, v := range news {
		d.known[n] = v
	}
	return nil
}
