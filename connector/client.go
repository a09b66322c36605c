package connector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
)

const (
	// failoverTime is within which every endpoint has been tried.
	failoverTime = 2500 * time.Millisecond
	// maxStagger is how long one endpoint may think alone.
	maxStagger = 700 * time.Millisecond
	// defaultCallTimeout bounds a call whose context has no deadline.
	defaultCallTimeout = 10 * time.Second
)

// A Config says how to reach the key service.
type Config struct {
	// Identity is who we are and whom we trust. Required.
	Identity *Identity
	// Endpoints are host:port addresses. Empty: those of the identity.
	Endpoints []string
	// CallTimeout bounds a call whose context has no deadline, all attempts
	// together. 0: 10 s.
	CallTimeout time.Duration
	// Dial opens a network connection; nil: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Logger gets failovers and reconnects. nil: slog.Default().
	Logger *slog.Logger
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

// A Client calls the key service, whichever of its endpoints answers. It holds
// one connection per endpoint and is safe for concurrent use. Every error is a
// *CallError that wraps a class of package dek; dek.ErrUnavailable means that
// no endpoint gave an answer, dek.ErrDenied that one said no.
type Client struct {
	cfg       Config
	endpoints []*endpoint
	preferred atomic.Int32 // index of the endpoint that answered last
	flights   flights
}

// NewClient checks cfg and prepares the connections; none is opened before the
// first call. It wraps dek.ErrInvalid.
func NewClient(cfg Config) (*Client, error) {
	if cfg.Identity == nil {
		return nil, fmt.Errorf("%w: client: no identity", dek.ErrInvalid)
	}
	if len(cfg.Endpoints) == 0 {
		cfg.Endpoints = cfg.Identity.Endpoints()
	}
	if err := checkEndpoints(cfg.Endpoints); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = defaultCallTimeout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c := &Client{cfg: cfg}
	c.flights.carry, c.flights.holdUp = c.carry, holdUp
	for _, addr := range cfg.Endpoints {
		e, err := newEndpoint(addr, &cfg)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.endpoints = append(c.endpoints, e)
	}
	return c, nil
}

// Close ends every connection and the calls on them.
func (c *Client) Close() error {
	var errs []error
	for _, e := range c.endpoints {
		errs = append(errs, e.close())
	}
	return errors.Join(errs...)
}

// Endpoints returns the addresses, comma separated, for messages.
func (c *Client) Endpoints() string { return strings.Join(c.cfg.Endpoints, ",") }

// Identity returns who the client is.
func (c *Client) Identity() *Identity { return c.cfg.Identity }

// Reconnect opens new connections for the calls that begin from now on, which
// present the identity as it is now. Running calls end on the old ones.
func (c *Client) Reconnect() error {
	var errs []error
	for _, e := range c.endpoints {
		errs = append(errs, e.renew())
	}
	return errors.Join(errs...)
}

// order returns the endpoints, the one that answered last first.
func (c *Client) order() []*endpoint {
	n := len(c.endpoints)
	first := int(c.preferred.Load())
	list := make([]*endpoint, 0, n)
	for i := range n {
		list = append(list, c.endpoints[(first+i)%n])
	}
	return list
}

func (c *Client) prefer(e *endpoint) {
	for i, have := range c.endpoints {
		if have == e && c.preferred.Swap(int32(i)) != int32(i) { //nolint:gosec // a handful of endpoints
			c.cfg.Logger.Info("key service endpoint in use", "endpoint", e.addr)
		}
	}
}

// stagger is the head start of one endpoint over the next.
func (c *Client) stagger() time.Duration {
	return min(maxStagger, failoverTime/time.Duration(len(c.endpoints)))
}

// A method is one call: its name in messages, how often it may be sent, and
// its deadline where the context has none.
type method struct {
	op      string
	safety  safety
	timeout time.Duration // 0: Config.CallTimeout
}

// safety says how often a call may be sent.
type safety int

const (
	// onceOnly: a repetition could have a second effect. It is sent once, over
	// a connection that is known to be up.
	onceOnly safety = iota
	// repeatable: it carries a request id or sets a state, so a repetition has
	// the same effect. Sent again when nothing is known of the outcome.
	repeatable
	// hedged: it changes nothing. Sent to the next endpoint when one is slow.
	hedged
)

// invoke runs f against an endpoint that answers.
//
// A hedged call starts at the next endpoint as soon as one has failed or has
// not answered within the stagger, so that a dead, hanging or half-open one
// costs less than a second; the first answer wins. Where all have failed,
// hedged and repeatable calls go round again, with back-off, until the
// deadline: nothing is known and nothing is lost by asking.
func invoke[R any](ctx context.Context, c *Client, m method, f func(context.Context, grpc.ClientConnInterface) (R, error)) (R, error) {
	if _, ok := ctx.Deadline(); !ok {
		if m.timeout == 0 {
			m.timeout = c.cfg.CallTimeout
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, m.timeout)
		defer cancel()
	}
	round := race[R]
	if m.safety != hedged {
		round = once[R]
	}
	for delay := firstRetry; ; delay = min(delay*2, longestRetry) {
		r, err := round(ctx, c, m, f)
		if err == nil || m.safety == onceOnly || !retryable(err) {
			return r, err
		}
		if pause := jitter(delay); !pauseWithin(ctx, pause) {
			return r, err
		}
	}
}

// pauseWithin waits for d unless the deadline comes first: then what is known
// now is the answer, and it is better than "deadline exceeded".
func pauseWithin(ctx context.Context, d time.Duration) bool {
	if end, ok := ctx.Deadline(); ok && time.Until(end) < d {
		return false
	}
	return sleep(ctx, d)
}

type outcome[R any] struct {
	r   R
	err error
	at  *endpoint
}

// race tries every endpoint once, staggered; the first answer wins.
func race[R any](ctx context.Context, c *Client, m method, f func(context.Context, grpc.ClientConnInterface) (R, error)) (R, error) {
	order := c.order()
	if len(order) == 1 {
		return attempt(ctx, order[0], m, f)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the losers; their results are dropped by the channel
	results := make(chan outcome[R], len(order))
	next, running := 0, 0
	launch := func() {
		e := order[next]
		next, running = next+1, running+1
		go func() {
			r, err := attempt(ctx, e, m, f)
			results <- outcome[R]{r, err, e}
		}()
	}
	launch()
	timer := time.NewTimer(c.stagger())
	defer timer.Stop()
	var failures []error
	for {
		select {
		case <-timer.C:
			if next < len(order) {
				launch()
				timer.Reset(c.stagger())
			}
			continue
		case o := <-results:
			running--
			if o.err == nil || !retryable(o.err) {
				c.prefer(o.at)
				return o.r, o.err
			}
			failures = append(failures, o.err)
		}
		if next < len(order) {
			launch()
			timer.Reset(c.stagger())
		} else if running == 0 {
			var zero R
			return zero, joinCallErrors(m.op, failures)
		}
	}
}

// attempt calls one endpoint.
func attempt[R any](ctx context.Context, e *endpoint, m method, f func(context.Context, grpc.ClientConnInterface) (R, error)) (R, error) {
	var zero R
	l, err := e.acquire()
	if err != nil {
		return zero, err
	}
	defer l.release()
	_ = l.ready(ctx) // if not, the call below fails at once and says why
	r, err := f(ctx, l.conn)
	if err != nil {
		return zero, decodeError(ctx, m.op, e.addr, err)
	}
	return r, nil
}

// once sends a call exactly one time. An endpoint is chosen by its connection;
// if none is up, the call fails at once on the first one and says why.
func once[R any](ctx context.Context, c *Client, m method, f func(context.Context, grpc.ClientConnInterface) (R, error)) (R, error) {
	return attempt(ctx, c.connected(ctx), m, f)
}

// connected returns the first endpoint whose connection is up, trying all of
// them staggered, or the preferred one if none is.
func (c *Client) connected(ctx context.Context) *endpoint {
	order := c.order()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	won := make(chan int, len(order))
	for n, e := range order {
		go func() { won <- c.try(ctx, e, n) }()
	}
	for range order {
		if n := <-won; n >= 0 {
			c.prefer(order[n])
			return order[n]
		}
	}
	return order[0]
}

// try connects e after n head starts and returns n, or -1 if it is not up.
func (c *Client) try(ctx context.Context, e *endpoint, n int) int {
	if n > 0 && !sleep(ctx, time.Duration(n)*c.stagger()) {
		return -1
	}
	l, err := e.acquire()
	if err != nil {
		return -1
	}
	defer l.release()
	if !l.ready(ctx) {
		return -1
	}
	return n
}

// joinCallErrors makes one unavailable error of those of all endpoints.
func joinCallErrors(op string, errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	out := &CallError{Op: op, Class: dek.ErrUnavailable}
	var where, what []string
	for _, err := range errs {
		var e *CallError
		if !errors.As(err, &e) {
			continue
		}
		where = append(where, e.Endpoint)
		what = append(what, e.Endpoint+": "+e.Detail)
		if out.Cause == nil {
			out.Cause = e.Cause
		}
	}
	out.Endpoint, out.Detail = strings.Join(where, ","), strings.Join(what, "; ")
	return out
}

// jitter returns a random part of d ("full jitter"), so that many agents that
// lost the same service do not come back as one.
func jitter(d time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(d) + 1)) //nolint:gosec // not a secret
}

// sleep waits for d and reports whether ctx allowed it.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
