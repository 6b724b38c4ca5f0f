package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

func newPipelineCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{Use: "pipeline", Aliases: []string{"pipelines"}, Short: "Apply, show and steer pipelines"}
	cmd.AddCommand(
		newPipelineApplyCommand(a),
		newPipelineGetCommand(a),
		newPipelineListCommand(a),
		newPipelineDeleteCommand(a),
		newPipelineEnableCommand(a, true),
		newPipelineEnableCommand(a, false),
		newPipelineValidateCommand(a),
		newPipelinePlanCommand(a),
		newPipelineExplainCommand(a),
	)
	return cmd
}

func newPipelineListCommand(a *app) *cobra.Command {
	var enabledOnly bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the pipelines",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var configs []*adminpb.PipelineConfig
				var statuses []*adminpb.PipelineStatus
				req := &adminpb.ListPipelinesRequest{IncludeDisabled: !enabledOnly, PageSize: 500}
				for {
					reply, err := c.Admin.ListPipelines(ctx, req)
					if err != nil {
						return err
					}
					configs = append(configs, reply.GetPipelines()...)
					statuses = append(statuses, reply.GetStatuses()...)
					if req.PageToken = reply.GetNextPageToken(); req.PageToken == "" {
						break
					}
				}
				return output.Print(a.stdout, a.format, output.Messages(configs), func() *output.Grid {
					g := &output.Grid{Header: []string{"ID", "ENABLED", "VERSION", "STAGES", "PENDING", "UPDATED"}}
					for i, p := range configs {
						var st *adminpb.PipelineStatus
						if i < len(statuses) {
							st = statuses[i]
						}
						g.Add(p.GetId(), yesNo(p.GetEnabled()), shownVersion(st.GetVersion(), st.GetEpoch()), len(p.GetStages()), pendingStages(p, st), when(st.GetUpdatedAt()))
					}
					return g
				})
			})
		},
	}
	cmd.Flags().BoolVar(&enabledOnly, "enabled-only", false, "leave out disabled pipelines")
	return cmd
}

// pendingStages counts the stages that wait; those of a disabled pipeline do not.
func pendingStages(p *adminpb.PipelineConfig, st *adminpb.PipelineStatus) string {
	if !p.GetEnabled() {
		return "-"
	}
	n := 0
	for _, pl := range st.GetPlacements() {
		if pl.GetPendingReason() != "" {
			n++
		}
	}
	return strconv.Itoa(n)
}

func newPipelineDeleteCommand(a *app) *cobra.Command {
	var missingOK bool
	var version pipelineVersion
	cmd := &cobra.Command{
		Use:   "delete ID...",
		Short: "Delete pipelines",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			expected, epoch, err := version.expected(cmd, len(args))
			if err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var errs []error
				var done []changed
				for _, id := range args {
					reply, err := c.Admin.DeletePipeline(ctx, &adminpb.DeletePipelineRequest{PipelineId: id, ExpectedVersion: expected, ExpectedEpoch: epoch})
					result := "deleted"
					switch {
					case err != nil:
						err = about("pipeline "+id, err)
					case !reply.GetSuccess():
						err = refused("pipeline "+id+" was not deleted", reply.GetError(), expected != nil)
					case !reply.GetExisted() && !missingOK:
						err = notFound("there is no pipeline %q; nothing was deleted", id)
					case !reply.GetExisted():
						result = "did not exist"
					}
					errs = append(errs, err)
					done = append(done, a.changed(id, result, err))
				}
				return a.allChanged(done, errs)
			})
		},
	}
	cmd.Flags().BoolVar(&missingOK, "ignore-missing", false, "succeed when a pipeline does not exist")
	version.add(cmd, "")
	return cmd
}

// changed is what became of a pipeline that was to be changed.
type changed struct {
	Pipeline string `json:"pipeline"`
	// Result is deleted, did not exist, enabled, disabled or failed.
	Result string `json:"result"`
	// Error says of a failed one why, and whether it was done.
	Error string `json:"error,omitempty"`
}

// changed notes that a change of pipeline id had a result, or failed with err, and
// tells people at once.
func (a *app) changed(id, result string, err error) changed {
	if err != nil {
		return changed{Pipeline: id, Result: "failed", Error: explain(err)}
	}
	if a.format == output.Table {
		fmt.Fprintf(a.stdout, "pipeline %s %s\n", id, result)
	}
	return changed{Pipeline: id, Result: result}
}

// allChanged tells programs what became of all, and returns what failed.
func (a *app) allChanged(all []changed, errs []error) error {
	if a.format != output.Table {
		errs = append(errs, output.Document(a.stdout, a.format, all))
	}
	return errors.Join(errs...)
}

func newPipelineEnableCommand(a *app, enable bool) *cobra.Command {
	verb, long := "enable", "Let a pipeline run: its stages are assigned to sidecars"
	if !enable {
		verb, long = "disable", "Stop a pipeline: its stages are taken from the sidecars, its config stays"
	}
	var version pipelineVersion
	cmd := &cobra.Command{
		Use:   verb + " ID...",
		Short: long,
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			expected, epoch, err := version.expected(cmd, len(args))
			if err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var errs []error
				var all []changed
				for _, id := range args {
					done, text, err := setEnabled(ctx, c, id, enable, expected, epoch)
					switch {
					case err != nil:
						err = about("pipeline "+id, err)
					case !done:
						err = notEnabled(ctx, c, id, text, expected != nil)
					}
					errs = append(errs, err)
					all = append(all, a.changed(id, verb+"d", err))
				}
				return a.allChanged(all, errs)
			})
		},
	}
	version.add(cmd, "")
	return cmd
}

func setEnabled(ctx context.Context, c *clients, id string, enable bool, expected, epoch *uint64) (bool, string, error) {
	if enable {
		reply, err := c.Admin.EnablePipeline(ctx, &adminpb.EnablePipelineRequest{PipelineId: id, ExpectedVersion: expected, ExpectedEpoch: epoch})
		return reply.GetSuccess(), reply.GetError(), err
	}
	reply, err := c.Admin.DisablePipeline(ctx, &adminpb.DisablePipelineRequest{
		PipelineId: id, Drain: true, ExpectedVersion: expected, ExpectedEpoch: epoch,
	})
	return reply.GetSuccess(), reply.GetError(), err
}

// notEnabled explains a refusal. The reply carries a text only, so that a
// missing pipeline is told from the rest by looking for it.
func notEnabled(ctx context.Context, c *clients, id, text string, conditional bool) error {
	reply, err := c.Admin.GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: id})
	if err == nil && !reply.GetFound() {
		return notFound("there is no pipeline %q; nothing was changed", id)
	}
	return refused("pipeline "+id+" was not changed", text, conditional)
}

// refused is a change the state did not allow, reported inside a reply.
func refused(what, text string, conditional bool) error {
	code := exitError
	if conditional {
		code = exitConflict
	}
	return codedError{code, fmt.Errorf("%s: %s", what, text)}
}
