package server

import (
	"fmt"
	"path/filepath"

	"conveyor.etl/router/backup"
	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/recovery"
	"conveyor.etl/router/rpc"
)

// openShelf opens the snapshots that people made of the state, or brought.
func (s *storage) openShelf(o shelf.Options) error {
	var err error
	s.shelf, err = shelf.Open(s.files(), filepath.Join(s.dir, "backups"), o)
	if err != nil {
		return fmt.Errorf("open the snapshots: %w", err)
	}
	return nil
}

// schedule returns when backups are made by themselves; the zero value when never.
func (s *Server) schedule() backup.Schedule {
	b := s.c.Backup
	if b.Every == 0 {
		return backup.Schedule{}
	}
	return backup.Schedule{Every: b.Every, Dest: b.To, Keep: int(b.Keep)}
}

// startRecovery makes what backs the state up and restores it.
func (s *Server) startRecovery() error {
	var err error
	compare := s.control.checker.Wake
	if s.c.Check.Interval == 0 {
		compare = nil // nobody looks
	}
	s.recovery, err = recovery.New(recovery.Config{
		Trusted: s.gate.Err, Compare: compare,
		NodeID: s.c.NodeID, ClusterID: s.disk.id.ClusterID, ClusterName: s.disk.id.ClusterName, Version: ReadBuild().Version,
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Shelf: s.disk.shelf, FS: s.disk.files(),
		Endpoint:       actual(s.c.AdvertiseAddr, s.clientLis),
		Schedule:       s.schedule(),
		Judge:          rpc.Judge,
		MaxUploadBytes: s.c.Backup.MaxBytes, Now: s.o.Now, Logger: s.log.With("part", "recovery"),
	})
	return err
}
