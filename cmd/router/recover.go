package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"conveyor.etl/router/internal/crashpoint"
	"conveyor.etl/router/offline"
	"conveyor.etl/router/output"
	"conveyor.etl/router/wal"
)

func newRecoverCommand(a *app) *cobra.Command {
	var o offline.RecoverOptions
	var members []string
	var planOnly, yes, purge bool
	cmd := &cobra.Command{
		Use:   "recover --data-dir DIR",
		Short: "Go on from what one member holds when the majority is lost for good",
		Long: `Make the data directory of one member a cluster of its own, when a majority of
the members is lost for good. Everything the directory holds is kept, entries at
the end of its log included that are not known to have been committed. What the
lost members had acknowledged among themselves and this one never received is
gone: give --peer-dir for every other directory that can still be read, to see
which one holds the most and whether anything can be missing.

The command shows its plan and asks for the name of the cluster before it changes
anything. The new cluster has a new id, so that old members cannot reach it: never
start them again, for a majority of them would go on as the old cluster. The old
content stays in DIR/.before-recover until --purge. After a crash at any point
the directory is the old one or the new one; repeat the command, or start the
node, to finish.

Then start the node by 'router serve' with its usual settings and let new members
join it with empty directories.

Exit codes: 0 done, 2 wrong use, 3 no data directory, 4 refused (a node runs on it,
another copy holds more, or an earlier recovery was not purged), 8 the directory
cannot be recovered from.`,
		Example: `  router cluster recover --data-dir /var/lib/router --plan
  router cluster recover --data-dir /mnt/a --peer-dir /mnt/b
  router cluster recover --data-dir /var/lib/router --purge`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if purge {
				return a.purge(o.Dir)
			}
			var err error
			if o.Also, err = parseMembers(members); err != nil {
				return usageError{cmd, err}
			}
			if !planOnly && !yes && a.format != output.Table {
				return usageError{cmd, errors.New("with -o json or yaml, give --plan or --yes: nobody can be asked")}
			}
			return a.recoverCluster(cmd.Context(), &o, planOnly, yes)
		},
	}
	dataDirFlag(cmd, &o.Dir)
	flags := cmd.Flags()
	flags.StringArrayVar(&o.Peers, "peer-dir", nil, "data directory of another member, or a copy of it, to compare with; may be repeated")
	flags.StringArrayVar(&members, "members", nil, "ID=DIR: a further voter of the new cluster; its data directory is made in DIR, which must be empty; may be repeated")
	flags.BoolVar(&planOnly, "plan", false, "show the plan and change nothing")
	flags.BoolVarP(&yes, "yes", "y", false, "do not ask")
	flags.BoolVar(&o.Force, "force", false, "recover this directory although another copy holds more")
	flags.BoolVar(&o.DamagedLog, "damaged-log", false, "take what lies before the damage of a damaged log; what followed is lost")
	flags.BoolVar(&purge, "purge", false, "remove what an earlier recovery kept in .before-recover, and do nothing else")
	return cmd
}

func parseMembers(texts []string) ([]offline.NewMember, error) {
	var out []offline.NewMember
	for _, text := range texts {
		number, dir, ok := strings.Cut(text, "=")
		id, err := strconv.ParseUint(number, 10, 64)
		if !ok || err != nil || id == 0 || dir == "" {
			return nil, fmt.Errorf("--members %q: must be ID=DIR, such as 2=/mnt/node-2", text)
		}
		out = append(out, offline.NewMember{ID: id, Dir: dir})
	}
	return out, nil
}

func (a *app) purge(dir string) error {
	removed, err := offline.Purge(dir)
	if err != nil {
		return err
	}
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, map[string]bool{"removed": removed})
	}
	if removed {
		fmt.Fprintln(a.stdout, "removed what the recovery had kept")
	} else {
		fmt.Fprintln(a.stdout, "nothing is kept")
	}
	return nil
}

func (a *app) recoverCluster(ctx context.Context, o *offline.RecoverOptions, planOnly, yes bool) error {
	plan, err := offline.PlanRecovery(*o)
	if errors.Is(err, offline.ErrUnfinished) && !planOnly {
		// It was agreed to before; there is nothing left to decide.
		return a.applyRecovery(o, nil)
	}
	if plan == nil {
		return err
	}
	if a.format == output.Table {
		printPlan(a.stdout, plan)
	} else if planOnly || err != nil {
		if perr := output.Document(a.stdout, a.format, plan); perr != nil {
			return perr
		}
	}
	if errors.Is(err, wal.ErrCorrupt) {
		return checkFailed(fmt.Errorf("%w\nIf this is the best there is, --damaged-log takes what lies before the damage", err))
	}
	if err != nil {
		return checkFailed(err)
	}
	if planOnly {
		return nil
	}
	if !yes {
		fmt.Fprintln(a.stdout)
		answer, err := a.ask(ctx, "Type the name of the cluster to go on", "["+plan.ClusterName+"]")
		if err != nil {
			return err
		}
		if answer != plan.ClusterName {
			return fmt.Errorf("nothing was changed: %q is not the name of the cluster, %q", output.Clean(answer), plan.ClusterName)
		}
	}
	return a.applyRecovery(o, plan)
}

func (a *app) applyRecovery(o *offline.RecoverOptions, plan *offline.Plan) error {
	points, err := crashpoint.New(a.environ)
	if err != nil {
		return err
	}
	o.Point = func(step string) { points.Pass("recover/" + step) }
	o.Logger = quietLogger(a.stderr)
	res, err := offline.Recover(*o, plan)
	if err != nil {
		return err
	}
	if a.format != output.Table {
		return output.Document(a.stdout, a.format, res)
	}
	if res.Resumed {
		fmt.Fprintln(a.stdout, "An interrupted recovery had been decided; it is finished now.")
	}
	switch res.Undo {
	case offline.UndoKept:
		fmt.Fprintf(a.stdout, "The state before the last restore was kept; node %d can go back to it by 'router backup undo-restore'.\n", res.NodeID)
	case offline.UndoLost:
		fmt.Fprintln(a.stdout, "The state before the last restore was not there; 'router backup undo-restore' cannot go back to it.")
	}
	fmt.Fprintf(a.stdout, `
Node %d is now a member of cluster %s, with members %v, behind entry %d.
The old content is in %s; remove it later by
  router cluster recover --data-dir %s --purge
Next: start the node by 'router serve' with its usual settings. Never start a lost
member with its old data directory again; let new ones join with empty ones.
`, res.NodeID, res.ClusterID, res.Members, res.Index, res.Before, o.Dir)
	return nil
}

// printPlan says for people what p says.
func printPlan(w io.Writer, p *offline.Plan) {
	fmt.Fprintf(w, "Cluster %s (%s), voters %v\n\n", output.Clean(p.ClusterName), p.OldClusterID, p.Voters)
	g := &output.Grid{Header: []string{"", "NODE", "DIRECTORY", "STATE AT", "LOG", "LAST TERM", "COMMITTED"}}
	for i, c := range p.Copies {
		mark := ""
		if i == p.Best && len(p.Copies) > 1 {
			mark = "best"
		}
		if c.Problem != "" {
			g.Add(mark, c.NodeID, c.Dir, "unusable: "+c.Problem)
			continue
		}
		state := strconv.FormatUint(c.StateIndex, 10)
		if c.FromImage != "" {
			state += " (from image " + c.FromImage + ")"
		}
		log := fmt.Sprintf("%d-%d", c.FirstIndex, c.LastIndex)
		if c.LastIndex < c.FirstIndex {
			log = "empty"
		}
		g.Add(mark, c.NodeID, c.Dir, state, log, c.LastTerm, c.CommitIndex)
	}
	_ = g.Write(w)
	if p.Chosen().Problem != "" {
		return
	}
	fmt.Fprintf(w, "\nThe directory %s becomes a new cluster of %v, which goes on behind entry %d in term %d.\n",
		p.Chosen().Dir, p.Members, p.Chosen().LastIndex, p.Term)
	if c := p.Chosen(); !slices.Contains(c.Voters, c.NodeID) && !slices.Contains(c.Learners, c.NodeID) {
		fmt.Fprintf(w, "NODE %d IS NO MEMBER at its last entry: it was removed, or had not joined. Others went on without it.\n", c.NodeID)
	}
	if !p.IsBest() {
		fmt.Fprintf(w, "IT IS NOT THE BEST COPY: %s holds more. Recover that one.\n", p.Copies[p.Best].Dir)
	}
	if len(p.Lost) > 0 {
		fmt.Fprintf(w, "Members of which no copy was given: %v.\n", p.Lost)
	}
	switch {
	case p.Complete && p.IsBest():
		fmt.Fprintln(w, "Nothing that was acknowledged is missing: every majority there can have been includes a copy compared here.")
	case p.Complete:
		fmt.Fprintln(w, "The best copy has everything that was acknowledged; this one does not.")
	default:
		fmt.Fprintf(w, "MAY BE LOST: commands the lost members acknowledged among themselves behind entry %d, which never reached a directory compared here.\n",
			p.Chosen().LastIndex)
	}
	if p.Chosen().Damage != "" {
		fmt.Fprintf(w, "LOST: everything behind entry %d of this directory, whose log is damaged: %s\n", p.Chosen().LastIndex, p.Chosen().Damage)
	}
	if p.Uncommitted == 1 {
		fmt.Fprintln(w, "The last entry is not known to have been committed. It is kept: its callers may have been told that it was done.")
	}
	if p.Uncommitted > 1 {
		fmt.Fprintf(w, "The last %d entries are not known to have been committed. They are kept: some of their callers may have been told that they were done.\n", p.Uncommitted)
	}
	switch c := p.Chosen(); c.Undo {
	case offline.UndoKept:
		fmt.Fprintf(w, "The state before the last restore (number %d) is kept: 'router backup undo-restore' on node %d goes back to it.\n", c.Epoch, c.NodeID)
	case offline.UndoLost:
		fmt.Fprintf(w, "LOST: the state before the last restore (number %d) is not in this directory; 'router backup undo-restore' cannot go back to it.\n", c.Epoch)
	}
	if p.KeepsBefore {
		fmt.Fprintln(w, "An earlier recovery's old content is still in .before-recover; it must be removed by --purge first.")
	}
}
