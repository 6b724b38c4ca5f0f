package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// waitFlags say what a command waits for after its change.
type waitFlags struct {
	until   string
	timeout time.Duration
}

func (f *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.until, "wait", "", "wait until the pipelines are converged: every sidecar concerned has applied its part")
	cmd.Flags().DurationVar(&f.timeout, "wait-timeout", 2*time.Minute, "how long to wait")
	_ = cmd.RegisterFlagCompletionFunc("wait", cobra.FixedCompletions([]string{"converged"}, cobra.ShellCompDirectiveNoFileComp))
}

func (f *waitFlags) check(cmd *cobra.Command, dryRun bool) error {
	switch {
	case f.until != "" && f.until != "converged":
		return usageError{cmd, fmt.Errorf("--wait=%s is unknown; it can be converged", f.until)}
	case f.converged() && dryRun:
		return usageError{cmd, errors.New("--dry-run changes nothing, so there is nothing to --wait for")}
	case cmd.Flags().Changed("wait-timeout") && !f.converged():
		return usageError{cmd, errors.New("--wait-timeout is how long to --wait=converged, which is not given")}
	case f.timeout <= 0:
		return usageError{cmd, fmt.Errorf("--wait-timeout %v must be positive", f.timeout)}
	}
	return nil
}

func (f *waitFlags) converged() bool { return f.until != "" }

// convergence is how far the sidecars of a pipeline have come.
type convergence struct {
	Converged bool      `json:"converged"`
	Version   uint64    `json:"version"`
	Concerned uint32    `json:"concerned"`
	Applied   uint32    `json:"applied"`
	Seconds   float64   `json:"seconds"`
	Pending   []string  `json:"pending,omitempty"`
	Laggards  []laggard `json:"laggards,omitempty"`
	// Unreachable are nodes that did not say what their sidecars have applied.
	Unreachable []uint64 `json:"unreachable,omitempty"`
}

type laggard struct {
	Sidecar string `json:"sidecar"`
	Reason  string `json:"reason"`
}

const (
	convergePause    = 50 * time.Millisecond // between the first questions
	convergePauseMax = time.Second
	convergeAsk      = 10 * time.Second // for one answer
	shownLaggards    = 20
	briefly          = 3 // parts of what is missing while it is waited for
)

// awaitConverged waits for the pipelines of done, one after the other within one
// timeout, and notes in each what came of it. talk is that of the conversation.
func (a *app) awaitConverged(cmd *cobra.Command, talk context.Context, c *clients, done []applied, timeout time.Duration) error {
	// The deadline of the conversation is that of quick calls.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(talk), timeout)
	defer cancel()
	defer context.AfterFunc(cmd.Context(), cancel)()
	began := time.Now()
	var errs []error
	for i := range done {
		if done[i].Version == 0 {
			continue // failed, or not sent
		}
		r, err := a.untilConverged(ctx, c, done[i].Pipeline)
		if r != nil {
			r.Seconds = time.Since(began).Seconds()
			done[i].Convergence = r
		}
		switch {
		case err != nil:
			errs = append(errs, about("pipeline "+done[i].Pipeline+" was applied, but whether it converged is not known", err))
		case !r.Converged && cmd.Context().Err() != nil:
			errs = append(errs, cmd.Context().Err())
		case !r.Converged:
			errs = append(errs, codedError{exitDeadline, fmt.Errorf("pipeline %s was applied, but has not converged within %v:\n%s", done[i].Pipeline, timeout, r.missing())})
		case a.format == output.Table:
			fmt.Fprintf(a.stdout, "pipeline %s converged: version %d is applied by %s, after %.1f s\n", done[i].Pipeline, r.Version, count(r.Applied, "sidecar", "sidecars"), r.Seconds)
		}
	}
	return errors.Join(errs...)
}

// untilConverged asks until the pipeline has converged or ctx is done, and returns
// the last answer. An error means that there never was one, or that asking again
// does not help.
func (a *app) untilConverged(ctx context.Context, c *clients, pipeline string) (*convergence, error) {
	var last *convergence
	waiting := a.awaiting()
	for pause := convergePause; ; pause = min(2*pause, convergePauseMax) {
		ask, cancel := context.WithTimeout(ctx, convergeAsk)
		reply, err := c.Cluster.GetConvergence(ask, &clusterpb.GetConvergenceRequest{PipelineId: pipeline, MaxLaggards: shownLaggards}, grpc.WaitForReady(true))
		cancel()
		switch status.Code(err) {
		case codes.OK:
			last = convergenceOf(reply)
			if last.Converged {
				return last, nil
			}
			waiting.say(ctx, func() string { return "for pipeline " + pipeline + " to converge: " + last.brief() })
		case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Unknown:
			// A question may be repeated; the next node or leader answers it.
		default:
			return last, err
		}
		wait := time.NewTimer(pause)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			if last == nil {
				return nil, err
			}
			return last, nil
		}
	}
}

func convergenceOf(reply *clusterpb.GetConvergenceResponse) *convergence {
	r := &convergence{
		Converged: reply.GetConverged(), Version: reply.GetVersion(), Concerned: reply.GetConcerned(), Applied: reply.GetApplied(),
		Unreachable: reply.GetUnreachable(),
	}
	for _, p := range reply.GetPending() {
		if p.GetStageId() != "" {
			r.Pending = append(r.Pending, "stage "+p.GetStageId()+": "+p.GetReason())
		} else {
			r.Pending = append(r.Pending, p.GetReason())
		}
	}
	for _, l := range reply.GetLaggards() {
		r.Laggards = append(r.Laggards, laggard{l.GetSidecarId(), l.GetReason()})
	}
	return r
}

// brief says in a line what convergence lacks first of all.
func (r *convergence) brief() string {
	lines := strings.Split(r.missing(), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	text := strings.Join(lines[:min(len(lines), briefly)], "; ")
	if more := len(lines) - briefly; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	if r.missing() == "" {
		text = "it is not decided yet"
	}
	return fmt.Sprintf("%d of %s applied their part; %s", r.Applied, count(r.Concerned, "sidecar has", "sidecars have"), text)
}

// missing says what convergence lacks, a line each.
func (r *convergence) missing() string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, "  "+fmt.Sprintf(format, args...)) }
	for _, p := range r.Pending {
		add("%s", p)
	}
	for _, l := range r.Laggards {
		add("sidecar %s %s", l.Sidecar, l.Reason)
	}
	if more := int(r.Concerned) - int(r.Applied) - len(r.Laggards); more > 0 {
		add("and %d more sidecars", more)
	}
	for _, n := range r.Unreachable {
		add("node %d does not answer; what its sidecars have applied is not known", n)
	}
	return strings.Join(lines, "\n")
}
