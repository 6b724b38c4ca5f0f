package server

import (
	"fmt"
	"path/filepath"

	"github.com/cockroachdb/pebble/v2/vfs"

	"conveyor.etl/router/backup/shelf"
	"conveyor.etl/router/recovery"
)

// openShelf opens the snapshots that people made of the state, or brought.
func (s *storage) openShelf(o shelf.Options) error {
	var err error
	s.shelf, err = shelf.Open(s.points.FS(vfs.Default), filepath.Join(s.dir, "backups"), o)
	if err != nil {
		return fmt.Errorf("open the snapshots: %w", err)
	}
	return nil
}

// startRecovery makes what backs the state up and restores it.
func (s *Server) startRecovery() error {
	var err error
	s.recovery, err = recovery.New(recovery.Config{
		NodeID: s.c.NodeID, ClusterID: s.disk.id.ClusterID, ClusterName: s.disk.id.ClusterName, Version: ReadBuild().Version,
		Node: s.node, State: s.disk.fsm, Submit: s.forwarder, Shelf: s.disk.shelf, FS: s.disk.points.FS(vfs.Default),
		MaxUploadBytes: s.c.Backup.MaxBytes, Now: s.o.Now, Logger: s.log.With("part", "recovery"),
	})
	return err
}
