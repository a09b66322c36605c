package connector

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"

	"github.com/keyward/keyward/dek"
)

const (
	firstRetry   = 50 * time.Millisecond
	longestRetry = 30 * time.Second
	// keepaliveAfter and keepaliveTimeout find a half-open connection or a
	// stopped process in 15 s; 10 s is the shortest gRPC allows.
	keepaliveAfter   = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
	// connectTimeout bounds TCP and TLS of one attempt.
	connectTimeout = 3 * time.Second
	// maxMessageBytes bounds one reply: an instance with 10,000 wrapped DEKs.
	maxMessageBytes = 32 << 20
)

// connectParams replaces gRPC's first retry after one second by ours.
func connectParams() grpc.DialOption {
	return grpc.WithConnectParams(grpc.ConnectParams{
		// Jitter 1 spreads a delay evenly over 0 to twice its value.
		Backoff:           backoff.Config{BaseDelay: firstRetry, Multiplier: 1.6, Jitter: 1, MaxDelay: longestRetry / 2},
		MinConnectTimeout: connectTimeout,
	})
}

// dialer returns gRPC's dial function.
func dialer(dial func(context.Context, string) (net.Conn, error)) func(context.Context, string) (net.Conn, error) {
	if dial != nil {
		return dial
	}
	return func(ctx context.Context, addr string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
}

// A link is one kept connection to one endpoint. It is closed when it was
// replaced and its last call has ended.
type link struct {
	endpoint string
	conn     *grpc.ClientConn
	retired  chan struct{} // closed when a newer link took its place

	mu       sync.Mutex
	refs     int
	replaced bool
}

// An endpoint is one address of the key service and its current link.
type endpoint struct {
	addr string
	open func() (*link, error)

	mu     sync.Mutex
	link   *link
	closed bool
}

func newEndpoint(addr string, c *Config) (*endpoint, error) {
	e := &endpoint{addr: addr}
	e.open = func() (*link, error) {
		conn, err := grpc.NewClient("passthrough:///"+addr,
			grpc.WithTransportCredentials(credentialsOf(c.Identity, c.Now)),
			grpc.WithContextDialer(dialer(c.Dial)),
			grpc.WithIdleTimeout(0), // kept: a handshake costs a millisecond of CPU
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveAfter, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
			grpc.WithDisableServiceConfig(), grpc.WithNoProxy(), connectParams())
		if err != nil {
			return nil, fmt.Errorf("%w: endpoint %q: %w", dek.ErrInvalid, addr, err)
		}
		return &link{endpoint: addr, conn: conn, retired: make(chan struct{})}, nil
	}
	var err error
	e.link, err = e.open()
	return e, err
}

// acquire returns the current link; the caller releases it. A link whose last
// connect failed is replaced: whoever calls wants an attempt now, not the rest
// of a back-off that nobody waited for.
func (e *endpoint) acquire() (*link, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.link.conn.GetState() == connectivity.TransientFailure {
		if err := e.renewLocked(); err != nil {
			return nil, err
		}
	}
	e.link.mu.Lock()
	e.link.refs++
	e.link.mu.Unlock()
	return e.link, nil
}

func (l *link) release() {
	l.mu.Lock()
	l.refs--
	last := l.refs == 0 && l.replaced
	l.mu.Unlock()
	if last {
		_ = l.conn.Close()
	}
}

// renew puts a fresh link in place; calls on the old one end by themselves.
func (e *endpoint) renew() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.renewLocked()
}

func (e *endpoint) renewLocked() error {
	if e.closed {
		return fmt.Errorf("%w: the client was closed", dek.ErrUnavailable)
	}
	fresh, err := e.open()
	if err != nil {
		return err
	}
	old := e.link
	e.link = fresh
	close(old.retired)
	old.mu.Lock()
	old.replaced = true
	idle := old.refs == 0
	old.mu.Unlock()
	if idle {
		_ = old.conn.Close()
	}
	return nil
}

// close ends the connection and every call on it.
func (e *endpoint) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil
	}
	e.closed = true
	return e.link.conn.Close()
}

// ready connects and reports whether the link is up; it ends at the first
// connect that fails. The link must come from acquire just now.
func (l *link) ready(ctx context.Context) bool {
	for {
		state := l.conn.GetState()
		switch state {
		case connectivity.Ready:
			return true
		case connectivity.TransientFailure, connectivity.Shutdown:
			return false
		case connectivity.Idle:
			l.conn.Connect()
		}
		if !l.conn.WaitForStateChange(ctx, state) {
			return false
		}
	}
}
