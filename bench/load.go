package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"conveyor.etl/router/bench/unary"
	"conveyor.etl/router/rpc/routerpb/checkpointpb"
	"conveyor.etl/router/rpc/routerpb/clusterpb"
)

// The operations of a mix.
const (
	OpCheckpoint = "checkpoint" // commit a checkpoint: a 16-byte id and the value
	OpOffset     = "offset"     // commit a source offset
	OpRead       = "read"       // linearizable read of a checkpoint
	OpStale      = "stale"      // read of what the node asked knows
)

var operations = []string{OpCheckpoint, OpOffset, OpRead, OpStale}

// Share is the weight of one operation in a mix.
type Share struct {
	Op     string `json:"op"`
	Weight int    `json:"weight"`
}

// ParseMix reads a mix such as "checkpoint=80,read=20" or just "offset".
func ParseMix(text string) ([]Share, error) {
	var mix []Share
	for part := range strings.SplitSeq(text, ",") {
		op, weight, weighted := strings.Cut(strings.TrimSpace(part), "=")
		s := Share{Op: op, Weight: 1}
		known := false
		for _, o := range operations {
			known = known || o == op
		}
		if !known {
			return nil, fmt.Errorf("bench: unknown operation %q, known are %s", op, strings.Join(operations, ", "))
		}
		if weighted {
			n, err := strconv.Atoi(weight)
			if err != nil || n <= 0 || n > 1_000_000 {
				return nil, fmt.Errorf("bench: the weight of %q is %q; it must be a positive number", op, weight)
			}
			s.Weight = n
		}
		mix = append(mix, s)
	}
	return mix, nil
}

// Config says what load to put on which cluster.
type Config struct {
	// Endpoints are the client addresses load is spread over, by connection.
	Endpoints []string `json:"endpoints"`
	// Clients call one operation at a time each.
	Clients int `json:"clients"`
	// Conns is how many connections they share.
	Conns int `json:"conns"`
	// Streams, when not zero, replaces Clients: that many commit streams with
	// InFlight commits under way each, Batch of them in a message.
	Streams  int `json:"streams,omitempty"`
	InFlight int `json:"in_flight,omitempty"`
	Batch    int `json:"batch,omitempty"`

	Mix        []Share       `json:"mix"`
	Rate       float64       `json:"rate,omitempty"` // calls a second; 0 = closed loop
	Warmup     time.Duration `json:"warmup_ns"`
	Duration   time.Duration `json:"duration_ns"`
	Keys       int           `json:"keys"`        // distinct ids
	ValueBytes int           `json:"value_bytes"` // of a checkpoint
	// Deadline bounds one call; 0 = none.
	Deadline time.Duration `json:"deadline_ns,omitempty"`
	// Pids of server processes on this machine whose CPU time is measured.
	Pids []int  `json:"pids,omitempty"`
	Seed uint64 `json:"seed"`
}

// EnsureDefaults fills what is zero.
func (c *Config) EnsureDefaults() {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&c.Clients, 64)
	set(&c.Conns, 8)
	if c.Streams > 0 {
		set(&c.InFlight, 64)
		set(&c.Batch, 1)
		c.Conns = min(c.Conns, c.Streams)
	} else {
		c.Conns = min(c.Conns, c.Clients)
	}
	set(&c.Keys, 100_000)
	set(&c.ValueBytes, 256)
	if c.Duration == 0 {
		c.Duration = 10 * time.Second
	}
	if len(c.Mix) == 0 {
		c.Mix = []Share{{OpCheckpoint, 1}}
	}
}

// Validate returns every fault of c, joined.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("bench: "+format, args...)) }
	if len(c.Endpoints) == 0 {
		bad("no endpoint is given")
	}
	if c.Clients < 1 || c.Clients > 100_000 || c.Conns < 1 || c.Conns > 10_000 {
		bad("%d clients on %d connections; from 1 to 100,000 and 10,000 are possible", c.Clients, c.Conns)
	}
	if c.Streams < 0 || c.Streams > 10_000 {
		bad("%d streams; at most 10,000 are possible", c.Streams)
	}
	if c.Streams > 0 {
		if c.Batch < 1 || c.Batch > c.InFlight {
			bad("batches of %d do not fit into %d commits in flight", c.Batch, c.InFlight)
		}
		if c.Rate > 0 {
			bad("a rate is for calls; streams send as fast as they are answered")
		}
		if c.Deadline > 0 {
			bad("a deadline is for calls; a stream has none")
		}
		for _, s := range c.Mix {
			if s.Op == OpRead || s.Op == OpStale {
				bad("a commit stream cannot carry the operation %q", s.Op)
			}
		}
	}
	if c.Rate < 0 || c.Keys < 1 || c.ValueBytes < 0 || c.ValueBytes > 1<<20 || c.Warmup < 0 || c.Duration <= 0 || c.Deadline < 0 {
		bad("rate, keys, value size, warm-up, duration and deadline must be positive, and a value at most 1 MiB")
	}
	return errors.Join(errs...)
}

// source draws random ids and values for one caller.
type source struct {
	rng   *rand.Rand
	keys  int
	value []byte
}

func newSource(c *Config, i int) *source {
	s := &source{rng: rand.New(rand.NewPCG(c.Seed, uint64(i))), keys: c.Keys, value: make([]byte, c.ValueBytes)}
	for j := 0; j+8 <= len(s.value); j += 8 {
		binary.LittleEndian.PutUint64(s.value[j:], s.rng.Uint64())
	}
	return s
}

// id draws one of the keys as a 16-byte id.
func (s *source) id() string { return Key(s.rng.IntN(s.keys)) }

// Key returns the i-th id: always 16 bytes.
func Key(i int) string { return fmt.Sprintf("svc-%012d", i) }

// data returns a value that no other call sends.
func (s *source) data() []byte {
	v := make([]byte, len(s.value))
	copy(v, s.value)
	if len(v) >= 8 {
		binary.LittleEndian.PutUint64(v, s.rng.Uint64())
	}
	return v
}

// Run drives a router cluster as c says. When ctx ends while it measures, the report
// is of what was measured until then, and comes with the error of ctx.
func Run(ctx context.Context, c Config) (*Report, error) {
	c.EnsureDefaults()
	if err := c.Validate(); err != nil {
		return nil, err
	}
	// In the end it would be too late to learn that one was mistyped.
	if err := CheckPids(c.Pids); err != nil {
		return nil, err
	}
	var cpu cpuMeter
	d := DriveConfig{
		Rate: c.Rate, Warmup: c.Warmup, Duration: c.Duration,
		Started: func() { cpu.start(c.Pids) }, Ended: func() { cpu.stop() },
	}
	var m *Measurement
	var err error
	if c.Streams > 0 {
		m, err = runStreams(ctx, &c, d)
	} else {
		conns, closeAll := DialUnary(c.Endpoints, c.Conns)
		defer closeAll()
		d.Callers = callers(&c, conns)
		m, err = Drive(ctx, d)
	}
	if err != nil && (m == nil || ctx.Err() == nil) {
		return nil, err
	}
	r := newReport(&c, m, &cpu)
	r.Interrupted = err != nil
	return r, err
}

// DialUnary returns n plaintext connections for unary calls alone, spread over the
// endpoints in turn, and what closes them. See package unary for why they are no
// connections of gRPC's client.
func DialUnary(endpoints []string, n int) ([]grpc.ClientConnInterface, func()) {
	conns := make([]*unary.Conn, n)
	out := make([]grpc.ClientConnInterface, n)
	for i := range conns {
		conns[i] = unary.NewConn(endpoints[i%len(endpoints)])
		out[i] = conns[i]
	}
	return out, func() {
		for _, c := range conns {
			_ = c.Close() // nothing is owed to a load generator's connection
		}
	}
}

// Dial opens n plaintext connections, spread over the endpoints in turn.
func Dial(endpoints []string, n int) ([]*grpc.ClientConn, func(), error) {
	var conns []*grpc.ClientConn
	closeAll := func() {
		for _, c := range conns {
			_ = c.Close() // nothing is owed to a load generator's connection
		}
	}
	for i := range n {
		c, err := grpc.NewClient("passthrough:///"+endpoints[i%len(endpoints)],
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			// Fixed windows: with the default, the client sends a ping after
			// every reply to measure the connection, and a server's figures
			// would contain answering it.
			grpc.WithStaticStreamWindowSize(1<<20), grpc.WithStaticConnWindowSize(4<<20))
		if err != nil {
			closeAll()
			return nil, nil, fmt.Errorf("bench: %w", err)
		}
		conns = append(conns, c)
	}
	return conns, closeAll, nil
}

// callers makes one Call per client; clients share the connections evenly.
func callers(c *Config, conns []grpc.ClientConnInterface) []Call {
	out := make([]Call, c.Clients)
	total := 0
	for _, s := range c.Mix {
		total += s.Weight
	}
	for i := range out {
		client := checkpointpb.NewCheckpointServiceClient(conns[i%len(conns)])
		src := newSource(c, i)
		var offset uint64
		out[i] = func(ctx context.Context) (int, error) {
			if c.Deadline > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, c.Deadline)
				defer cancel()
			}
			op, n := c.Mix[0].Op, 0
			if len(c.Mix) > 1 {
				n = src.rng.IntN(total)
				for _, s := range c.Mix {
					if op = s.Op; n < s.Weight {
						break
					}
					n -= s.Weight
				}
			}
			switch op {
			case OpOffset:
				// Every client has a source of its own: offsets only move
				// forward, and others would be in the way.
				offset++
				_, err := client.CommitOffset(ctx, &checkpointpb.CommitOffsetRequest{
					SourceId: fmt.Sprintf("bench-%010d", i), Partition: uint32(src.rng.IntN(64)), Offset: uint64(time.Now().UnixNano()) + offset,
				})
				return 1, err
			case OpRead, OpStale:
				if op == OpStale {
					ctx = metadata.AppendToOutgoingContext(ctx, "conveyor-consistency", "stale")
				}
				_, err := client.GetCheckpoint(ctx, &checkpointpb.GetCheckpointRequest{ServiceId: src.id()})
				return 1, err
			default:
				_, err := client.SaveCheckpoint(ctx, &checkpointpb.SaveCheckpointRequest{ServiceId: src.id(), CheckpointId: "b", Data: src.data()})
				return 1, err
			}
		}
	}
	return out
}

func runStreams(ctx context.Context, c *Config, d DriveConfig) (*Measurement, error) {
	conns, closeAll, err := Dial(c.Endpoints, c.Conns)
	if err != nil {
		return nil, err
	}
	defer closeAll()
	return driveStreams(ctx, streamLoads(c, conns), d)
}

func streamLoads(c *Config, conns []*grpc.ClientConn) []*streamLoad {
	out := make([]*streamLoad, c.Streams)
	for i := range out {
		op := func(s *source) *clusterpb.CommitOp {
			return &clusterpb.CommitOp{Op: &clusterpb.CommitOp_Checkpoint{Checkpoint: &clusterpb.CheckpointCommit{
				ServiceId: s.id(), CheckpointId: "b", Data: s.data(),
			}}}
		}
		if c.Mix[0].Op == OpOffset {
			id := fmt.Sprintf("bench-%010d", i)
			op = func(s *source) *clusterpb.CommitOp {
				return &clusterpb.CommitOp{Op: &clusterpb.CommitOp_Offset{Offset: &clusterpb.OffsetCommit{
					SourceId: id, Partition: uint32(s.rng.IntN(64)), Offset: uint64(time.Now().UnixNano()),
				}}}
			}
		}
		out[i] = &streamLoad{
			client: clusterpb.NewCommitsClient(conns[i%len(conns)]), inFlight: max(1, c.InFlight/c.Batch), batch: c.Batch,
			op: op, rng: newSource(c, i),
		}
	}
	return out
}

// Fill commits every id from 0 to keys-1 once, over streams, so that reads find
// something.
func Fill(ctx context.Context, endpoint string, keys, valueBytes int) error {
	const streams, batch, inFlight = 8, 64, 8
	conns, closeAll, err := Dial([]string{endpoint}, 1)
	if err != nil {
		return err
	}
	defer closeAll()
	client := clusterpb.NewCommitsClient(conns[0])
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	next := 0
	errs := make(chan error, streams)
	for i := range streams {
		src := newSource(&Config{Keys: keys, ValueBytes: valueBytes}, i)
		go func() {
			errs <- fillStream(ctx, client, inFlight, func() []*clusterpb.CommitOp {
				mu.Lock()
				from := next
				next = min(keys, next+batch)
				to := next
				mu.Unlock()
				var ops []*clusterpb.CommitOp
				for k := from; k < to; k++ {
					ops = append(ops, &clusterpb.CommitOp{Op: &clusterpb.CommitOp_Checkpoint{Checkpoint: &clusterpb.CheckpointCommit{
						ServiceId: Key(k), CheckpointId: "b", Data: src.data(),
					}}})
				}
				return ops
			})
		}()
	}
	var failed error
	for range streams {
		if err := <-errs; err != nil && failed == nil {
			failed = err
			cancel()
		}
	}
	return failed
}

// fillStream sends what ops returns until that is empty, with inFlight requests
// under way, and waits for all answers.
func fillStream(ctx context.Context, client clusterpb.CommitsClient, inFlight int, ops func() []*clusterpb.CommitOp) error {
	stream, err := client.Commit(ctx)
	if err != nil {
		return err
	}
	id, open := uint64(0), 0
	for more := true; more || open > 0; {
		for more && open < inFlight {
			batch := ops()
			if len(batch) == 0 {
				more = false
				break
			}
			id++
			if err := stream.Send(&clusterpb.CommitRequest{Id: id, RequestId: "", Ops: batch}); err != nil {
				break // Recv says why
			}
			open++
		}
		if open == 0 {
			break
		}
		reply, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("bench: fill: %w", err)
		}
		for _, r := range reply.GetResults() {
			open--
			if r.GetOutcome() != clusterpb.Outcome_OUTCOME_DONE {
				code := codes.Code(r.GetCode())
				if code == codes.OK {
					code = codes.Unknown
				}
				return status.Errorf(code, "bench: fill: %s", r.GetMessage())
			}
		}
	}
	return stream.CloseSend()
}
