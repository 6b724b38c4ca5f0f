package rpc

import (
	"fmt"
	"slices"
	"time"

	"conveyor.etl/router/router/commandpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// isSilent is true for a sidecar that keeps what it has though it is not heard of.
func isSilent(s *commandpb.Sidecar) bool {
	return s != nil && s.State != commandpb.SidecarState_SIDECAR_STATE_ALIVE
}

// silentAs is why a sidecar that is not heard of keeps what it has.
type silentAs int

const (
	missesBeats silentAs = iota // it is suspect
	inGrace                     // it has expired again soon after it had come back
	toBeTaken                   // it has expired
)

func silenceOf(s *commandpb.Sidecar) silentAs {
	switch {
	case s.State == commandpb.SidecarState_SIDECAR_STATE_SUSPECT:
		return missesBeats
	case s.GraceUntilMs > 0:
		return inGrace
	}
	return toBeTaken
}

// silentReason says why sidecars that are not heard of keep a stage, and for how long;
// "" of none. word is what the leader says of it, which is asked only about suspects.
func silentReason(by []*commandpb.Sidecar, word *leaderWords) string {
	if len(by) == 0 {
		return ""
	}
	why := silenceOf(by[0])
	same := slices.DeleteFunc(slices.Clone(by), func(s *commandpb.Sidecar) bool { return silenceOf(s) != why })
	who, one := "sidecar "+by[0].SidecarId, len(same) == 1
	if !one {
		who = fmt.Sprintf("sidecars %s and %d more", by[0].SidecarId, len(same)-1)
	}
	say := func(alone, several string) string {
		if one {
			return alone
		}
		return several
	}
	var until, changed uint64
	for _, s := range same {
		until, changed = max(until, s.GraceUntilMs), max(changed, s.StateChangedAtMs)
	}
	text := ""
	switch why {
	case missesBeats:
		noticed := time.UnixMilli(int64(changed))
		text = who + say(" misses heartbeats, noticed at ", " miss heartbeats, the last noticed at ") + noticed.UTC().Format(time.RFC3339) +
			say("; it keeps the stage until it counts as gone", "; they keep the stage until they count as gone") + word.gone(noticed, one)
	case inGrace:
		text = who + say(" has expired again soon after it had come back; it keeps", " have expired again soon after they had come back; they keep") +
			" the stage until " + clock(time.UnixMilli(int64(until))) + say(", and longer if it is heard of before", ", and longer if they are heard of before")
	default:
		text = who + say(" has expired; the stage is about to be taken from it", " have expired; the stage is about to be taken from them")
	}
	if n := len(by) - len(same); n > 0 {
		text += fmt.Sprintf("; %d more that %s it %s silent, too", n, plural(n, "runs", "run"), plural(n, "is", "are"))
	}
	return text
}

// gone says when suspects, the last of which was noticed at a time, count as gone, as far
// as that is known. The lease of none ends later than that of who was noticed last.
func (w *leaderWords) gone(noticed time.Time, one bool) string {
	said, now := w.get(), w.s.cfg.Now()
	if held := heldExpiries(said, now); held != "" {
		return ": " + held
	}
	lease := w.s.cfg.SidecarTTL - w.s.cfg.SuspectAfter
	if w.s.cfg.SuspectAfter <= 0 || lease <= 0 {
		return ""
	}
	it := "it"
	if !one {
		it = "them"
	}
	due := noticed.Add(lease)
	switch {
	case now.Before(due) && said == nil:
		return ", at about " + clock(due) + " if nothing is heard until then, and later if the leader, which was not asked or did not answer, holds " + it + " back"
	case now.Before(due):
		return ", at about " + clock(due) + " if nothing is heard until then"
	case said == nil:
		return ", which is due since about " + clock(due) + "; why that is put off only the leader knows, which was not asked or did not answer"
	}
	return ", which is due: a leader that was elected or held up meanwhile gives " + it + " time to be heard"
}

// heldExpiries says when those who fell silent with too many others count as gone; ""
// when the leader does not hold them back.
func heldExpiries(said *clusterpb.GetPlacementHoldsResponse, now time.Time) string {
	n, until := int(said.GetExpiriesHeld()), said.GetExpiriesHeldUntil()
	if n == 0 || until == nil {
		return ""
	}
	last := ""
	if t := said.GetExpiriesHeldLast(); t != nil && n > 1 {
		last = ", the last by " + clock(t.AsTime())
	}
	if !now.Before(until.AsTime()) {
		return fmt.Sprintf("too many sidecars fell silent at once, and the %d that %s due are given up one after another since %s%s",
			n, plural(n, "is", "are"), clock(until.AsTime()), last)
	}
	if last != "" {
		last = ", then one after another" + last
	}
	return fmt.Sprintf("too many sidecars fell silent at once, so the %d that %s due %s not given up before %s%s; sooner if most come back",
		n, plural(n, "is", "are"), plural(n, "is", "are"), clock(until.AsTime()), last)
}

// plural chooses the word for one or for several.
func plural(n int, one, several string) string {
	if n == 1 {
		return one
	}
	return several
}
