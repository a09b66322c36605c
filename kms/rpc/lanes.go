package rpc

import (
	"context"
	"fmt"
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

// enter waits for a place until ctx ends; a stream does not wait. The caller
// leaves.
func (l lanes) enter(ctx context.Context, m *method) error {
	select {
	case l[m.lane] <- struct{}{}:
		return nil
	default:
	}
	if m.endless {
		return fmt.Errorf("lane %s: %w", m.lane, errBusy)
	}
	timeout := time.NewTimer(laneWait)
	defer timeout.Stop()
	select {
	case l[m.lane] <- struct{}{}:
		return nil
	case <-timeout.C:
	case <-ctx.Done():
	}
	return fmt.Errorf("lane %s: %w", m.lane, errBusy)
}

func (l lanes) leave(name laneName) { <-l[name] }
