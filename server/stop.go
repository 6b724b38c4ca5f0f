package server

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Stop ends the node in the order that hurts clients least, each step bounded
// by ctx: leadership moves to another node, health turns to NOT_SERVING, streams
// end, calls in progress get their answers, raft stops, the state is flushed so
// that the next start is quick, everything is closed. Nothing acknowledged is
// lost even if Stop does not finish: the log alone holds it.
func (s *Server) Stop(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.stop(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		// The steps are bounded by ctx too; a moment more lets them end.
		grace := time.NewTimer(2 * time.Second)
		defer grace.Stop()
		select {
		case err := <-done:
			return err
		case <-grace.C:
			return fmt.Errorf("the node did not stop in time; end the process, nothing acknowledged is lost: %w", ctx.Err())
		}
	}
}

func (s *Server) stop(ctx context.Context) error {
	healthy := s.Err() == nil
	if healthy && s.node.Leadership().Leading && len(s.node.Status().Position.ConfState.GetVoters()) > 1 {
		// raft gives a transfer one election timeout; when the whole cluster is
		// being stopped there may be nobody left to take over.
		share, cancel := context.WithTimeout(ctx, s.c.Raft.ElectionTimeout)
		s.control.liveness.Share(share)
		cancel()
		transfer, cancel := context.WithTimeout(ctx, 2*s.c.Raft.ElectionTimeout)
		err := s.node.TransferLeader(transfer, 0)
		cancel()
		if err != nil {
			s.log.Warn("leadership could not be handed over; the others will elect a leader themselves", "err", err)
		}
	}
	s.api.Shutdown(ctx)
	if healthy {
		// What other nodes sent here while this one led is decided by the new
		// leader's first entry; stopping before would leave their callers with
		// an unknown outcome.
		answer, cancel := context.WithTimeout(ctx, 2*s.c.Raft.ElectionTimeout)
		if err := s.handler.Drain(answer); err != nil {
			s.log.Warn("some commands of other nodes are left without an answer; their callers will take the outcome for unknown", "err", err)
		}
		cancel()
	}
	s.stopLoops()
	s.loops.Wait()
	s.stopNode()
	<-s.nodeDone
	var errs []error
	if healthy && s.Err() == nil {
		if _, err := s.disk.fsm.Flush(); err != nil {
			errs = append(errs, fmt.Errorf("flush the state: %w", err))
		}
	}
	errs = append(errs, s.closeAll())
	s.log.Info("stopped", "event", "stopped")
	return errors.Join(errs...)
}

// closeAll closes what runs no more, from the network to the disk.
func (s *Server) closeAll() error {
	var errs []error
	if s.forwarder != nil {
		errs = append(errs, s.forwarder.Close())
	}
	if s.peers != nil {
		s.peers.Stop()
	}
	if s.transport != nil {
		errs = append(errs, s.transport.Close())
	}
	if s.debug != nil {
		errs = append(errs, s.debug.Close())
	}
	s.serving.Wait()
	if s.study != nil {
		s.study.Close()
	}
	// Those of servers that never ran; the others are closed already.
	if s.peerLis != nil {
		_ = s.peerLis.Close()
	}
	if s.clientLis != nil {
		_ = s.clientLis.Close()
	}
	if s.disk != nil {
		errs = append(errs, s.disk.close())
	}
	return errors.Join(errs...)
}

// abort undoes a Start that failed on the way.
func (s *Server) abort() {
	if s.stopNode != nil {
		s.stopLoops()
		s.loops.Wait()
		s.stopNode()
		<-s.nodeDone
	}
	if err := s.closeAll(); err != nil {
		s.log.Warn("cleaning up after a failed start", "err", err)
	}
}
