package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// Back-off between starts of a child. A start that fails doubles it; a child
// that lived longer than healthyLife resets it.
const (
	firstBackoff = 100 * time.Millisecond
	lastBackoff  = 5 * time.Second
	healthyLife  = 10 * time.Second
	pinPoll      = time.Second
	startLimit   = 30 * time.Second // or three deadlines, if longer
	drainLimit   = 2 * time.Second
)

// A Token is a PKCS#11 token behind a supervised child process. A call that
// hangs, crashes or finds its sessions lost costs the child, never this
// process: the child is started again, logs in once, and must prove that it
// still has the token that was pinned.
//
// All methods may be called concurrently. While the child is being replaced,
// calls wait for it; once a start has failed they fail at once, wrapping
// ErrUnavailable (gone, hung) or ErrPrecondition (wrong PIN, another token),
// until a later start succeeds.
type Token struct {
	cfg    Config
	log    *slog.Logger
	stop   context.CancelFunc
	closed chan struct{} // supervisor ended

	mu     sync.Mutex
	link   *link // nil while down
	cause  error // why the last start failed; nil while it is tried
	change chan struct{}
	pinned Identity
	caps   Capabilities
}

// Open checks the configuration, starts the child, and returns once the token
// has been found, logged in, probed and proved to be the expected one. It
// wraps ErrInvalid and ErrPrecondition as Config.Check, ErrPrecondition for a
// refused PIN (tried exactly once) or another token, and ErrUnavailable if
// there is no token or ctx ends. Close the Token to end the child.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	t := &Token{cfg: cfg, log: cfg.Logger, closed: make(chan struct{}), change: make(chan struct{})}
	if t.log == nil {
		t.log = slog.New(slog.DiscardHandler)
	}
	l, err := startChild(ctx, cfg, cfg.Expect, t.startLimit())
	if err != nil {
		return nil, fmt.Errorf("open token: %w", err)
	}
	t.link, t.pinned, t.caps = l, l.id, l.caps
	run, stop := context.WithCancel(context.Background())
	t.stop = stop
	go t.supervise(run, l)
	return t, nil
}

func (t *Token) startLimit() time.Duration { return max(startLimit, 3*t.cfg.Deadline) }

// supervise replaces children until Close.
func (t *Token) supervise(ctx context.Context, l *link) {
	defer close(t.closed)
	wait := firstBackoff
	for {
		born := time.Now()
		select {
		case <-ctx.Done():
			t.set(nil, errClosed())
			l.close(t.cfg.Deadline)
			return
		case <-l.ended:
		}
		t.set(nil, nil)
		l.close(drainLimit)
		t.log.Warn("token child ended", "cause", l.cause, "process", l.obituary())
		if time.Since(born) > healthyLife {
			wait = firstBackoff
		} else if !sleep(ctx, wait) {
			t.set(nil, errClosed())
			return
		} else {
			wait = min(2*wait, lastBackoff)
		}
		if l = t.restart(ctx, &wait); l == nil {
			t.set(nil, errClosed())
			return
		}
	}
}

// restart starts children until one lives, or returns nil when ctx ends.
func (t *Token) restart(ctx context.Context, wait *time.Duration) *link {
	for {
		stamp := stampPIN(t.cfg.PINFile)
		l, err := startChild(ctx, t.cfg, t.pinned, t.startLimit())
		if err == nil {
			t.log.Info("token child started", "label", l.id.Label, "serial", l.id.Serial)
			t.set(l, nil)
			return l
		}
		t.set(nil, err)
		t.log.Warn("token child did not start", "err", err, "retry", *wait)
		for errors.Is(err, errPIN) && stampPIN(t.cfg.PINFile) == stamp {
			if !sleep(ctx, pinPoll) {
				return nil
			}
		}
		if !sleep(ctx, *wait) {
			return nil
		}
		*wait = min(2**wait, lastBackoff)
	}
}

// sleep waits d, give or take a fifth, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d*4/5 + rand.N(d*2/5+1))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// set publishes a new state to waiting callers.
func (t *Token) set(l *link, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.link, t.cause = l, cause
	if l != nil {
		t.caps = l.caps
	}
	close(t.change)
	t.change = make(chan struct{})
}

// current returns the living link. It waits only while a start is under way.
func (t *Token) current(ctx context.Context) (*link, error) {
	for {
		t.mu.Lock()
		l, cause, change := t.link, t.cause, t.change
		t.mu.Unlock()
		if l != nil {
			select {
			case <-l.ended: // the supervisor is about to notice
			default:
				return l, nil
			}
		} else if cause != nil {
			return nil, cause
		}
		select {
		case <-change:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: token child restarting: %w", dek.ErrUnavailable, context.Cause(ctx))
		}
	}
}

func errClosed() error { return fmt.Errorf("%w: token closed", dek.ErrUnavailable) }

// Close ends the child and waits for it. Calls under way fail, wrapping
// ErrUnavailable, but what the device has begun it finishes first, for at most
// Config.Deadline. Close may be called more than once.
func (t *Token) Close() error {
	t.stop()
	<-t.closed
	return nil
}
