package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pass lets d go by on the clock of a synctest bubble; no real time passes.
func pass(d time.Duration) { <-time.NewTimer(d).C }

// TestOpenLoopHidesNothing: a server that stalls for a second while a call is
// due every 10 ms delays a hundred calls, and all of them show it. In the
// closed loop one client shows it once: that is what "coordinated omission"
// means, and why both loops exist.
func TestOpenLoopHidesNothing(t *testing.T) {
	for _, rate := range []float64{100, 0} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			call := func(ctx context.Context) (int, error) {
				if since := time.Since(began); since >= 2*time.Second && since < 3*time.Second {
					pass(3*time.Second - since)
				}
				pass(time.Millisecond)
				return 1, nil
			}
			m, err := Drive(t.Context(), DriveConfig{Callers: []Call{call}, Rate: rate, Duration: 10 * time.Second})
			if err != nil {
				t.Fatal(err)
			}
			late := int64(0)
			for _, bar := range m.Latency.Distribution() {
				if bar.From >= 5_000 { // calls that took five times as long as usual
					late += bar.Count
				}
			}
			if rate > 0 && (late < 90 || m.Percentile(95) < 100*time.Millisecond || m.Calls < 980) {
				t.Errorf("open loop: %d late calls of %d, p95 %v: the stall is hidden", late, m.Calls, m.Percentile(95))
			}
			if rate == 0 && (late != 1 || m.Percentile(95) > 2*time.Millisecond) {
				t.Errorf("closed loop: %d late calls, p95 %v", late, m.Percentile(95))
			}
			if m.Max() < 900*time.Millisecond {
				t.Errorf("the longest latency is %v; the server stalled for 1 s", m.Max())
			}
		})
	}
}

// TestDriveCounts: the warm-up is not counted, failures are, and do not end it.
func TestDriveCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		call := func(ctx context.Context) (int, error) {
			pass(100 * time.Millisecond)
			if n.Add(1)%5 == 0 {
				return 0, errors.New("every fifth fails")
			}
			return 3, nil
		}
		m, err := Drive(t.Context(), DriveConfig{Callers: []Call{call}, Warmup: 2050 * time.Millisecond, Duration: 10 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if m.Calls != 80 || m.Errors != 20 || m.Commands != 240 || m.LastError != "every fifth fails" {
			t.Errorf("%d calls, %d errors, %d commands", m.Calls, m.Errors, m.Commands)
		}
		if r := m.Throughput(); r < 23.9 || r > 24.1 {
			t.Errorf("throughput %v", r)
		}
		if _, err := Drive(t.Context(), DriveConfig{Duration: time.Second, Callers: []Call{
			func(context.Context) (int, error) { pass(time.Millisecond); return 0, errors.New("no") },
		}}); err == nil || !strings.Contains(err.Error(), "all") {
			t.Errorf("a drive of which nothing succeeded: %v", err)
		}
	})
}

// TestDriveCountsWhatHasNoAnswer: a call that is never answered fails, and shows in the
// latencies; one that is just under way in the end does not.
func TestDriveCountsWhatHasNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hung := func(ctx context.Context) (int, error) { <-ctx.Done(); return 0, ctx.Err() }
		quick := func(ctx context.Context) (int, error) { pass(300 * time.Millisecond); return 1, ctx.Err() }
		m, err := Drive(t.Context(), DriveConfig{Callers: []Call{quick, hung}, Duration: 10 * time.Second})
		if err != nil || m.Errors != 1 || m.Unanswered != 1 || m.Calls < 32 || m.Max() < 9*time.Second || !strings.Contains(m.LastError, "no answer") {
			t.Errorf("%+v %v", m, err)
		}
		if _, err := Drive(t.Context(), DriveConfig{Callers: []Call{hung}, Duration: time.Second}); !errors.Is(err, ErrAllFailed) {
			t.Errorf("nothing was answered: %v", err)
		}
	})
}

// TestDriveCountsWhatWasNotSent: at a rate that the callers cannot keep up with, the
// calls that nobody was free for are counted.
func TestDriveCountsWhatWasNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(ctx context.Context) (int, error) { pass(time.Second); return 1, nil }
		m, err := Drive(t.Context(), DriveConfig{Callers: []Call{slow, slow}, Rate: 100, Duration: 10 * time.Second})
		if err != nil || m.Unsent < 970 || m.Unsent > 990 {
			t.Errorf("%+v %v", m, err)
		}
		m, err = Drive(t.Context(), DriveConfig{Callers: []Call{slow, slow}, Rate: 1, Duration: 10 * time.Second})
		if err != nil || m.Unsent != 0 {
			t.Errorf("at a rate that is kept: %+v %v", m, err)
		}
	})
}

// TestInterruptedDrive: what is ended while it measures has measured something, of which
// calls under way are no failures; what is ended before has not.
func TestInterruptedDrive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		call := func(ctx context.Context) (int, error) {
			pass(100 * time.Millisecond)
			return 1, ctx.Err()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3050*time.Millisecond)
		defer cancel()
		m, err := Drive(ctx, DriveConfig{Callers: []Call{call}, Warmup: 1050 * time.Millisecond, Duration: time.Hour})
		if !errors.Is(err, context.DeadlineExceeded) || m == nil || m.Calls != 20 || m.Errors != 0 || m.Took != 2*time.Second {
			t.Errorf("%+v %v", m, err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		started := false
		m, err = Drive(ctx, DriveConfig{Callers: []Call{call}, Warmup: time.Minute, Duration: time.Hour, Started: func() { started = true }})
		if !errors.Is(err, context.DeadlineExceeded) || m != nil || started {
			t.Errorf("ended in the warm-up: %+v %v", m, err)
		}
	})
}

// TestServerThatEnds: a server process that is gone in the end costs the run its CPU
// time and nothing else, and one that was never there is said before the first call.
func TestServerThatEnds(t *testing.T) {
	server := exec.Command("sleep", "3600")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	var cpu cpuMeter
	cpu.start([]int{os.Getpid(), server.Process.Pid})
	if err := errors.Join(cpu.err, server.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait() // it was killed
	cpu.stop()
	r := newReport(&Config{}, &Measurement{Took: time.Second, Calls: 1, Commands: 1, Latency: NewHistogram()}, &cpu)
	var text strings.Builder
	if err := r.Text(&text); err != nil || r.Commands != 1 || len(r.ServerCPU) != 0 || !strings.Contains(text.String(), "CPU         of the servers is not known: ") {
		t.Errorf("%+v %v\n%s", r, err, &text)
	}
	_, err := Run(t.Context(), Config{Endpoints: []string{"127.0.0.1:1"}, Pids: []int{server.Process.Pid}, Duration: time.Hour})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("there is no process %d on this machine", server.Process.Pid)) {
		t.Error(err)
	}
}

// store is a server of the two services that loads call.
type store struct {
	checkpointpb.UnimplementedCheckpointServiceServer
	clusterpb.UnimplementedCommitsServer
	mu   sync.Mutex
	data map[string][]byte
	ops  atomic.Int64
	fail string // a service id that is refused
	// breakAfter is how many requests a stream takes before it breaks; 0 = any number.
	breakAfter int
}

func (s *store) SaveCheckpoint(ctx context.Context, r *checkpointpb.SaveCheckpointRequest) (*checkpointpb.SaveCheckpointResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ops.Add(1)
	s.data[r.ServiceId] = r.Data
	return &checkpointpb.SaveCheckpointResponse{Success: true}, nil
}

func (s *store) CommitOffset(context.Context, *checkpointpb.CommitOffsetRequest) (*checkpointpb.CommitOffsetResponse, error) {
	return nil, status.Error(codes.Unavailable, "no leader")
}

func (s *store) GetCheckpoint(ctx context.Context, r *checkpointpb.GetCheckpointRequest) (*checkpointpb.GetCheckpointResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &checkpointpb.GetCheckpointResponse{Found: s.data[r.ServiceId] != nil}, nil
}

func (s *store) Commit(stream grpc.BidiStreamingServer[clusterpb.CommitRequest, clusterpb.CommitResponse]) error {
	for n := 0; ; n++ {
		if s.breakAfter > 0 && n == s.breakAfter {
			return status.Error(codes.Unavailable, "going away")
		}
		r, err := stream.Recv()
		if err != nil {
			return nil
		}
		res := &clusterpb.CommitResult{Id: r.Id, Outcome: clusterpb.Outcome_OUTCOME_DONE}
		s.mu.Lock()
		for _, op := range r.Ops {
			c := op.GetCheckpoint()
			if c.GetServiceId() == s.fail && s.fail != "" {
				res.Outcome, res.Message = clusterpb.Outcome_OUTCOME_REFUSED, "refused"
			}
			s.data[c.GetServiceId()] = c.GetData()
			s.ops.Add(1)
		}
		s.mu.Unlock()
		if err := stream.Send(&clusterpb.CommitResponse{Results: []*clusterpb.CommitResult{res}}); err != nil {
			return err
		}
	}
}

func serve(t *testing.T) (*store, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &store{data: make(map[string][]byte)}
	g := grpc.NewServer()
	checkpointpb.RegisterCheckpointServiceServer(g, s)
	clusterpb.RegisterCommitsServer(g, s)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-ended })
	return s, l.Addr().String()
}

// TestFillReachesEveryKey: reads measure nothing when the keys are not there.
func TestFillReachesEveryKey(t *testing.T) {
	s, addr := serve(t)
	if err := Fill(t.Context(), addr, 1000, 32); err != nil {
		t.Fatal(err)
	}
	if len(s.data) != 1000 || s.ops.Load() != 1000 {
		t.Fatalf("%d keys in %d commits", len(s.data), s.ops.Load())
	}
	for i := range 1000 {
		if v := s.data[Key(i)]; len(v) != 32 {
			t.Fatalf("key %q holds %d bytes", Key(i), len(v))
		}
	}
	s.fail = Key(500)
	if err := Fill(t.Context(), addr, 1000, 32); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("a refused commit: %v", err)
	}
}

// TestRun: calls, mixes and streams do what they say, count every command, and
// a report holds it all.
func TestRun(t *testing.T) {
	s, addr := serve(t)
	base := Config{Endpoints: []string{addr}, Clients: 4, Conns: 2, Keys: 100, Duration: 100 * time.Millisecond, Pids: []int{os.Getpid()}}
	for name, change := range map[string]func(*Config){
		"checkpoint": func(*Config) {},
		"mix":        func(c *Config) { c.Mix, _ = ParseMix("checkpoint=1,read=3,stale=1") },
		"rate":       func(c *Config) { c.Rate = 500 },
		"stream":     func(c *Config) { c.Streams, c.InFlight, c.Batch = 2, 8, 4 },
	} {
		t.Run(name, func(t *testing.T) {
			c := base
			change(&c)
			before := s.ops.Load()
			r, err := Run(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			if r.Commands == 0 || r.Errors != 0 || r.P50 <= 0 || r.P50 > r.P99 || r.P99 > r.Max || len(r.ServerCPU) != 1 {
				t.Fatalf("%+v", r)
			}
			if done := s.ops.Load() - before; name != "mix" && done < r.Commands {
				t.Fatalf("%d commands reported, the server saw %d", r.Commands, done)
			}
			if name == "stream" && r.Commands%4 != 0 {
				t.Fatalf("%d commands in batches of 4", r.Commands)
			}
			var text, doc bytes.Buffer
			if err := errors.Join(r.Text(&text), r.JSON(&doc)); err != nil {
				t.Fatal(err)
			}
			var back Report
			if err := json.Unmarshal(doc.Bytes(), &back); err != nil || back.Commands != r.Commands {
				t.Fatalf("JSON: %v\n%s", err, doc.String())
			}
			for _, want := range []string{"throughput", "p99", "CPU"} {
				if !strings.Contains(text.String(), want) {
					t.Fatalf("no %q in:\n%s", want, text.String())
				}
			}
		})
	}
	c := base
	c.Mix = []Share{{OpOffset, 1}}
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no leader") {
		t.Fatalf("a cluster that refuses everything: %v", err)
	}
}

// TestStreamsBreak: a stream that breaks is made anew, what was under way on it has
// failed, and the run goes on.
func TestStreamsBreak(t *testing.T) {
	s, addr := serve(t)
	s.breakAfter = 50
	r, err := Run(t.Context(), Config{Endpoints: []string{addr}, Streams: 2, InFlight: 4, Keys: 100, Duration: 200 * time.Millisecond})
	if err != nil || r.Commands < 100 || r.Errors == 0 || !strings.Contains(r.LastError, "going away") {
		t.Fatalf("%+v %v", r, err)
	}
}

// TestConfigFaults: every fault is named at once.
func TestConfigFaults(t *testing.T) {
	c := Config{Streams: 1, InFlight: 4, Batch: 8, Rate: 5, Mix: []Share{{OpRead, 1}}}
	c.EnsureDefaults()
	err := c.Validate()
	for _, want := range []string{"endpoint", "batches of 8", "rate", `"read"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
	for _, bad := range []string{"", "nothing", "read=0", "read=x", "read,,offset"} {
		if _, err := ParseMix(bad); err == nil {
			t.Errorf("mix %q was accepted", bad)
		}
	}
	mix, err := ParseMix("checkpoint=80, read=20")
	if err != nil || fmt.Sprint(mix) != "[{checkpoint 80} {read 20}]" {
		t.Errorf("%v %v", mix, err)
	}
	if len(Key(0)) != 16 || len(Key(999_999_999)) != 16 {
		t.Error("ids are not 16 bytes")
	}
}

// TestReadProcess: this process uses memory, and its CPU time grows with work.
func TestReadProcess(t *testing.T) {
	before, err := ReadProcess(os.Getpid())
	if err != nil || before.Resident < 1<<20 {
		t.Fatalf("%+v %v", before, err)
	}
	for after := before; after.CPU == before.CPU; {
		for i, x := 0, uint64(1); i < 1_000_000; i++ {
			x = x*6364136223846793005 + 1
		}
		if after, err = ReadProcess(os.Getpid()); err != nil || after.CPU < before.CPU {
			t.Fatalf("%+v %v", after, err)
		}
	}
	if _, err := ReadProcess(1 << 30); err == nil {
		t.Error("a process that is not there has used something")
	}
}
