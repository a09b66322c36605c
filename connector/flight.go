package connector

import (
	"context"
	"sync"

	"github.com/keyward/keyward/dek"
)

// flights collapses unwraps of the same wrapped DEK that run at the same time
// into one call. Each caller gets a key of its own. (x/sync/singleflight shares
// one result, which nobody could safely destroy.)
type flights struct {
	mu sync.Mutex
	m  map[string]*flight
}

type flight struct {
	cancel  context.CancelFunc
	done    chan struct{} // closed when key and err are set
	key     *dek.Key
	err     error
	waiters int // guarded by flights.mu
}

// do returns the key that f gives for id. f runs once for all who ask while it
// runs; its context ends when the last of them has gone. The caller destroys
// the key.
func (s *flights) do(ctx context.Context, id string, f func(context.Context) (*dek.Key, error)) (*dek.Key, error) {
	s.mu.Lock()
	fl := s.m[id]
	if fl == nil {
		if s.m == nil {
			s.m = map[string]*flight{}
		}
		run, cancel := context.WithCancel(context.WithoutCancel(ctx))
		fl = &flight{cancel: cancel, done: make(chan struct{})}
		s.m[id] = fl
		go func() {
			fl.key, fl.err = f(run)
			s.finish(id, fl)
		}()
	}
	fl.waiters++
	s.mu.Unlock()
	select {
	case <-fl.done:
	case <-ctx.Done():
		s.leave(id, fl)
		return nil, ctx.Err()
	}
	defer s.leave(id, fl)
	if fl.err != nil {
		return nil, fl.err
	}
	return fl.key.Clone()
}

// finish publishes the result; the flight takes no more passengers.
func (s *flights) finish(id string, fl *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(id, fl)
	if fl.waiters == 0 {
		fl.key.Destroy()
	}
	close(fl.done)
}

// leave drops a waiter; the last one ends the call or wipes the key.
func (s *flights) leave(id string, fl *flight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fl.waiters--
	if fl.waiters > 0 {
		return
	}
	fl.cancel()
	select {
	case <-fl.done:
		fl.key.Destroy()
	default:
		s.forget(id, fl) // abandoned: who comes now starts anew
	}
}

func (s *flights) forget(id string, fl *flight) {
	if s.m[id] == fl {
		delete(s.m, id)
	}
}
