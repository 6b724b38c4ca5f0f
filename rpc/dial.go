package rpc

import (
	"context"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// Dialer opens connections to peers. It must return when ctx is done.
type Dialer func(ctx context.Context, addr string) (net.Conn, error)

// maxPeerMessage bounds one gRPC message between nodes. The largest legitimate
// one is a raft message with a single entry of the maximal command size.
const maxPeerMessage = 64 << 20

// deadPeer is how long sent bytes may stay unacknowledged before the connection
// counts as dead. Raft sends something to every peer each heartbeat, so this
// notices a peer that vanished without a word (power, cable, dropped packets)
// within about a second; gRPC's own pings cannot: it does not allow clients to
// send them more often than every ten seconds.
const deadPeer = time.Second

// Flow-control windows of a connection between nodes, for each direction. They
// are fixed: with gRPC's default, every burst of data is answered by a window
// update and a ping that measures the connection, and that ping by another. Per
// log entry this was more packets than the entry and its answer themselves; without them
// a commit costs an eighth less CPU. A window bounds what waits unread, and with
// the round trip the rate: 8 MiB are a gigabyte a second over 8 ms.
const (
	peerStreamWindow = 8 << 20
	peerConnWindow   = 16 << 20
)

// Buffers of a connection between nodes: what is read at once, and what is gathered to
// be written at once where an image goes out. With gRPC's 32 KiB an image comes in more and
// smaller pieces, each of which wakes its receiver, and the writes of clients wait for that.
// On plain TCP a read buffer is in use only while there is something to read. One for
// writing always is, so only a connection that an image is pushed through has a large one.
const (
	peerReadBuffer   = 128 << 10
	imageWriteBuffer = 256 << 10
)

// peerDialer opens gRPC connections to peers.
type peerDialer struct {
	dial    Dialer
	creds   credentials.TransportCredentials
	timeout time.Duration
}

func newPeerDialer(dial Dialer, creds credentials.TransportCredentials, timeout time.Duration) peerDialer {
	if dial == nil {
		dial = dialTCP(timeout)
	}
	if creds == nil {
		creds = insecure.NewCredentials()
	}
	return peerDialer{dial: dial, creds: creds, timeout: timeout}
}

// dialTCP dials with the kernel's own detection of dead connections, for those
// on which nothing is sent.
func dialTCP(timeout time.Duration) Dialer {
	d := &net.Dialer{
		Timeout: timeout,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: deadPeer, Interval: deadPeer / 2, Count: 2,
		},
	}
	return func(ctx context.Context, addr string) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", addr)
	}
}

// conn returns a connection to addr that is set up by the first call on it.
// That call fails when the first attempt does: waiting and repeating is left to
// the callers, which know when it is worth it. more are options beside the usual ones,
// which win over them.
func (d peerDialer) conn(addr string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	// passthrough: the dialer resolves names at every attempt, so a peer that
	// came back with another address is found.
	return grpc.NewClient("passthrough:///"+addr, append(slices.Clip(more),
		grpc.WithContextDialer(d.dial),
		grpc.WithTransportCredentials(d.creds),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithStaticStreamWindowSize(peerStreamWindow),
		grpc.WithStaticConnWindowSize(peerConnWindow),
		grpc.WithReadBufferSize(peerReadBuffer),
		dialBuffers(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1, MaxDelay: time.Second},
			MinConnectTimeout: d.timeout,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time:                10 * time.Second,
			Timeout:             deadPeer, // also becomes TCP_USER_TIMEOUT
			PermitWithoutStream: true,
		}),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodecV2(NewCodec()),
			grpc.MaxCallRecvMsgSize(maxPeerMessage),
		),
	)...)
}

// PeerServerOptions returns the options of a grpc.Server that serves
// peerpb.Peer: codec, message limit, and the detection of dead peers.
func PeerServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(NewCodec()),
		grpc.MaxRecvMsgSize(maxPeerMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: deadPeer, Timeout: deadPeer}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 5 * time.Second, PermitWithoutStream: true,
		}),
		grpc.ConnectionTimeout(5 * time.Second),
		grpc.WaitForHandlers(true),
		grpc.StaticStreamWindowSize(peerStreamWindow),
		grpc.StaticConnWindowSize(peerConnWindow),
		grpc.ReadBufferSize(peerReadBuffer),
		serveBuffers(),
	}
}
