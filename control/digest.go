package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"conveyor.etl/router/router"
	"conveyor.etl/router/router/commandpb"
)

// Digest is what a leader tells the other nodes of the leases now and then, so
// that the next leader neither forgets how long somebody has been silent nor
// holds somebody for silent that was not. It names only those that have been
// silent for longer than usual: of all others it is enough to know that they
// were heard of within the last period. While all goes well a digest of 100,000
// leases is a few bytes.
type Digest struct {
	Term uint64
	// Epoch and Revision are of the state that the leases were in line with.
	Epoch, Revision uint64
	// Sidecars and Services are those that have missed a heartbeat, in no order.
	Sidecars, Services []Silence
}

// Silence says for how long one sidecar or service had not been heard of.
type Silence struct {
	ID  string
	For time.Duration
}

// maxDigest bounds the silences of one kind that are remembered of a digest.
const maxDigest = 1 << 18

// heardDigest is a digest as the next leader uses it.
type heardDigest struct {
	term, epoch, revision uint64
	at                    time.Time // when it came
	sidecars, services    map[string]time.Duration
}

// TakeDigest keeps a digest of the leader for the case that this node is the next
// one. It refuses that of an earlier leader. It keeps nothing of d but its texts.
func (l *Liveness) TakeDigest(d Digest) error {
	if lead := l.c.Node.Leadership(); lead.Leading || d.Term < lead.Term {
		return fmt.Errorf("control: a digest of the leases by the leader of term %d; this node is in term %d (leading: %t)", d.Term, lead.Term, lead.Leading)
	}
	if len(d.Sidecars) > maxDigest || len(d.Services) > maxDigest {
		return fmt.Errorf("control: a digest of %d sidecars and %d services, the limit is %d each", len(d.Sidecars), len(d.Services), maxDigest)
	}
	h := &heardDigest{
		term: d.Term, epoch: d.Epoch, revision: d.Revision, at: l.c.Now(),
		sidecars: silences(d.Sidecars), services: silences(d.Services),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.heard == nil || h.term >= l.heard.term {
		l.heard = h
		l.stats.DigestsTaken++
	}
	return nil
}

func silences(in []Silence) map[string]time.Duration {
	if len(in) == 0 {
		return nil
	}
	out := make(map[string]time.Duration, len(in))
	for _, s := range in {
		out[s.ID] = max(s.For, 0)
	}
	return out
}

// lastHeard returns when a holder was last heard of as far as h tells, zero when
// it does not. modified and is are those of its record.
func (h *heardDigest) lastHeard(silent map[string]time.Duration, id string, modified uint64, is condition) time.Time {
	if modified > h.revision && is == alive {
		return time.Time{} // it registered or came back since
	}
	return h.at.Add(-silent[id])
}

// recallLocked takes over what the leader before told of the leases that were
// just loaded from v. A digest says nothing about the time since it was made; one
// that is older than two periods is worth less than a full lease for all.
func (l *Liveness) recallLocked(now time.Time, v *router.View, sidecars []*commandpb.Sidecar, services []*commandpb.Service) {
	h := l.heard
	l.heard = nil
	if h == nil || h.epoch != v.Epoch() || now.Sub(h.at) > 2*l.c.Period {
		return
	}
	l.stats.DigestsUsed++
	l.sidecars.pause(now, l.c.Period)
	l.services.pause(now, l.c.Period)
	for _, s := range sidecars {
		if at := h.lastHeard(h.sidecars, s.SidecarId, s.ModRevision, sidecarCondition(s)); !at.IsZero() {
			l.sidecars.recall(s.SidecarId, at)
		}
	}
	for _, s := range services {
		if at := h.lastHeard(h.services, s.ServiceId, s.ModRevision, serviceCondition(s)); !at.IsZero() {
			l.services.recall(s.ServiceId, at)
		}
	}
	l.c.Logger.Info("the leases are those the leader before told of", "term", h.term, "age", now.Sub(h.at).Round(time.Millisecond),
		"silent_sidecars", len(h.sidecars), "silent_services", len(h.services))
}

// digestPart is how many leases are looked at under one lock, well below a
// millisecond's worth: heartbeats wait for it.
const digestPart = 4096

// digest describes the leases of a reign.
func (l *Liveness) digest(term uint64) Digest {
	l.mu.Lock()
	d := Digest{Term: term, Epoch: l.epoch, Revision: l.revision}
	// A new reign puts others in their place.
	sidecars, services := l.sidecars, l.services
	l.mu.Unlock()
	d.Sidecars, d.Services = l.late(sidecars), l.late(services)
	return d
}

// late returns those of t that have been silent for longer than usual. One that
// is dropped or changes in between may be missing or named twice, which says no
// less than is true.
func (l *Liveness) late(t *leases) []Silence {
	var out []Silence
	for end := -1; end != 0; {
		l.mu.Lock()
		// From the end: a drop puts the last one into the gap, so that nobody
		// moves from what is still to be visited to what has been.
		if end < 0 || end > len(t.order) {
			end = len(t.order)
		}
		begin := max(0, end-digestPart)
		out = t.late(out, l.c.Now(), l.c.Period, begin, end)
		end = begin
		l.mu.Unlock()
	}
	if len(out) > maxDigest {
		// Of the ones left out the next leader thinks better than is right.
		slices.SortFunc(out, func(a, b Silence) int { return cmp.Or(cmp.Compare(b.For, a.For), cmp.Compare(a.ID, b.ID)) })
		out = out[:maxDigest]
	}
	return out
}

// late appends to out those present among order[begin:end] that have been silent
// for longer than period, or than somewhat more than the interval they announced.
func (l *leases) late(out []Silence, now time.Time, period time.Duration, begin, end int) []Silence {
	at := l.since(now)
	for _, e := range l.order[begin:end] {
		if silent := at - e.last; e.is != expired && silent > max(period, e.patience/3+e.patience/12) {
			out = append(out, Silence{e.id, silent})
		}
	}
	return out
}

// share tells the other nodes of the leases once a period until ctx is done.
func (l *Liveness) share(ctx context.Context, term uint64) {
	for sleep(ctx, l.c.Period) {
		l.shareOnce(ctx, term)
	}
}

func (l *Liveness) shareOnce(ctx context.Context, term uint64) {
	ctx, cancel := context.WithTimeout(ctx, l.c.Period)
	defer cancel()
	err := l.c.Share(ctx, l.digest(term))
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.stats.DigestsFailed++
		return
	}
	l.stats.DigestsSent++
}

// Share tells the other nodes of the leases now, if this node leads. It is for a
// leader that is about to hand over: then the next one is up to date. It blocks
// until all have answered or ctx is done.
func (l *Liveness) Share(ctx context.Context) {
	l.mu.Lock()
	leading, term := l.leading, l.term
	l.mu.Unlock()
	if leading {
		l.shareOnce(ctx, term)
	}
}
