package dev

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"conveyor.etl/router/rpc/routerpb/adminpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// style is how a piece of text is shown on a terminal with colours.
type style string

const (
	plain  style = ""
	strong style = "1"
	faint  style = "2"
	good   style = "32"
	notice style = "33"
	bad    style = "31"
)

// span is a piece of a line.
type span struct {
	text  string
	style style
}

// line is one row of the picture.
type line []span

func row(text string) line          { return line{{text, plain}} }
func head(text string) line         { return line{{text, strong}} }
func (l line) and(s ...span) line   { return append(l, s...) }
func cell(width int, s string) span { return span{pad(s, width), plain} }

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(1, width-utf8.RuneCountInString(s)))
}

// render writes l in at most columns cells.
func (l line) render(b *strings.Builder, columns int, color bool) {
	left := columns
	for _, s := range l {
		text := s.text
		if n := utf8.RuneCountInString(text); n > left {
			text = string([]rune(text)[:max(0, left)])
		}
		left -= utf8.RuneCountInString(text)
		if color && s.style != plain && text != "" {
			fmt.Fprintf(b, "\x1b[%sm%s\x1b[0m", s.style, text)
		} else {
			b.WriteString(text)
		}
	}
}

// picture draws the cluster.
type picture struct {
	o        *Options
	nodes    []*node
	sidecars []*sidecar
	observer *observer
	events   *events
}

// draw returns the whole picture for a terminal of that size. It homes the
// cursor and clears what is left of each line and below, instead of clearing
// the screen first, which flickers; a resize is set right by the next drawing.
func (p *picture) draw(columns, rows int, now time.Time) string {
	s := p.observer.scene()
	var all []line
	for squeeze := 0; squeeze <= 3; squeeze++ {
		var fits bool
		if all, fits = p.compose(&s, now, rows, squeeze); fits {
			break
		}
	}
	var b strings.Builder
	b.WriteString("\x1b[H")
	for _, l := range all {
		l.render(&b, columns, p.o.Color)
		b.WriteString("\x1b[K\r\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// leastEvents is how many events a picture shows at least.
const leastEvents = 3

// compose puts the picture together for rows lines, leaving out more the higher
// squeeze is: first the blank lines, then what the sidecars hold, then most of
// the hints. It says whether that was enough.
func (p *picture) compose(s *scene, now time.Time, rows, squeeze int) ([]line, bool) {
	top := append(p.nodeLines(s, now), p.pipelineLines(s)...)
	if squeeze < 2 {
		top = append(top, p.sidecarLines(s)...)
	}
	bottom := p.hintLines(s)
	if squeeze >= 3 {
		bottom = append(bottom[:min(2, len(bottom)-1)], bottom[len(bottom)-1])
	}
	gap := []line{nil}
	if squeeze >= 1 {
		gap = nil
		top = slices.DeleteFunc(top, func(l line) bool { return len(l) == 0 })
	}
	// The newest events get the room that is left.
	room := rows - 1 - len(top) - len(bottom) - len(gap) - 1
	all := append(top, head("WHAT HAPPENS"))
	for _, ev := range p.events.last(max(leastEvents, room)) {
		all = append(all, line{{ev.at.Format("15:04:05 "), faint}, {ev.text, plain}})
	}
	all = append(append(all, gap...), bottom...)
	if len(all) > rows-1 {
		return all[:max(0, rows-1)], false
	}
	return all, true
}

func (p *picture) nodeLines(s *scene, now time.Time) []line {
	lines := []line{{{"Conveyor router", strong}, {fmt.Sprintf("  %d nodes on this machine, data in %s", p.o.Nodes, p.o.DataDir), faint}}}
	if s.leader != 0 {
		lines = append(lines, row(fmt.Sprintf("node %d leads, term %d, revision %d", s.leader, s.term, s.revision)))
	} else {
		lines = append(lines, line{{"no node leads: writes wait until a majority of the nodes is up", notice}})
	}
	lines = append(lines, nil, head("NODE  ROLE        PID       CLIENTS           APPLIED"))
	for _, n := range p.nodes {
		l := line{cell(6, fmt.Sprint(n.id))}
		pid, back := n.status()
		st := s.nodes[n.id]
		switch {
		case pid == 0 && !back.IsZero():
			l = l.and(span{fmt.Sprintf("down, back in %d s", max(0, int(back.Sub(now).Seconds()+0.999))), bad})
		case pid == 0:
			l = l.and(span{"down", bad})
		default:
			role, look := "starting", faint
			if st != nil {
				role, look = nodeRole(st)
			} else if s.frozen[n.id] {
				role, look = "no answer", bad
			}
			applied := "-"
			if st != nil {
				applied = fmt.Sprint(st.GetAppliedIndex())
			}
			l = l.and(span{pad(role, 12), look}, cell(10, fmt.Sprint(pid)), cell(18, p.o.clientAddr(n.id)), cell(1, applied))
		}
		lines = append(lines, l)
	}
	return append(lines, nil)
}

// nodeRole is a node's role as it sees it itself.
func nodeRole(st *adminpb.GetClusterStatusResponse) (string, style) {
	for _, n := range st.GetNodes() {
		if n.GetNodeId() != st.GetNodeId() {
			continue
		}
		role := strings.ToLower(strings.TrimPrefix(n.GetRole().String(), "NODE_ROLE_"))
		if n.GetRole() == adminpb.NodeRole_NODE_ROLE_LEADER {
			return role, good
		}
		return role, plain
	}
	return "unknown", notice
}

func (p *picture) pipelineLines(s *scene) []line {
	lines := []line{head("PIPELINE      STAGES AND THE SIDECARS THAT RUN THEM")}
	for i, pl := range s.pipelines {
		l := line{cell(14, shortID(pl.GetId()))}
		if !pl.GetEnabled() {
			lines = append(lines, l.and(span{"disabled", faint}))
			continue
		}
		where := make(map[string]*adminpb.StagePlacement)
		if i < len(s.statuses) {
			for _, pp := range s.statuses[i].GetPlacements() {
				where[pp.GetStageId()] = pp
			}
		}
		for j, st := range pl.GetStages() {
			if j > 0 {
				l = l.and(span{"  ", plain})
			}
			var on []string
			for _, id := range where[st.GetId()].GetSidecarIds() {
				on = append(on, shortID(id))
			}
			name := strings.TrimPrefix(st.GetId(), shortID(pl.GetId())+"-")
			if len(on) == 0 {
				l = l.and(span{name + "@-", bad})
			} else {
				l = l.and(span{name + "@", plain}, span{strings.Join(on, "+"), good})
			}
		}
		lines = append(lines, l)
	}
	return append(lines, nil)
}

func (p *picture) sidecarLines(s *scene) []line {
	lines := []line{head("SIDECAR       STATE     WAS TOLD TO RUN (PIPELINE: ITS STAGES > WHERE IT HANDS ON TO)")}
	state := make(map[string]clusterpb.SidecarState)
	for _, sc := range s.sidecars {
		state[sc.GetSidecarId()] = sc.GetState()
	}
	for _, sc := range p.sidecars {
		st, known := state[sc.id]
		text, look := strings.ToLower(strings.TrimPrefix(st.String(), "SIDECAR_STATE_")), good
		switch {
		case !known:
			text, look = "-", faint
		case st == clusterpb.SidecarState_SIDECAR_STATE_SUSPECT:
			look = notice
		case st == clusterpb.SidecarState_SIDECAR_STATE_EXPIRED:
			look = bad
		}
		lines = append(lines, line{cell(14, shortID(sc.id)), {pad(text, 10), look}, {strings.Join(sc.holds(), "   "), plain}})
	}
	return append(lines, nil)
}

func (p *picture) hintLines(s *scene) []line {
	lines := []line{head("TRY IN ANOTHER TERMINAL")}
	for _, h := range p.hints(s) {
		lines = append(lines, line{{pad("  "+h[0], 52), plain}, {h[1], faint}})
	}
	stays := "a node that is killed stays down"
	if p.o.Respawn > 0 {
		stays = fmt.Sprintf("a node that is killed is started again after %v", p.o.Respawn)
	}
	return append(lines, line{{"Ctrl-C stops everything; " + stays + "; leases last seconds here", faint}})
}

// hints are commands worth trying, and what they show.
func (p *picture) hints(s *scene) [][2]string {
	var out [][2]string
	if int(s.leader) >= 1 && int(s.leader) <= len(p.nodes) {
		if pid, _ := p.nodes[s.leader-1].status(); pid != 0 {
			out = append(out, [2]string{fmt.Sprintf("kill -9 %d", pid), "kill the leader; another one takes over at once"})
		}
	}
	out = append(out, [2]string{fmt.Sprintf("kill -USR1 %d", os.Getpid()), "cut off a sidecar, or reconnect it"})
	// The addresses stand in a line of their own: with them the commands would
	// be cut at the edge of an ordinary terminal and could not be copied.
	out = append(out, [2]string{"export CONVEYOR_ROUTER_SERVER=" + strings.Join(p.o.endpoints(), ","), ""})
	if len(s.pipelines) > 0 {
		out = append(out, [2]string{p.o.Command + " pipeline get " + s.pipelines[0].GetId(), ""})
	}
	return append(out, [2]string{p.o.Command + " cluster status", ""})
}
