package rpc

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// laneSizes bounds the calls that are inside at once, per lane. Memory is what
// is bounded here: a call waiting in a lane costs some KiB. How many unwraps
// the token does at once is the token's own matter.
func laneSizes() map[laneName]int {
	return map[laneName]int{
		laneHealth: 64,
		laneEnrol:  16,
		laneStart:  256,
		laneUse:    1024,
		laneOpen:   20000,
		laneAdmin:  64,
		laneBulk:   16,
	}
}

// lanes are semaphores, fixed at start.
type lanes map[laneName]chan struct{}

func newLanes() lanes {
	l := make(lanes)
	for name, n := range laneSizes() {
		l[name] = make(chan struct{}, n)
	}
	return l
}

// laneWait bounds the wait for a place, so that a client still has time to ask
// another node.
const laneWait = 5 * time.Second

// enterLane waits for a place in the lane of m until ctx ends, first for one of the
// caller's share; a stream does not wait. The caller calls leave.
func (s *Server) enterLane(ctx context.Context, m *method, caller string) (leave func(), err error) {
	if !m.endless {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, laneWait)
		defer stop()
	}
	mine := s.shares.of(shareKey{m.lane, caller}, cap(s.lanes[m.lane])/shareOf)
	if !place(ctx, mine.places, m.endless) {
		s.shares.release(mine)
		return nil, fmt.Errorf("the caller's share of lane %s: %w", m.lane, errBusy)
	}
	if !place(ctx, s.lanes[m.lane], m.endless) {
		<-mine.places
		s.shares.release(mine)
		return nil, fmt.Errorf("lane %s: %w", m.lane, errBusy)
	}
	return func() {
		<-s.lanes[m.lane]
		<-mine.places
		s.shares.release(mine)
	}, nil
}

// place takes a place, if need be once one is free and unless ctx ends before.
func place(ctx context.Context, places chan<- struct{}, atOnce bool) bool {
	select {
	case places <- struct{}{}:
		return true
	default:
	}
	if atOnce {
		return false
	}
	select {
	case places <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// shareOf is the part of a lane that one caller may hold. A request is read
// inside its lane, so that whoever sends slowly, or much, would else keep
// everybody out.
const shareOf = 4

// shares count what each caller holds.
type shares struct {
	mu   sync.Mutex
	held map[shareKey]*share
}

type shareKey struct {
	lane   laneName
	caller string
}

type share struct {
	key    shareKey
	places chan struct{}
	users  int // calls that hold or wait for a place; guarded by shares.mu
}

// of returns the caller's share of a lane, so many places; each of is followed
// by a release.
func (s *shares) of(key shareKey, places int) *share {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[key]
	if h == nil {
		h = &share{key: key, places: make(chan struct{}, places)}
		s.held[key] = h
	}
	h.users++
	return h
}

func (s *shares) release(h *share) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.users--; h.users == 0 {
		delete(s.held, h.key)
	}
}

// sharer is whose share a call is of: an identity, or the host of a stranger.
func (c *call) sharer() string {
	if c.caller.Principal != "" {
		return c.caller.Principal
	}
	if host, _, err := net.SplitHostPort(c.caller.Remote); err == nil {
		return host
	}
	return c.caller.Remote
}
