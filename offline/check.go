package offline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"

	"go.etcd.io/raft/v3/raftpb"

	"conveyor.etl/router/datadir"
	"conveyor.etl/router/raftnode"
	"conveyor.etl/router/router"
)

// Verdict is the outcome of one check.
type Verdict string

// The verdicts. Only VerdictFailed makes a directory unfit.
const (
	VerdictOK      Verdict = "ok"
	VerdictNote    Verdict = "note"
	VerdictFailed  Verdict = "failed"
	VerdictSkipped Verdict = "skipped"
)

// Finding is one line of a Report.
type Finding struct {
	Part    string  `json:"part"`
	Verdict Verdict `json:"verdict"`
	Detail  string  `json:"detail"`
}

// Report is what Check found.
type Report struct {
	Dir         string    `json:"dir"`
	ClusterName string    `json:"cluster_name"`
	ClusterID   string    `json:"cluster_id"`
	NodeID      uint64    `json:"node_id"`
	Findings    []Finding `json:"findings"`
	// Intact: nothing failed.
	Intact bool `json:"intact"`
}

func (r *Report) add(part string, v Verdict, format string, args ...any) {
	r.Findings = append(r.Findings, Finding{part, v, fmt.Sprintf(format, args...)})
	r.Intact = r.Intact && v != VerdictFailed
}

// CheckOptions say how much Check does.
type CheckOptions struct {
	// Replay also applies the committed log to a copy of the state, in Scratch,
	// and checks what comes out.
	Replay  bool
	Scratch string
	Logger  *slog.Logger
}

// maxListed bounds the faults of one kind that are listed one by one.
const maxListed = 20

// Check verifies everything in d: the log with every checksum and command, the
// state with every block and invariant, that the two fit together, and the
// images. What is wrong is in the report; the error is ctx's, or says that the
// check itself could not be made.
func Check(ctx context.Context, d *Directory, o CheckOptions) (*Report, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Report{Dir: d.Path, ClusterName: d.Identity.ClusterName, ClusterID: fmt.Sprintf("%016x", d.Identity.ClusterID),
		NodeID: d.Identity.NodeID, Intact: true}
	checkIdentity(r, d)
	for _, part := range []func(context.Context, *Report, *Directory, CheckOptions) error{
		checkLog, checkCommands, checkState, checkFit, checkImages, checkReplay,
	} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := part(ctx, r, d, o); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func checkIdentity(r *Report, d *Directory) {
	id := d.Identity
	if !id.Initialized {
		r.add("identity", VerdictNote, "node %d of %q has not finished its first start", id.NodeID, id.ClusterName)
		return
	}
	r.add("identity", VerdictOK, "node %d of cluster %q (%016x), made with members %v", id.NodeID, id.ClusterName, id.ClusterID, id.Members)
	if kept, err := datadir.Kept(d.Path); err == nil && kept {
		r.add("identity", VerdictNote, "what a recovery replaced is still kept in %s", datadir.BeforeName)
	}
}

// held says which entries a log holds.
func held(first, last uint64) string {
	if last < first {
		return "no entries"
	}
	return fmt.Sprintf("entries %d to %d intact", first, last)
}

func checkLog(_ context.Context, r *Report, d *Directory, _ CheckOptions) error {
	if d.LogErr != nil {
		r.add("log", VerdictFailed, "%v", d.LogErr)
		return nil
	}
	l := d.Log
	hs := l.HardState
	r.add("log", VerdictOK, "segments %d, %s, term %d, vote %d, commit %d",
		len(l.Segments), held(l.FirstIndex, l.LastIndex), hs.GetTerm(), hs.GetVote(), l.Commit())
	if l.Unfinished != "" {
		r.add("log", VerdictNote, "an unfinished write at the end, never acknowledged; the next start cuts it: %s", l.Unfinished)
	}
	if n := len(l.Ignored); n > 0 {
		r.add("log", VerdictNote, "%d segments before a gap are not used; the next start removes them", n)
	}
	return nil
}

// checkCommands decodes every entry: a command that cannot be applied stops
// every node that reaches it.
func checkCommands(ctx context.Context, r *Report, d *Directory, _ CheckOptions) error {
	if d.Log == nil {
		r.add("entries", VerdictSkipped, "the log cannot be read")
		return nil
	}
	commands, bad := 0, 0
	err := d.Log.Entries(d.Log.FirstIndex, d.Log.LastIndex, func(e *raftpb.Entry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := checkEntry(e)
		commands += n
		if err != nil {
			if bad++; bad <= maxListed {
				r.add("entries", VerdictFailed, "entry %d: %v", e.GetIndex(), err)
			}
		}
		return nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		r.add("entries", VerdictFailed, "%v", err)
	case bad > maxListed:
		r.add("entries", VerdictFailed, "%d entries cannot be applied", bad)
	case bad == 0:
		r.add("entries", VerdictOK, "%d commands, all known to this release", commands)
	}
	return nil
}

func checkEntry(e *raftpb.Entry) (commands int, err error) {
	if e.GetType() != raftpb.EntryNormal {
		return 0, raftnode.CheckChange(e)
	}
	cmds, err := raftnode.EntryCommands(e.GetData())
	if err != nil {
		return 0, err
	}
	for i, raw := range cmds {
		if err := router.CheckEncoded(raw); err != nil {
			return len(cmds), fmt.Errorf("command %d: %w", i, err)
		}
	}
	return len(cmds), nil
}

func checkState(ctx context.Context, r *Report, d *Directory, _ CheckOptions) error {
	if errors.Is(d.StateErr, fs.ErrNotExist) && !d.Identity.Initialized {
		r.add("state", VerdictNote, "%v", d.StateErr)
		return nil
	}
	if d.StateErr != nil {
		r.add("state", VerdictFailed, "%v", d.StateErr)
		return nil
	}
	s, err := d.OpenState()
	if err != nil {
		r.add("state", VerdictFailed, "%v", err)
		return nil
	}
	checkView(ctx, r, "state", s)
	checkConfiguration(r, d, s.Position)
	checkUndo(ctx, r, d)
	return errors.Join(s.Close(), ctx.Err())
}

// checkUndo verifies the state that the last restore replaced.
func checkUndo(ctx context.Context, r *Report, d *Directory) {
	points, err := router.UndoDirs(d.fs, filepath.Dir(d.state))
	if err != nil {
		r.add("undo", VerdictFailed, "%v", err)
	}
	for _, dir := range points {
		image, err := router.OpenImage(d.fs, dir, router.Options{Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			err = errors.Join(image.Check(ctx), image.Close())
		}
		if err != nil {
			r.add("undo", VerdictFailed, "%s: %v", filepath.Base(dir), err)
		} else {
			r.add("undo", VerdictOK, "%s, the state before the last restore: every invariant holds", filepath.Base(dir))
		}
	}
}

// checkView verifies one state.
func checkView(ctx context.Context, r *Report, part string, s *State) {
	if err := s.Check(ctx); err != nil {
		r.add(part, VerdictFailed, "%v", err)
		return
	}
	hash, err := contentHash(ctx, s.View)
	if err != nil {
		r.add(part, VerdictFailed, "%v", err)
		return
	}
	counts, err := s.Counts()
	if err != nil {
		r.add(part, VerdictFailed, "%v", err)
		return
	}
	r.add(part, VerdictOK, "at entry %d (term %d), revision %d, epoch %d; every invariant holds; %d pipelines, %d sidecars, %d services, %d groups, %d checkpoints, %d offsets; content %s",
		s.Position.Index, s.Position.Term, s.Revision(), s.Epoch(), counts.Pipelines, counts.Sidecars, counts.Services, counts.Groups,
		counts.Checkpoints, counts.SourceOffsets+counts.GroupOffsets, hash)
}

// checkConfiguration judges the group stored with the state.
func checkConfiguration(r *Report, d *Directory, pos raftnode.Position) {
	cs := pos.ConfState
	switch {
	case len(cs.GetVoters()) == 0:
		r.add("members", VerdictFailed, "the group stored at entry %d has no voter", pos.Index)
	case len(cs.GetVotersOutgoing()) > 0:
		r.add("members", VerdictNote, "a change of the group is under way: from voters %v to %v", cs.GetVotersOutgoing(), cs.GetVoters())
	default:
		r.add("members", VerdictOK, "voters %v, learners %v", cs.GetVoters(), cs.GetLearners())
	}
	if id := d.Identity.NodeID; !slices.Contains(slices.Concat(cs.GetVoters(), cs.GetLearners(), cs.GetVotersOutgoing(), cs.GetLearnersNext()), id) {
		r.add("members", VerdictNote, "node %d itself is no member at entry %d", id, pos.Index)
	}
}

func checkFit(_ context.Context, r *Report, d *Directory, _ CheckOptions) error {
	if d.problem() != nil {
		r.add("fit", VerdictSkipped, "log and state cannot both be read")
		return nil
	}
	fit, err := d.judge(d.State)
	switch {
	case err != nil:
		r.add("fit", VerdictFailed, "%v", err)
	case fit == raftnode.FitInstalled:
		r.add("fit", VerdictNote, "the state was received as an image and the log not yet emptied for it; the next start does that")
	case fit == raftnode.FitBehind:
		if b, err := d.base(); err != nil {
			r.add("fit", VerdictFailed, "%v; the next start asks a peer for the state", err)
		} else {
			r.add("fit", VerdictNote, "the state ends at entry %d, before the log begins at %d; the next start rebuilds it from image %s",
				d.State.Index, d.Log.FirstIndex, b.image)
		}
	default:
		behind := ""
		if n := int64(d.Log.LastIndex) - int64(d.State.Index); n > 0 {
			behind = fmt.Sprintf("; %d entries of the log lie behind it", n)
		}
		r.add("fit", VerdictOK, "the log goes on where the state ends, at %d%s", d.State.Index, behind)
	}
	if last, err := d.Log.Term(d.Log.LastIndex); err == nil && last > d.Log.HardState.GetTerm() {
		r.add("fit", VerdictNote, "the last entry is of term %d, the stored term is %d; the next start raises it", last, d.Log.HardState.GetTerm())
	}
	return nil
}

func checkImages(ctx context.Context, r *Report, d *Directory, _ CheckOptions) error {
	images, err := ListImages(d.Path)
	if err != nil {
		r.add("images", VerdictFailed, "%v", err)
		return nil
	}
	intact := 0
	for _, im := range images {
		if err := ctx.Err(); err != nil {
			return err
		}
		name := filepath.Join(im.Place, im.Name)
		im, _ := CheckImage(im)
		if im.Err == nil {
			im.Err = checkContent(d, &im)
		}
		if im.Err != nil {
			r.add("images", VerdictFailed, "%s: %v", name, im.Err)
			continue
		}
		intact++
	}
	if intact == len(images) {
		r.add("images", VerdictOK, "%d, all intact", intact)
	}
	return nil
}

// checkContent compares what the manifest of an image says with its content.
func checkContent(d *Directory, im *Image) error {
	pos, err := d.position(im.Dir)
	if err != nil {
		return err
	}
	if pos.Index != im.Info.Index || pos.Term != im.Info.Term {
		return fmt.Errorf("its manifest says entry %d (term %d), its content entry %d (term %d)", im.Info.Index, im.Info.Term, pos.Index, pos.Term)
	}
	return nil
}

func checkReplay(ctx context.Context, r *Report, d *Directory, o CheckOptions) error {
	if !o.Replay {
		return nil
	}
	if err := d.problem(); err != nil {
		r.add("replay", VerdictSkipped, "log and state cannot both be read")
		return nil
	}
	s, err := d.ReplayState(o.Scratch, o.Logger)
	if errors.Is(err, ErrNoRoom) {
		return err
	}
	if err != nil {
		r.add("replay", VerdictFailed, "%v", err)
		return nil
	}
	checkView(ctx, r, "replay", s)
	return errors.Join(s.Close(), ctx.Err())
}

// Summary says on one line what is wrong.
func (r *Report) Summary() string {
	var parts []string
	for _, f := range r.Findings {
		if f.Verdict == VerdictFailed && !slices.Contains(parts, f.Part) {
			parts = append(parts, f.Part)
		}
	}
	if len(parts) == 0 {
		return "nothing is wrong"
	}
	return "damaged: " + strings.Join(parts, ", ")
}
