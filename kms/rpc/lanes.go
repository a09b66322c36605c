package rpc

import (
	"context"
	"fmt"
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

// enter waits for a place until ctx ends. The caller leaves.
func (l lanes) enter(ctx context.Context, name laneName) error {
	select {
	case l[name] <- struct{}{}:
		return nil
	default:
	}
	if _, ok := ctx.Deadline(); !ok {
		return fmt.Errorf("lane %s: %w", name, errBusy) // a stream would wait for ever
	}
	select {
	case l[name] <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("lane %s: %w", name, errBusy)
	}
}

func (l lanes) leave(name laneName) { <-l[name] }
