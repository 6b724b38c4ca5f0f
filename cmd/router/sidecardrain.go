package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func newSidecarDrainCommand(a *app) *cobra.Command {
	var deadline, timeout time.Duration
	var remove, wait bool
	cmd := &cobra.Command{
		Use:   "drain ID",
		Short: "Take from a sidecar what others can run, and give it nothing more",
		Long: `Take from a sidecar what others can run, and give it nothing more, until it is
undrained. A stage that must not run twice is first taken from it, and given to
another sidecar when this one has confirmed that it let go of it, counts as gone, or
is out of time. What nobody else can run stays with it. Of a sidecar that drains already
the earlier deadline stands, unless it is only now to be removed: undrain it to give it
more time.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case deadline < 0 || (deadline > 0 && deadline < time.Millisecond) || deadline > 24*time.Hour:
				return usageError{cmd, fmt.Errorf("--deadline %v must be between 1ms and 24h", deadline)}
			case timeout <= 0:
				return usageError{cmd, fmt.Errorf("--wait-timeout %v must be positive", timeout)}
			case cmd.Flags().Changed("wait-timeout") && !wait:
				return usageError{cmd, errors.New("--wait-timeout is how long to --wait, which is not given")}
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.DrainSidecar(ctx, &clusterpb.DrainSidecarRequest{
					SidecarId: args[0], DeadlineMs: uint64(deadline.Milliseconds()), Remove: remove,
				})
				if err != nil {
					return about("sidecar "+args[0], err)
				}
				info := reply.GetSidecar()
				if wait {
					if info, err = a.awaitDrained(cmd, ctx, c, args[0], timeout); err != nil {
						return err
					}
				}
				if a.format != output.Table {
					if info != nil && !drained(info) {
						for _, line := range kept(ctx, c, info) {
							a.notice("%s", line)
						}
					}
					return output.Document(a.stdout, a.format, &clusterpb.DrainSidecarResponse{Sidecar: info, Revision: reply.GetRevision()})
				}
				switch {
				case info == nil:
					fmt.Fprintf(a.stdout, "sidecar %s is drained and removed\n", args[0])
				case drained(info):
					fmt.Fprintf(a.stdout, "sidecar %s is drained: it runs nothing\n", args[0])
				default:
					fmt.Fprintf(a.stdout, "sidecar %s drains%s: %s\n", args[0], drainedBy(info, deadline), drainLeft(info))
					for _, line := range kept(ctx, c, info) {
						fmt.Fprintf(a.stdout, "  %s\n", output.Clean(line))
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().DurationVar(&deadline, "deadline", 0, "how long it is waited for in all; 0 = each stage has placement.handover_timeout")
	cmd.Flags().BoolVar(&remove, "remove", false, "remove it once it runs nothing more, or at the deadline (5m if none is given)")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until it runs nothing more and has confirmed that")
	cmd.Flags().DurationVar(&timeout, "wait-timeout", 2*time.Minute, "how long to wait")
	return cmd
}

func newSidecarUndrainCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "undrain ID",
		Short: "Let a sidecar be given stages again; what has moved stays where it is",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				reply, err := c.Cluster.UndrainSidecar(ctx, &clusterpb.UndrainSidecarRequest{SidecarId: args[0]})
				if err != nil {
					return about("sidecar "+args[0], err)
				}
				if a.format != output.Table {
					return output.Document(a.stdout, a.format, reply)
				}
				switch {
				case reply.WasDraining == nil: // an older node does not tell
					fmt.Fprintf(a.stdout, "sidecar %s does not drain\n", args[0])
				case reply.GetWasDraining():
					fmt.Fprintf(a.stdout, "sidecar %s does not drain any more\n", args[0])
				default:
					fmt.Fprintf(a.stdout, "sidecar %s did not drain; nothing was changed\n", args[0])
				}
				return nil
			})
		},
	}
}

// drainedBy says by when the drain of a sidecar is over, and whether that is what was
// asked for: an earlier deadline stands.
func drainedBy(s *clusterpb.SidecarInfo, asked time.Duration) string {
	if s.GetDrainDeadline() == nil {
		return ""
	}
	by := s.GetDrainDeadline().AsTime()
	text := ", until " + by.UTC().Format(time.RFC3339) + " at the latest"
	// The clocks of this machine and the cluster's may differ by as much.
	if asked > 0 && time.Until(by) < asked-5*time.Second {
		text += " (it drained already, and the earlier deadline stands; undrain it to give it more time)"
	}
	return text
}

// drained is true for a sidecar that runs nothing and has nothing to let go of.
func drained(s *clusterpb.SidecarInfo) bool {
	return s.GetDraining() && len(s.GetAssignments()) == 0 && len(s.GetReleases()) == 0
}

// drainLeft says in a few words what a sidecar has left.
func drainLeft(s *clusterpb.SidecarInfo) string {
	var pipelines []string
	for _, as := range s.GetAssignments() {
		pipelines = append(pipelines, as.GetPipelineId())
	}
	slices.Sort(pipelines)
	var parts []string
	if len(pipelines) > 0 {
		parts = append(parts, "it runs stages of "+listedPipelines(pipelines))
	}
	if n := len(s.GetReleases()); n > 0 {
		parts = append(parts, "it has yet to confirm that it let go of "+count(uint32(n), "stage", "stages"))
	}
	if len(parts) == 0 {
		return "it runs nothing"
	}
	return strings.Join(parts, " and ")
}

// listedPipelines counts pipelines and names the first of them.
func listedPipelines(pipelines []string) string {
	text := count(uint32(len(pipelines)), "pipeline", "pipelines")
	if n := len(pipelines); n > 0 {
		text += " (" + strings.Join(pipelines[:min(n, 3)], ", ")
		if n > 3 {
			text += ", ..."
		}
		text += ")"
	}
	return text
}

// awaitDrained asks until the sidecar has nothing left, or is gone (nil).
func (a *app) awaitDrained(cmd *cobra.Command, talk context.Context, c *clients, id string, timeout time.Duration) (*clusterpb.SidecarInfo, error) {
	// The deadline of the conversation is that of quick calls.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(talk), timeout)
	defer cancel()
	defer context.AfterFunc(cmd.Context(), cancel)()
	var last *clusterpb.SidecarInfo
	waiting := a.awaiting()
	for pause := convergePause; ; pause = min(2*pause, convergePauseMax) {
		ask, end := context.WithTimeout(ctx, convergeAsk)
		reply, err := c.Cluster.GetSidecar(ask, &clusterpb.GetSidecarRequest{SidecarId: id})
		end()
		switch status.Code(err) {
		case codes.OK:
			if !reply.GetFound() || drained(reply.GetSidecar()) {
				return reply.GetSidecar(), nil
			}
			if !reply.GetSidecar().GetDraining() {
				return nil, codedError{exitConflict, fmt.Errorf("sidecar %s was undrained meanwhile", id)}
			}
			last = reply.GetSidecar()
			waiting.say(ctx, func() string {
				return "for sidecar " + id + " to be drained: " + strings.Join(append([]string{drainLeft(last)}, kept(ctx, c, last)...), "; ")
			})
		case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Unknown:
		default:
			return nil, about("sidecar "+id+" drains, but how far it is is not known", err)
		}
		next := time.NewTimer(pause)
		select {
		case <-next.C:
			continue
		case <-ctx.Done():
			next.Stop()
		}
		if err := cmd.Context().Err(); err != nil {
			return nil, err
		}
		if last == nil {
			return nil, about("sidecar "+id+" drains, but how far it is is not known", errors.Join(err, ctx.Err()))
		}
		return nil, codedError{exitDeadline, fmt.Errorf("sidecar %s drains, but is not done within %v: %s; 'router sidecar get %s' shows what keeps it%s",
			id, timeout, drainLeft(last), id, indented(a.keptAtLast(cmd, talk, c, last)))}
	}
}

// sidecarState shows the state of a sidecar and what is special about it.
func sidecarState(s *clusterpb.SidecarInfo) string {
	text := livenessOf(s)
	if words := drainState(s); words != "" {
		text += ", " + words
	}
	return text
}

// livenessOf says whether a sidecar is heard of.
func livenessOf(s *clusterpb.SidecarInfo) string {
	text := short(s.GetState().String(), "SIDECAR_STATE_")
	if s.GetGraceUntil() != nil {
		text += ", in grace"
	}
	return text
}

// drainState says whether a sidecar drains, "" if not.
func drainState(s *clusterpb.SidecarInfo) string {
	switch {
	case s.GetLeaves():
		return "leaving"
	case s.GetDraining():
		return "draining"
	}
	return ""
}

// sidecarSince says since when sidecarState holds; of one that is alive and drains,
// since when it drains, for a new registration changes nothing about that. When a
// drain began, older nodes do not tell.
func sidecarSince(s *clusterpb.SidecarInfo) string {
	changed, drain := s.GetStateChangedAt(), s.GetDrainSince()
	switch {
	case !s.GetDraining():
		return when(changed)
	case drain != nil && s.GetState() != clusterpb.SidecarState_SIDECAR_STATE_ALIVE && changed.AsTime().After(drain.AsTime()):
		return when(changed)
	}
	return when(drain)
}
