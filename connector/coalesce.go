package connector

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// Unwraps that are asked for one by one cost the service and this host several
// times what those of a batch cost. So who comes while maxCalls are under way
// waits for one of them to end, and then all who wait go out in one call. Who
// finds fewer goes out at once: nobody waits for company.
const (
	// maxCalls is enough to keep the token busy while an answer and the next
	// question are on their way.
	maxCalls = 2
	// maxTogether bounds one call, in unwraps.
	maxTogether = 64
	// holdUp is how long a call may keep others waiting. One that has not ended
	// by then (a retry, a token that hangs for one key) counts no more.
	holdUp = 250 * time.Millisecond
)

// A trip is one call with its flights.
type trip struct {
	flights []*flight
	cancel  context.CancelFunc
	wanted  int // flights without a result that somebody waits for; guarded by flights.mu
}

// without counts flights off; flights.mu is held.
func (t *trip) without(n int) {
	if t.wanted -= n; t.wanted == 0 {
		t.cancel()
	}
}

// depart sends out who may go; s.mu is held.
func (s *flights) depart() {
	for s.calls < maxCalls && len(s.queue) > 0 {
		// An even share each: while one large call is answered, the other one
		// keeps the token busy.
		n := min(len(s.queue), maxTogether, (s.aboard+len(s.queue)+maxCalls-1)/maxCalls)
		ctx, cancel := context.WithCancel(context.Background())
		t := &trip{flights: slices.Clone(s.queue[:n]), cancel: cancel, wanted: n}
		for _, fl := range t.flights {
			fl.trip = t
		}
		s.queue = slices.Delete(s.queue, 0, n)
		s.calls, s.aboard = s.calls+1, s.aboard+n
		go s.travel(ctx, t)
	}
}

// travel makes one call.
func (s *flights) travel(ctx context.Context, t *trip) {
	end := sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.calls, s.aboard = s.calls-1, s.aboard-len(t.flights)
		s.depart()
	})
	late := time.AfterFunc(s.holdUp, end)
	s.carry(ctx, t.flights, s.finish)
	late.Stop()
	runtime.Gosched() // who got an answer may ask again: let them come together
	end()
}

// carry unwraps for flights, each of which gets its own answer.
func (c *Client) carry(ctx context.Context, fls []*flight, finish finish) {
	if len(fls) == 1 {
		k, err := c.unwrapOne(ctx, fls[0].w)
		finish(fls[0], k, err)
		return
	}
	ws := make([]dek.Wrapped, len(fls))
	for i, fl := range fls {
		ws[i] = fl.w
	}
	results, err := c.unwrapPart(ctx, ws)
	if err != nil {
		for _, fl := range fls {
			finish(fl, nil, ofOne(err, fl.w))
		}
		return
	}
	var again sync.WaitGroup
	for i, fl := range fls {
		if r := results[i]; !retryable(r.Err) {
			finish(fl, r.Key, r.Err)
			continue
		}
		// Nothing is known of this one; an unwrap changes nothing. Alone it is
		// tried everywhere, until its time is up.
		again.Go(func() {
			k, err := c.unwrapOne(ctx, fl.w)
			finish(fl, k, err)
		})
	}
	again.Wait()
}

// unwrapOne makes a call for one DEK.
func (c *Client) unwrapOne(ctx context.Context, w dek.Wrapped) (*dek.Key, error) {
	op := opUnwrap(w)
	req := &kmspb.UnwrapRequest{Wrapped: w.Bytes()}
	resp, err := invoke(ctx, c, method{op: op, safety: hedged}, func(ctx context.Context, cc grpc.ClientConnInterface) (*kmspb.UnwrapResponse, error) {
		return kmspb.NewInstancesClient(cc).Unwrap(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	return keyFrom(op, c.Endpoints(), resp.GetKey())
}

func opUnwrap(w dek.Wrapped) string { return "unwrap " + w.ID().String() }

// ofOne is the error of a whole call in the words of the caller for w.
func ofOne(err error, w dek.Wrapped) error {
	var e *CallError
	if !errors.As(err, &e) {
		return err
	}
	mine := *e
	mine.Op = opUnwrap(w)
	return &mine
}
