package connector_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// A held is a fake service whose unwraps wait at its gate, and their callers.
type held struct {
	*fakeKMS
	t   *testing.T
	c   *connector.Client
	all sync.WaitGroup

	own   sync.Mutex
	wraps map[string]dek.Wrapped
	errs  map[string]error
}

// newHeld sends as many unwraps as go out at once, one each, and returns while
// they are held: who comes now has to wait.
func newHeld(t *testing.T, endpoints ...*fakeKMS) *held {
	h := &held{fakeKMS: endpoints[0], t: t,
		wraps: map[string]dek.Wrapped{}, errs: map[string]error{}}
	h.gate = make(chan struct{})
	var addrs []string
	for _, e := range endpoints {
		addrs = append(addrs, e.addr)
	}
	h.c = h.client(t, addrs...)
	h.c.HoldUpFor(time.Hour)
	for i := range connector.MaxCalls {
		h.ask(testContext(t), "first", uint32(i+1))
		h.await("Unwrap", i+1)
	}
	return h
}

// await returns once the service has got that many calls.
func (h *held) await(name string, n int) {
	for h.count(name) < n {
		runtime.Gosched()
	}
}

// ask unwraps in the background and checks the key.
func (h *held) ask(ctx context.Context, keyring string, version uint32) {
	name := fmt.Sprintf("%s/%d", keyring, version)
	w, ok := h.wraps[name]
	if !ok {
		w = wrapped(h.t, keyring, version)
		h.wraps[name] = w
	}
	h.all.Go(func() {
		k, err := h.c.Unwrap(ctx, w)
		h.own.Lock()
		h.errs[name] = err
		h.own.Unlock()
		if err == nil {
			wantKey(h.t, k, plainKey(keyring, version))
			k.Destroy()
		}
	})
}

// queue asks for n and returns when they wait.
func (h *held) queue(ctx context.Context, keyring string, n int) {
	before := h.c.Waiting()
	for i := range n {
		h.ask(ctx, keyring, uint32(i+1))
	}
	for h.c.Waiting() < before+n {
		runtime.Gosched()
	}
}

func (h *held) err(name string) error {
	h.own.Lock()
	defer h.own.Unlock()
	return h.errs[name]
}

// Who comes while calls are under way goes out with the others, once, and gets
// an own answer: one that is refused takes nobody along.
func TestCoalesce(t *testing.T) {
	h := newHeld(t, newFakeKMS(t, newTestCA(t, "ca")))
	h.set(func() { h.disabled["secret"] = true })
	h.queue(testContext(t), "orders", 40)
	h.queue(testContext(t), "secret", 1)
	for i := range 40 { // the same ones: nothing more to send
		h.ask(testContext(t), "orders", uint32(i+1))
	}
	for h.c.Boarded() < connector.MaxCalls+81 {
		runtime.Gosched()
	}
	close(h.gate)
	h.all.Wait()
	if n := h.count("Unwrap") + h.count("UnwrapBatch"); n > connector.MaxCalls+8 { // shares halve where one call is slow
		t.Errorf("%d calls for 41 unwraps that could go together", n)
	}
	if got, want := h.unwrapped(), connector.MaxCalls+41; got != want {
		t.Errorf("the service unwrapped %d times, want %d", got, want)
	}
	for name, err := range h.errs {
		if name == "secret/1" != errors.Is(err, dek.ErrDenied) || name != "secret/1" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is true of a whole call is told to each caller about their own key.
func TestCoalesceRefused(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want error
	}{
		{errNo, dek.ErrDenied},
		{reason(codes.ResourceExhausted, "EXHAUSTED"), dek.ErrExhausted},
	} {
		h := newHeld(t, newFakeKMS(t, newTestCA(t, "ca")))
		h.queue(testContext(t), "orders", 10)
		h.set(func() { h.unwrapErr = tc.err })
		close(h.gate)
		h.all.Wait()
		for i := range 10 {
			name := fmt.Sprintf("orders/%d", i+1)
			var e *connector.CallError
			if err := h.err(name); !errors.Is(err, tc.want) || !errors.As(err, &e) || e.Op != "unwrap acme/"+name || e.Request != "r1" {
				t.Errorf("%s: got %v, want %v", name, err, tc.want)
			}
		}
	}
}

// Of an item that says unavailable nothing is known: it is asked again alone,
// also elsewhere, and the others do not wait for it.
func TestCoalesceUnavailableItem(t *testing.T) {
	ca := newTestCA(t, "ca")
	good := newFakeKMS(t, ca)
	h := newHeld(t, newFakeKMS(t, ca), good)
	h.set(func() { h.sick["bad"] = true })
	h.queue(testContext(t), "orders", 5)
	h.queue(testContext(t), "bad", 1)
	close(h.gate)
	h.all.Wait()
	for name, err := range h.errs {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if good.count("Unwrap") == 0 {
		t.Error("the other endpoint was not asked")
	}
}

// Each waits as long as its own context allows, in the queue and on the way.
func TestCoalesceCancelled(t *testing.T) {
	h := newHeld(t, newFakeKMS(t, newTestCA(t, "ca")))
	ctx, leave := context.WithCancel(testContext(t))
	h.queue(testContext(t), "orders", 8)
	h.queue(ctx, "queued", 3)
	leave()
	for h.c.Waiting() > 8 {
		runtime.Gosched()
	}
	ctx, leave = context.WithCancel(testContext(t))
	h.queue(ctx, "travels", 3)
	first, second := h.gate, make(chan struct{})
	h.set(func() { h.gate = second })
	close(first)
	h.await("UnwrapBatch", 2) // all 11 of them: as many calls as may be
	leave()
	for h.err("travels/1") == nil || h.err("travels/2") == nil || h.err("travels/3") == nil {
		runtime.Gosched()
	}
	close(second)
	h.all.Wait()
	for name, err := range h.errs {
		gone := name[0] == 'q' || name[0] == 't'
		if gone != errors.Is(err, context.Canceled) || gone != errors.Is(err, dek.ErrUnavailable) || !gone && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := h.unwrapped(); n != connector.MaxCalls+11 {
		t.Errorf("%d unwraps, want none for those who left before they went out", n)
	}
}

// The trips of a fake: what goes together, in which order, and what a call
// that hangs does to others. Time is the test's.
func TestTrips(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var trips [][]uint32
		var live atomic.Int32
		answer := make(chan struct{})
		u := connector.NewUnwraps(func(ctx context.Context, ws []dek.Wrapped) error {
			var versions []uint32
			for _, w := range ws {
				versions = append(versions, uint32(w.ID().Version))
			}
			mu.Lock()
			trips = append(trips, versions)
			mu.Unlock()
			live.Add(1)
			defer live.Add(-1)
			select {
			case <-answer:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		ctx, leave := context.WithCancel(t.Context())
		var all sync.WaitGroup
		next := uint32(0)
		ask := func(ctx context.Context, n int) {
			for range n {
				next++
				w := wrapped(t, "orders", next)
				all.Go(func() {
					k, err := u.Do(ctx, w)
					if (err == nil) == (k == nil) {
						t.Errorf("key %v, error %v", k != nil, err)
					}
					k.Destroy()
				})
				synctest.Wait()
			}
		}
		got := func(want string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if s := fmt.Sprint(trips); s != want {
				t.Errorf("trips %s, want %s", s, want)
			}
		}
		ask(ctx, 6)
		got("[[1] [2]]") // at once, then nothing more
		answer <- struct{}{}
		got("[[1] [2] [3 4 5]]") // an even share, in order
		time.Sleep(connector.HoldUp)
		got("[[1] [2] [3 4 5] [6]]") // who takes too long holds up nobody
		ask(t.Context(), 1)
		got("[[1] [2] [3 4 5] [6] [7]]")
		leave() // of the calls that nobody waits for none goes on
		synctest.Wait()
		if n := live.Load(); n != 1 {
			t.Errorf("%d calls under way, want 1", n)
		}
		close(answer)
		all.Wait()
		if n := u.Waiting(); n != 0 {
			t.Errorf("%d left in the queue", n)
		}
	})
}
