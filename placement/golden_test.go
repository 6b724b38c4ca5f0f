package placement

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

// TestStories replays the stories in testdata/plan: what is registered and
// declared, and what the planner makes of it. "plan" prints the steps, takes
// them over and checks that every table is sound and nothing is left to do.
func TestStories(t *testing.T) {
	datadriven.Walk(t, "testdata/plan", func(t *testing.T, path string) {
		m := newModel()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string { return m.run(t, d) })
	})
}

func (m *model) run(t *testing.T, d *datadriven.TestData) string {
	one := func(key string) string {
		var v string
		d.MaybeScanArgs(t, key, &v)
		return v
	}
	id := one("id")
	var b strings.Builder
	switch d.Cmd {
	case "sidecar": // id= zone= node= capacity=, services "name:type" in the input
		s := &Sidecar{ID: id, Endpoint: id + ":50053", Generation: 1, Zone: one("zone"), Node: one("node"), Offers: parseOffers(t, strings.Fields(d.Input))}
		if old := m.sidecars[id]; old != nil {
			s.Generation = old.Generation + 1
		}
		d.MaybeScanArgs(t, "capacity", &s.Capacity)
		m.putSidecar(s)
		return ""
	case "is": // id= and one of: alive, suspect, expired, draining, grace
		m.change(id, func(s *Sidecar) {
			s.Condition, s.Draining, s.Grace = Alive, d.HasArg("draining"), d.HasArg("grace")
			switch {
			case d.HasArg("suspect"):
				s.Condition = Suspect
			case d.HasArg("expired"):
				s.Condition = Expired
			}
		})
		return ""
	case "gone":
		m.removeSidecar(id)
		return ""
	case "pipeline": // id= strategy=
		p := parsePipeline(t, id, d.Input)
		for i := range p.Stages {
			p.Stages[i].Strategy = map[string]Strategy{"least-connections": LeastConnections, "weighted-random": WeightedRandom, "consistent-hash": ConsistentHash}[one("strategy")]
		}
		m.putPipeline(p)
		return ""
	case "drop":
		m.removePipeline(id)
		return ""
	case "plan", "balance": // balance: moves=
		p := m.engine.Plan()
		if d.Cmd == "balance" {
			most := 100
			d.MaybeScanArgs(t, "moves", &most)
			p.Steps = m.engine.Balance(Limits{Moves: most, Whole: true})
		}
		for _, s := range p.Steps {
			fmt.Fprintf(&b, "%s %s, %d moves\n", s.Urgency, s.Pipeline, s.Moves)
			for _, c := range s.Changes {
				fmt.Fprintf(&b, "  %s\n", renderChange(&c))
			}
		}
		m.carryOut(p)
		m.check(t)
		if more := m.engine.Plan(); len(more.Steps) > 0 {
			t.Fatalf("a second plan changes more: %+v", more)
		}
		if more := Compute(m.view()); len(more.Steps) > 0 {
			t.Fatalf("a plan of the whole view changes more: %+v", more)
		}
		if b.Len() == 0 {
			return "no change\n"
		}
	case "quality":
		q := m.engine.Measure()
		fmt.Fprintf(&b, "%d of %d instances, %d stages pending\n", q.Placed, q.Asked, q.Pending)
		fmt.Fprintf(&b, "%d edges: %d in the pod, %d on the node, %d in the zone\n", q.Edges, q.InPod, q.InNode, q.InZone)
		fmt.Fprintf(&b, "load: highest %.2f, mean %.2f, highest by mean %.2f\n", q.Highest, q.Mean, q.MaxOverMean())
	case "hand-overs":
		for _, s := range m.engine.Explain(id, Query{NextHops: 1000}) {
			for _, h := range s.NextHops {
				fmt.Fprintf(&b, "%s on %s: %s to %s, %s\n", s.Stage, h.From, h.Stage, h.To, h.Why)
			}
		}
	case "explain": // id= limit=
		q := Query{Candidates: 1000}
		d.MaybeScanArgs(t, "limit", &q.Candidates)
		for _, s := range m.engine.Explain(id, q) {
			fmt.Fprintf(&b, "%s: %d of %d", s.Stage, len(s.Sidecars), s.Asked)
			if s.Offering > len(s.Candidates) {
				fmt.Fprintf(&b, ", %d offer it, the others:", s.Offering)
				for _, v := range s.Verdicts {
					fmt.Fprintf(&b, " %d %q", v.Count, v.Verdict)
				}
			}
			if s.Pending != "" {
				fmt.Fprintf(&b, ", pending: %s", s.Pending)
			}
			b.WriteByte('\n')
			for _, c := range s.Candidates {
				verdict := c.Verdict
				switch {
				case c.Runs:
					verdict = "runs it"
				case verdict == "":
					verdict = "could run it"
				}
				fmt.Fprintf(&b, "  %s (load %.2f): %s\n", c.Sidecar, c.Load, verdict)
			}
		}
	case "what-if": // lose-sidecar= or lose-zone=
		o := WhatIf(m.view(), func(s *Sidecar) bool {
			return s.ID == one("lose-sidecar") || (s.Zone != "" && s.Zone == one("lose-zone"))
		})
		fmt.Fprintf(&b, "%d moves, at least %d; pending %d -> %d; load by mean %.2f -> %.2f; in the pod %.2f -> %.2f\n",
			o.After.Moves, o.After.Least, o.Before.Pending, o.After.Pending, o.Before.MaxOverMean(), o.After.MaxOverMean(),
			o.Before.LocalShare(), o.After.LocalShare())
		for _, w := range o.Waiting {
			fmt.Fprintf(&b, "  would wait: %s of %s\n", w.Stage, w.Pipeline)
		}
	default:
		t.Fatalf("unknown command %q", d.Cmd)
	}
	return b.String()
}

func renderChange(c *Change) string {
	if c.Revoke && c.MovedTo != "" {
		return c.Sidecar + ": revoke, for " + c.MovedTo
	}
	if c.Revoke {
		return c.Sidecar + ": revoke"
	}
	var parts []string
	for _, s := range c.Stages {
		if s.Remote != "" {
			parts = append(parts, s.Stage+"@"+s.Remote)
		} else {
			parts = append(parts, s.Stage)
		}
	}
	text := c.Sidecar + ": " + strings.Join(parts, " ")
	if len(c.After) > 0 {
		text += " (after " + strings.Join(c.After, ", ") + ")"
	}
	return text
}
