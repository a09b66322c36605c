package kms

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// flightShards keeps unwraps of different DEKs from waiting for one lock.
const flightShards = 64

// burst is how long after the token's answer callers may still share it, while
// somebody has not left: those who asked at the same instant arrive one by one,
// the later ones after the first has its answer. It bounds how long the need to
// ask the token is put off for a DEK that is asked for without pause.
const burst = 100 * time.Millisecond

// A flight is one token operation that several callers wait for.
type flight struct {
	id        flightID
	done      chan struct{} // closed by finish
	abandoned bool          // the leader gave up; valid after done
	key       *dek.Key      // valid after done; owned by the flight
	err       error
	ended     time.Time // valid after done
	refs      int       // callers that have not left
}

// A flightID has the view, too: whoever was let through after a change shares
// nothing that was begun before it.
type flightID struct {
	principal string
	wrapped   [sha256.Size]byte
	view      *view
}

// flights are the operations under way, by caller, wrapped bytes and view.
type flights struct {
	shards [flightShards]struct {
		sync.Mutex
		m map[flightID]*flight
	}
}

func (fs *flights) init() {
	for i := range fs.shards {
		fs.shards[i].m = make(map[flightID]*flight)
	}
}

// join enters the flight of w, or starts it: then the caller leads. Everyone
// who joined leaves.
func (fs *flights) join(principal string, w dek.Wrapped, v *view) (f *flight, leader bool) {
	id := flightID{principal, sha256.Sum256(w.Bytes()), v}
	s := &fs.shards[id.wrapped[0]%flightShards]
	s.Lock()
	defer s.Unlock()
	f, ok := s.m[id]
	if !ok || f.over() && (f.err != nil || f.key == nil || time.Since(f.ended) > burst) {
		f = &flight{id: id, done: make(chan struct{})}
		s.m[id] = f
		leader = true
	}
	f.refs++
	return f, leader
}

func (f *flight) over() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// finish gives the result to all; the flight owns k.
func (fs *flights) finish(f *flight, k *dek.Key, err error, abandoned bool) {
	f.key, f.err, f.abandoned, f.ended = k, err, abandoned, time.Now()
	close(f.done)
}

// take returns a key of the caller's own; the flight is finished and the
// caller has not left.
func (fs *flights) take(f *flight) (*dek.Key, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.key.Clone()
}

// leave ends the caller's part; the last one ends the flight and wipes its key.
func (fs *flights) leave(f *flight) {
	s := &fs.shards[f.id.wrapped[0]%flightShards]
	s.Lock()
	defer s.Unlock()
	if f.refs--; f.refs > 0 {
		return
	}
	f.key.Destroy()
	if s.m[f.id] == f {
		delete(s.m, f.id)
	}
}
