package connector

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// flights are the unwraps under way. Those of the same wrapped DEK at the same
// time are one, and each caller gets a key of its own. (x/sync/singleflight
// shares one result, which nobody could safely destroy.) Those of different
// ones travel together: coalesce.go.
type flights struct {
	// carry ends each of its flights by finish.
	carry  func(ctx context.Context, fls []*flight, finish finish)
	holdUp time.Duration // how long a call may keep others waiting

	mu     sync.Mutex
	m      map[string]*flight // by wrapped bytes; those that still take passengers
	queue  []*flight          // wait for a call
	calls  int                // under way
	aboard int                // flights in them
}

// finish publishes what became of a flight; it owns the key.
type finish func(fl *flight, k *dek.Key, err error)

type flight struct {
	id   string // the wrapped bytes
	w    dek.Wrapped
	done chan struct{} // closed when key and err are set
	key  *dek.Key
	err  error

	// Guarded by flights.mu:
	waiters int
	trip    *trip // nil in the queue
}

// do returns the key of w, with who else asks for it now. The call ends when
// the last of them has gone. The caller destroys the key.
func (s *flights) do(ctx context.Context, w dek.Wrapped) (*dek.Key, error) {
	fl := s.board(w)
	select {
	case <-fl.done:
	case <-ctx.Done():
		s.leave(fl)
		return nil, ctx.Err()
	}
	return s.take(fl)
}

// board adds a waiter to the flight of w, a new one if there is none.
func (s *flights) board(w dek.Wrapped) *flight {
	id := string(w.Bytes())
	s.mu.Lock()
	defer s.mu.Unlock()
	fl := s.m[id]
	if fl == nil {
		if s.m == nil {
			s.m = map[string]*flight{}
		}
		fl = &flight{id: id, w: w, done: make(chan struct{})}
		s.m[id] = fl
		s.queue = append(s.queue, fl)
		s.depart()
	}
	fl.waiters++
	return fl
}

// finish publishes the result; the flight takes no more passengers.
func (s *flights) finish(fl *flight, k *dek.Key, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fl.key, fl.err = k, err
	s.forget(fl)
	if fl.waiters == 0 {
		fl.key.Destroy()
	} else {
		fl.trip.without(1)
	}
	close(fl.done)
}

// take gives a waiter of a flight that is done its key; the last one gets the
// flight's own.
func (s *flights) take(fl *flight) (*dek.Key, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fl.waiters--
	if fl.err != nil || fl.waiters == 0 {
		return fl.key, fl.err
	}
	return fl.key.Clone()
}

// leave drops a waiter who has no answer; the last one ends the call or wipes
// the key.
func (s *flights) leave(fl *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fl.waiters--
	if fl.waiters > 0 {
		return
	}
	select {
	case <-fl.done:
		fl.key.Destroy()
		return
	default:
	}
	s.forget(fl) // abandoned: who comes now starts anew
	if fl.trip != nil {
		fl.trip.without(1)
	} else if i := slices.Index(s.queue, fl); i >= 0 {
		s.queue = slices.Delete(s.queue, i, i+1)
	}
}

func (s *flights) forget(fl *flight) {
	if s.m[fl.id] == fl {
		delete(s.m, fl.id)
	}
}
