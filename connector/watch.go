package connector

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

const (
	// watchSilence is how long a stream may say nothing: the service pings
	// every 10 s at the latest.
	watchSilence = 30 * time.Second
	// deniedRetry bounds the wait after a no: it may be taken back.
	deniedRetry = 5 * time.Second
)

// A NoticeKind says what a Notice is about.
type NoticeKind int

// The kinds. Connected, Lost and Denied are about the stream itself.
const (
	NoticeConnected NoticeKind = iota + 1 // the stream is up; changes may have been missed
	NoticeLost                            // no endpoint can be reached; Err says why
	NoticeDenied                          // the service refuses the stream; Err says why
	NoticePing                            // nothing changed; carries the newest checkpoint
	NoticeRolled                          // Keyring has a new version
	NoticeDisabled                        // Keyring, or its master key, was disabled
	NoticeEnabled                         // and enabled again
	NoticeRewrapped                       // Keyring has new wrapped DEKs, the keys are the same
	NoticeRevoked                         // the instance or identity was revoked
)

var noticeKinds = map[kmspb.Notice_Kind]NoticeKind{
	kmspb.Notice_KIND_PING:      NoticePing,
	kmspb.Notice_KIND_ROLLED:    NoticeRolled,
	kmspb.Notice_KIND_DISABLED:  NoticeDisabled,
	kmspb.Notice_KIND_ENABLED:   NoticeEnabled,
	kmspb.Notice_KIND_REWRAPPED: NoticeRewrapped,
	kmspb.Notice_KIND_REVOKED:   NoticeRevoked,
}

// A Notice is one change that concerns an instance.
type Notice struct {
	Kind       NoticeKind
	Keyring    string // name inside the instance's vault, may be empty: all
	Generation uint64
	Checkpoint []byte
	Err        error
}

// Watch calls f with every change that concerns the instance until ctx ends,
// and returns its error. Calls of f never overlap. A stream that breaks is
// opened again, at another endpoint if need be, with back-off from 50 ms to
// 30 s; f is told Lost each time that no endpoint could be reached (other calls
// may have come through meanwhile), Denied once, and Connected when the stream
// is up again.
func (c *Client) Watch(ctx context.Context, instance string, f func(Notice)) error {
	delay := firstRetry
	var told NoticeKind
	for n := 0; ; n++ {
		order := c.order()
		err := c.watchOnce(ctx, order[n%len(order)], instance, func(notice Notice) {
			delay, told = firstRetry, 0
			f(notice)
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, errLinkRetired) {
			n--
			continue
		}
		kind, longest := NoticeLost, longestRetry
		if errors.Is(err, dek.ErrDenied) {
			kind, longest = NoticeDenied, deniedRetry
		}
		lastOfRound := (n+1)%len(order) == 0
		if kind == NoticeLost && lastOfRound || kind == NoticeDenied && told != kind {
			told = kind
			f(Notice{Kind: kind, Err: err})
		}
		if lastOfRound || kind == NoticeDenied {
			if !sleep(ctx, jitter(min(delay, longest))) {
				return ctx.Err()
			}
			delay = min(delay*2, longest)
		}
	}
}

var errLinkRetired = errors.New("connector: the connection was replaced")

// watchOnce follows one stream until it breaks.
func (c *Client) watchOnce(ctx context.Context, e *endpoint, instance string, f func(Notice)) error {
	op := "watch instance " + instance
	l, err := e.acquire()
	if err != nil {
		return err
	}
	defer l.release()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// A stream that says nothing, or whose connection was replaced, is ended.
	alive := make(chan struct{}, 1)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		watchdog(ctx, cancel, alive, l.retired)
	}()
	defer func() { cancel(nil); <-watched }()

	_ = l.ready(ctx) // if not, the call below fails at once and says why
	stream, err := kmspb.NewInstancesClient(l.conn).Watch(ctx, &kmspb.WatchRequest{Instance: instance})
	for first := true; err == nil; first = false {
		var n *kmspb.Notice
		if n, err = stream.Recv(); err != nil {
			break
		}
		select {
		case alive <- struct{}{}:
		default:
		}
		if first {
			c.prefer(e)
			f(Notice{Kind: NoticeConnected, Generation: n.GetGeneration(), Checkpoint: n.GetCheckpoint()})
		}
		if kind, known := noticeKinds[n.GetKind()]; known {
			f(Notice{Kind: kind, Keyring: n.GetKeyring(), Generation: n.GetGeneration(), Checkpoint: n.GetCheckpoint()})
		}
	}
	if cause := context.Cause(ctx); errors.Is(cause, errLinkRetired) {
		return cause
	}
	return decodeError(ctx, op, e.addr, err)
}

var errSilence = errors.New("connector: the service has said nothing for 30 s")

func watchdog(ctx context.Context, cancel context.CancelCauseFunc, alive, retired <-chan struct{}) {
	t := time.NewTimer(watchSilence)
	defer t.Stop()
	for {
		select {
		case <-alive:
			t.Reset(watchSilence)
		case <-retired:
			cancel(errLinkRetired)
			return
		case <-t.C:
			cancel(errSilence)
			return
		case <-ctx.Done():
			return
		}
	}
}

// streamOnce opens a stream over a connection that is up. The caller reads it
// to the end and then calls done.
func streamOnce[S any](ctx context.Context, c *Client, op string, open func(context.Context, grpc.ClientConnInterface) (S, error)) (s S, endpoint string, done func(), err error) {
	e := c.connected(ctx)
	l, err := e.acquire()
	if err != nil {
		return s, e.addr, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	if s, err = open(ctx, l.conn); err != nil {
		cancel()
		l.release()
		return s, e.addr, nil, decodeError(ctx, op, e.addr, err)
	}
	return s, e.addr, func() { cancel(); l.release() }, nil
}
