package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/manifest"
	"conveyor.etl/router/output"
	"conveyor.etl/router/rpc"
	"conveyor.etl/router/rpc/client"
	"conveyor.etl/router/rpc/routerpb/adminpb"
)

// manifestFlags are those of the commands that read files.
type manifestFlags struct {
	files        []string
	strict       bool
	noReferences bool
}

func (f *manifestFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&f.files, "filename", "f", nil, "file or folder to read, - for standard input; repeatable")
	cmd.Flags().BoolVar(&f.strict, "strict", false, "take warnings for errors")
	cmd.Flags().BoolVar(&f.noReferences, "skip-references", false, "do not require the Sources, Transforms and Sinks a Pipeline names to be in the files")
}

// load reads the files and checks what can be checked without a cluster.
func (f *manifestFlags) load(cmd *cobra.Command, a *app) (*manifest.Set, error) {
	if len(f.files) == 0 {
		return nil, usageError{cmd, errors.New("no file given; use -f FILE")}
	}
	// A file that cannot be understood is an argument that cannot be.
	wrong := func(err error) error { return codedError{exitUsage, err} }
	set, err := manifest.Load(f.files, a.stdin)
	if err != nil {
		return nil, wrong(err)
	}
	for _, w := range set.Warnings {
		fmt.Fprintf(a.stderr, "Warning: %s\n", w)
	}
	if f.strict && len(set.Warnings) > 0 {
		return nil, wrong(fmt.Errorf("%d warnings, and --strict was given", len(set.Warnings)))
	}
	if !f.noReferences {
		if err := set.CheckReferences(); err != nil {
			return nil, wrong(err)
		}
	}
	return set, nil
}

func newPipelineApplyCommand(a *app) *cobra.Command {
	var from manifestFlags
	var dryRun bool
	var version pipelineVersion
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "apply -f FILE|FOLDER...",
		Short: "Create pipelines or change them to what the files say",
		Long: `Create pipelines or change them to what the files say. Files hold Source,
Transform, Sink and Pipeline resources, or whole PipelineConfigs. A pipeline that
is already as declared is left alone. All files are checked before anything is
sent; then each pipeline is applied by itself, with --timeout for each, and the exit
code is that of the first that failed. When the cluster does not answer, the rest is
not sent.

With --wait=converged the command returns when every stage is placed and every
sidecar that a pipeline concerns has applied its part, also those that lose theirs.
When --wait-timeout passes first, it lists who has not and ends with exit code 7; the
pipelines are applied all the same.`,
		Example: "  router pipeline apply -f examples/\n  router pipeline get default/orders -o yaml | router pipeline apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := from.load(cmd, a)
			if err != nil {
				return fmt.Errorf("nothing was applied: %w", err)
			}
			if len(set.Pipelines) == 0 {
				return codedError{exitUsage, errors.New("the files declare no pipeline; nothing was applied")}
			}
			expected, epoch, err := version.expected(cmd, len(set.Pipelines))
			if err != nil {
				return err
			}
			if err := wait.check(cmd, dryRun); err != nil {
				return err
			}
			return a.call(cmd, func(ctx context.Context, c *clients) error {
				var errs []error
				done := []applied{}
				for i, p := range set.Pipelines {
					r, err := a.apply(cmd, ctx, c, p.Config, expected, epoch, dryRun)
					if err != nil {
						errs = append(errs, err)
						done = append(done, applied{Pipeline: p.Config.GetId(), Result: "failed", Error: explain(err)})
						if left := set.Pipelines[i+1:]; len(left) > 0 && clusterFailed(err) {
							errs = append(errs, fmt.Errorf("%d more pipelines were not sent", len(left)))
							for _, p := range left {
								done = append(done, applied{Pipeline: p.Config.GetId(), Result: "not sent"})
							}
							break
						}
						continue
					}
					done = append(done, r)
					if a.format == output.Table {
						fmt.Fprintln(a.stdout, r)
					}
				}
				if wait.converged() {
					errs = append(errs, a.awaitConverged(cmd, ctx, c, done, wait.timeout))
				}
				if a.format != output.Table {
					errs = append(errs, output.Document(a.stdout, a.format, done))
				}
				return errors.Join(errs...)
			})
		},
	}
	from.add(cmd)
	wait.add(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "let the cluster check the pipelines and change nothing")
	version.add(cmd, "; 0: only if it does not exist")
	return cmd
}

// applied is what became of one pipeline.
type applied struct {
	Pipeline string `json:"pipeline"`
	// Result is valid, created, unchanged, changed, failed or not sent.
	Result string `json:"result"`
	// Error says of a failed one why, and whether it was done.
	Error   string `json:"error,omitempty"`
	Version uint64 `json:"version,omitempty"`
	// Epoch is the restore epoch the version is of.
	Epoch uint64 `json:"epoch,omitempty"`
	// Convergence is what was waited for, with --wait.
	Convergence *convergence `json:"convergence,omitempty"`
}

// String returns r as a line for people.
func (r applied) String() string {
	switch r.Result {
	case "valid":
		return "pipeline " + r.Pipeline + " is valid (dry run)"
	case "changed":
		return fmt.Sprintf("pipeline %s changed, version %s", r.Pipeline, shownVersion(r.Version, r.Epoch))
	}
	return "pipeline " + r.Pipeline + " " + r.Result
}

// clusterFailed tells the failures that another pipeline would meet too.
func clusterFailed(err error) bool {
	code := exitCode(err)
	return code == exitUnavailable || code == exitDeadline
}

// apply makes one pipeline what p says. Without an epoch it is for the one in
// which it finds the pipeline, so that what it says of the change is true; a
// version that was read before is only ever compared with its own epoch. talk is what it keeps of the conversation:
// the deadline is its own, or the first of many that waits would leave none for
// the last.
func (a *app) apply(cmd *cobra.Command, talk context.Context, c *clients, p *adminpb.PipelineConfig, expected, epoch *uint64, dryRun bool) (applied, error) {
	ctx, cancel := a.quick(context.WithoutCancel(talk))
	defer cancel()
	defer context.AfterFunc(cmd.Context(), cancel)()
	id := p.GetId()
	before, err := c.Admin.GetPipeline(ctx, &adminpb.GetPipelineRequest{PipelineId: id})
	if err != nil {
		return applied{}, toChange{readError{about("pipeline "+id+" was not applied", err)}}
	}
	if epoch == nil && (expected == nil || *expected == 0) {
		epoch = &before.Epoch
	}
	reply, err := c.Admin.CreatePipeline(ctx, &adminpb.CreatePipelineRequest{
		Config: p, ExpectedVersion: expected, ExpectedEpoch: epoch, ValidateOnly: dryRun,
	})
	if err != nil && !dryRun && client.OutcomeOf(err) == client.Unknown {
		what := "apply it again: a pipeline that is as declared already is left alone"
		if expected != nil {
			what = fmt.Sprintf("'router pipeline get %s' shows which version there is", id)
		}
		return applied{}, codedError{exitDeadline, fmt.Errorf("pipeline %s: it is not known whether it was applied: %s\nTo find out, %s", id, plain(err), what)}
	}
	if err != nil {
		return applied{}, about("pipeline "+id, err)
	}
	if !reply.GetSuccess() {
		text := reply.GetError()
		if len(reply.GetViolations()) > 0 {
			return applied{}, codedError{exitUsage, fmt.Errorf("pipeline %s was not applied:\n  %s", id, strings.Join(reply.GetViolations(), "\n  "))}
		}
		return applied{}, refused("pipeline "+id+" was not applied", text, expected != nil)
	}
	r := applied{Pipeline: id, Result: "changed", Version: reply.GetVersion(), Epoch: reply.GetEpoch()}
	switch {
	case dryRun:
		r.Result = "valid"
	case !before.GetFound():
		r.Result = "created"
	case before.GetStatus().GetVersion() == reply.GetVersion():
		r.Result = "unchanged"
	}
	return r, nil
}

func newPipelineValidateCommand(a *app) *cobra.Command {
	var from manifestFlags
	cmd := &cobra.Command{
		Use:   "validate -f FILE|FOLDER...",
		Short: "Check pipeline files without a cluster",
		Long: `Check pipeline files without a cluster: syntax, fields, references and the graph
of every pipeline. Every fault is reported, with file and line. Exit code 8 means
that at least one was found. To have the cluster check too, use apply --dry-run.

With -o yaml or -o json the pipelines are printed as the cluster would store them.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			set, err := from.load(cmd, a)
			if err != nil {
				var usage usageError
				if errors.As(err, &usage) {
					return err
				}
				return checkFailed(err)
			}
			if len(set.Pipelines) == 0 && set.Resources() == 0 {
				return checkFailed(errors.New("the files declare nothing"))
			}
			var faults manifest.Faults
			configs := make([]*adminpb.PipelineConfig, len(set.Pipelines))
			for i, p := range set.Pipelines {
				configs[i] = p.Config
				for _, v := range rpc.CheckPipeline(p.Config) {
					faults = append(faults, manifest.Fault{Where: p.Where, Text: "pipeline " + p.Config.GetId() + ": " + v})
				}
			}
			if len(faults) > 0 {
				return checkFailed(faults)
			}
			if a.format != output.Table {
				return output.Document(a.stdout, a.format, output.Messages(configs))
			}
			fmt.Fprintf(a.stdout, "%d pipelines and %d other resources are valid\n", len(set.Pipelines), set.Resources())
			return nil
		},
	}
	from.add(cmd)
	return cmd
}
