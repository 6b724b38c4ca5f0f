package client

import (
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Options are the settings of a Client; the zero value is right for a cluster
// without TLS.
type Options struct {
	// Timeout bounds a call whose context has no deadline, all attempts
	// together. Default 5 s.
	Timeout time.Duration
	// AttemptTimeout bounds one attempt, where there is another node to go to:
	// a machine that vanished without a word must not use up the whole
	// timeout. Default 2 s.
	AttemptTimeout time.Duration
	// BackoffMin and BackoffMax bound the pause between attempts once every
	// node has failed. Defaults 20 ms and 500 ms.
	BackoffMin, BackoffMax time.Duration
	// Credentials secures connections; nil means plaintext.
	Credentials credentials.TransportCredentials
	// DialOptions are appended to those of the client.
	DialOptions []grpc.DialOption
}

func (o *Options) ensureDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.Timeout, 5*time.Second)
	def(&o.AttemptTimeout, 2*time.Second)
	def(&o.BackoffMin, 20*time.Millisecond)
	def(&o.BackoffMax, 500*time.Millisecond)
	if o.Credentials == nil {
		o.Credentials = insecure.NewCredentials()
	}
}

func (o *Options) validate(endpoints []string) error {
	var errs []error
	if len(endpoints) == 0 {
		errs = append(errs, errors.New("client: no endpoint given; name at least one node as host:port"))
	}
	for _, e := range endpoints {
		if _, _, err := net.SplitHostPort(e); err != nil {
			errs = append(errs, fmt.Errorf("client: endpoint %q is not host:port: %w", e, err))
		}
	}
	if o.Timeout < 0 || o.AttemptTimeout < 0 || o.BackoffMin < 0 || o.BackoffMax < o.BackoffMin {
		errs = append(errs, errors.New("client: timeouts must not be negative, and BackoffMax not below BackoffMin"))
	}
	return errors.Join(errs...)
}
