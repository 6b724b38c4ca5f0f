package rpc

import (
	"strings"
	"testing"

	"conveyor.etl/router/rpc/routerpb/sidecarpb"
)

// entryOf returns what is remembered of a sidecar, nil when nothing is.
func (a *api) entryOf(id string) *told {
	a.told.mu.Lock()
	defer a.told.mu.Unlock()
	return a.told.by[id]
}

func (a *api) isDirty(id string) bool {
	a.told.mu.Lock()
	defer a.told.mu.Unlock()
	return a.told.by[id].dirty
}

// Goal: a change that is noted while others of the same round are answered is told,
// whether its sidecar is being introduced or was before. Method: the round waits at
// the first sidecar for what the test holds, and the second one's change comes then.
func TestStreamTellsWhatChangesDuringARound(t *testing.T) {
	for _, introduced := range []bool{true, false} {
		name := "changes"
		if !introduced {
			name = "introductions"
		}
		t.Run(name, func(t *testing.T) {
			a := newAPI(t)
			c := a.streamBeats()
			for i, id := range []string{"ns/x", "ns/a", "ns/b"} {
				a.registerSidecar(id)
				if introduced || i == 0 {
					c.introduce(uint32(i), id)
				} else {
					a.beat(&sidecarpb.SidecarHeartbeatRequest{SidecarId: id})
				}
			}
			a.create(chain("p", "u", "v"))
			first, second := a.entryOf("ns/x"), a.entryOf("ns/a")
			first.mu.Lock() // one round waits here, and the next one gathers
			a.assign("ns/x", "p")
			a.noted()
			eventually(t, "the first round has begun", func() bool { return !a.isDirty("ns/x") })
			a.assign("ns/a", "p")
			a.assign("ns/b", "p")
			a.noted()
			if !introduced {
				before := a.beats.count("ns/b", "")
				c.send(full(1, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/a"}))
				c.send(full(2, &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/b"}))
				a.touched("ns/b", before+1)
			}
			second.mu.Lock()
			first.mu.Unlock()
			eventually(t, "the second round has begun", func() bool { return !a.isDirty("ns/a") })
			a.create(chain("p", "u", "w", "v"))
			a.assign("ns/b", "p")
			a.noted()
			want := a.assignments("ns/b")["p"]
			second.mu.Unlock()
			for told := uint64(0); told != want; {
				next := c.next()
				if cmds := next.GetResponse().GetCommands(); next.GetNumber() == 2 && len(cmds) > 0 {
					told = cmds[len(cmds)-1].GetAssign().GetGeneration()
				}
			}
		})
	}
}

// Goal: a sidecar that the restored state does not know is told to register, whether
// it beats by calls or on a stream.
func TestRestoredWithoutTheSidecar(t *testing.T) {
	a := newAPI(t)
	a.registerSidecar("ns/old")
	a.node.image(t, "image")
	a.registerSidecar("ns/pod")
	a.registerSidecar("ns/call")
	a.noted()
	c := a.streamBeats()
	if r := c.introduce(1, "ns/pod"); !r.GetAcknowledged() {
		t.Fatal(r)
	}
	a.beat(&sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/call"})
	a.node.restore(t, "image")
	a.noted()
	if r := c.answer(1); r.GetAcknowledged() || r.GetReason() != unknownSidecar("ns/pod") {
		t.Fatal(r)
	}
	r, err := a.sidecar.Heartbeat(a.ctx(), &sidecarpb.SidecarHeartbeatRequest{SidecarId: "ns/call"})
	noError(t, err)
	if r.GetAcknowledged() || r.GetReason() != unknownSidecar("ns/call") {
		t.Fatal(r)
	}
}

// Goal: of a heartbeat that is refused for its size nothing is kept.
func TestStreamKeepsNothingOfAFaultyHeartbeat(t *testing.T) {
	a := newAPI(t)
	long := strings.Repeat("x", 1<<20)
	s := &sidecarStream{api: a.sidecarAPI(), bell: newBell()}
	for name, req := range map[string]*sidecarpb.SidecarHeartbeatRequest{
		"id":           {SidecarId: long},
		"registration": {SidecarId: "ns/pod", RegistrationId: long},
		"health":       {SidecarId: "ns/pod", ServiceHealth: []*sidecarpb.LocalServiceHealth{{ServiceName: long}}},
	} {
		noError(t, s.full(&sidecarpb.StreamedHeartbeat{Number: 1, Heartbeat: req}))
		m := s.member(1)
		if m.fault == "" || len(m.fault) > 1000 || m.id != "" || m.registration != "" || m.news.SizeVT() != 0 {
			t.Errorf("%s: kept are %d bytes of id, %d of registration, %d of news, %d of fault", name, len(m.id), len(m.registration), m.news.SizeVT(), len(m.fault))
		}
	}
}
