package e2e

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Known says what the caller learned of a call.
type Known int

const (
	// Done: the call took effect and its answer is in the output.
	Done Known = iota
	// Refused: the state decided against it; nothing changed.
	Refused
	// Unknown: it may have taken effect, now or at any later time.
	Unknown
	// NotDone: it certainly never takes effect.
	NotDone
)

// History records calls as they start and end, from any goroutine.
type History struct {
	mu    sync.Mutex
	start time.Time
	ops   []porcupine.Operation
	count map[Known]int
}

// NewHistory returns an empty history whose clock starts now.
func NewHistory() *History { return &History{start: time.Now(), count: map[Known]int{}} }

// Record runs call and stores it with its outcome. A call that certainly never
// took effect is not stored: no order has to explain it. One whose outcome is
// unknown may take effect at any time after its start, so it never returns.
func (h *History) Record(client int, in any, call func() (out any, known Known)) Known {
	begin := time.Since(h.start).Nanoseconds()
	out, known := call()
	end := time.Since(h.start).Nanoseconds()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.count[known]++
	switch known {
	case NotDone:
		return known
	case Unknown:
		end, out = math.MaxInt64, nil
	}
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: begin, Output: out, Return: end})
	return known
}

// String summarises the outcomes.
func (h *History) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return fmt.Sprintf("%d done, %d refused, %d unknown, %d certainly not done",
		h.count[Done], h.count[Refused], h.count[Unknown], h.count[NotDone])
}

// Check fails the test unless model explains the recorded calls by some order
// that respects real time. A visualisation is kept for a failed check.
func (h *History) Check(t testing.TB, name string, model porcupine.Model) {
	t.Helper()
	h.mu.Lock()
	ops := append([]porcupine.Operation(nil), h.ops...)
	h.mu.Unlock()
	res, info := porcupine.CheckOperationsVerbose(model, ops, 2*time.Minute)
	switch res {
	case porcupine.Ok:
	case porcupine.Unknown:
		t.Errorf("%s: no verdict on %d operations within the time given; shorten the history", name, len(ops))
	default:
		path := filepath.Join(os.TempDir(), fmt.Sprintf("conveyor-%s-%d.html", name, os.Getpid()))
		if err := porcupine.VisualizePath(model, info, path); err != nil {
			path = "(not drawn: " + err.Error() + ")"
		}
		t.Errorf("%s: the history of %d operations is NOT linearizable; see %s", name, len(ops), path)
	}
}

// outcome classifies the error of a mutation by the promise of its status
// code: UNAVAILABLE and RESOURCE_EXHAUSTED mean that it was certainly not done.
func outcome(err error) Known {
	if err == nil {
		return Done
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.ResourceExhausted:
		if st := status.Convert(err); !definite(st) {
			return Unknown
		}
		return NotDone
	case codes.InvalidArgument, codes.FailedPrecondition, codes.Aborted, codes.NotFound, codes.AlreadyExists:
		return Refused
	case codes.OutOfRange:
		// Of another restore epoch.
		if reason(err) == "EPOCH" {
			return Refused
		}
		return Unknown
	default:
		return Unknown
	}
}

// reason is why the cluster says that a call failed, "" when it says nothing.
func reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// definite tells the server's own UNAVAILABLE, which carries details, and the
// one of a connection that could not be made from the one that gRPC makes up
// when a connection breaks in the middle of a call.
func definite(st *status.Status) bool {
	return len(st.Details()) > 0 || strings.Contains(st.Message(), "Error while dialing")
}
