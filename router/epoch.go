package router

import "conveyor.etl/router/router/commandpb"

// Restoring a backup replaces the state by one in which less may have happened.
// Who acts on what was read before has to be told, so the state counts its
// restores: commands may name the epoch they were made for, and the generations
// of groups carry it.

const epochShift = 32

// Fence returns the generation of a group as everybody outside the state sees
// it. A generation of another epoch is never equal to it, although the restored
// group may come to the same number again.
func Fence(epoch, generation uint64) uint64 { return epoch<<epochShift | generation&(1<<epochShift-1) }

// orderShift leaves room for generations that are log indexes: those of assignments.
const orderShift = 48

// Ordered returns the generation of an assignment as sidecars see it: of two, the
// one made later is the larger, also when a restore lies between them, which puts
// back assignments of lower generations than sidecars have seen. As they are, a
// sidecar would keep what it runs against what the cluster wants.
func Ordered(epoch, generation uint64) uint64 {
	return epoch<<orderShift | generation&(1<<orderShift-1)
}

// fenced returns a group's generation for results and refusals.
func (t *tx) fenced(generation uint64) uint64 { return Fence(t.clock.Epoch, generation) }

// otherEpoch refuses a generation that was given out before a restore.
func (t *tx) otherEpoch(subject string, wire, current uint64) *commandpb.Rejection {
	if wire>>epochShift == t.clock.Epoch {
		return nil
	}
	t.res.Generation = t.fenced(current)
	r := reject(commandpb.Code_CODE_FENCED, subject,
		"generation %d is of restore epoch %d, the state is at epoch %d; join the group again and read everything again",
		wire&(1<<epochShift-1), wire>>epochShift, t.clock.Epoch)
	r.Current = t.res.Generation
	return r
}

// checkEpoch refuses a command that was made for another epoch.
func (t *tx) checkEpoch(c *commandpb.Command) *commandpb.Rejection {
	if c.ExpectedEpoch == nil || *c.ExpectedEpoch == t.clock.Epoch {
		return nil
	}
	r := reject(commandpb.Code_CODE_EPOCH, "epoch",
		"the command is for restore epoch %d, the state is at restore epoch %d, another one; nothing was changed: read everything again",
		*c.ExpectedEpoch, t.clock.Epoch)
	r.Current = t.clock.Revision
	return r
}

// checkTerm refuses what a leader decided that leads no more, or leads again: it
// may have been asleep in between, and the command may have reached the log
// through the leader that took its place. The term of an entry is the same on
// every replica, so this is no clock.
func (t *tx) checkTerm(c *commandpb.Command) *commandpb.Rejection {
	if c.ExpectedTerm == nil || *c.ExpectedTerm == t.term {
		return nil
	}
	r := reject(commandpb.Code_CODE_CONFLICT, "term",
		"the leader of term %d decided this, the entry is of term %d; nothing was changed", *c.ExpectedTerm, t.term)
	r.Current = t.term
	return r
}
