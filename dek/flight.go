package dek

import (
	"context"
	"fmt"
)

// A flight is one running load and those who wait for it. Its fields belong to
// Cache.mu until done is closed; after that they do not change, except waiters.
type flight struct {
	id      KeyID
	cancel  context.CancelFunc
	done    chan struct{}
	waiters int
	stale   bool   // the result is not wanted: purged, or nobody waits
	entry   *entry // the result, with one reference per waiter
	err     error
}

// maxStale bounds how often one Get starts over because Purge took the ground
// from under its load.
const maxStale = 8

// errClosed answers Gets after Close.
var errClosed = fmt.Errorf("%w: key cache is closed", ErrUnavailable)

// wait joins the load of id, or starts it, and returns its entry with a
// reference for the caller.
func (c *Cache) wait(ctx context.Context, id KeyID, load func(context.Context) (*Key, error)) (*entry, error) {
	for range maxStale {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
		}
		f, e, err := c.join(ctx, id, load)
		if e != nil || err != nil {
			return e, err
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			c.leave(f)
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
		}
		if !f.stale {
			return f.entry, f.err
		}
	}
	return nil, fmt.Errorf("%w: purged %d times while loading", ErrUnavailable, maxStale)
}

// join returns the running flight of id, having started one if there was none,
// or the entry if a load has just ended.
func (c *Cache) join(ctx context.Context, id KeyID, load func(context.Context) (*Key, error)) (*flight, *entry, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, nil, errClosed
	}
	if e := c.hit(id); e != nil {
		return nil, e, nil
	}
	f := c.flights[id]
	if f != nil {
		c.stats.Shared++
	} else {
		loadCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight{id: id, cancel: cancel, done: make(chan struct{})}
		c.flights[id] = f
		c.stats.Loads++
		c.loads.Go(func() { c.run(loadCtx, f, load) })
	}
	f.waiters++
	return f, nil, nil
}

// leave takes one waiter off f. The last one to leave a running load ends it.
func (c *Cache) leave(f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.entry != nil { // it ended while ctx did
		f.entry.release()
		return
	}
	f.waiters--
	if f.waiters == 0 {
		c.discard(f)
	}
}

// discard makes sure that the result of f is not used; c.mu is held.
func (c *Cache) discard(f *flight) {
	f.stale = true
	f.cancel()
	if c.flights[f.id] == f {
		delete(c.flights, f.id)
	}
}

// errNoResult is what waiters get if load ends its goroutine.
var errNoResult = fmt.Errorf("%w: load ended without a result", ErrUnavailable)

// run calls load and hands its result to those who wait, also if load panics
// or exits its goroutine, so that nobody waits for ever.
func (c *Cache) run(ctx context.Context, f *flight, load func(context.Context) (*Key, error)) {
	var k *Key
	err := errNoResult
	defer func() { c.land(f, k, err) }()
	k, err = load(ctx)
	if k == nil && err == nil {
		err = errNoResult
		panic("dek: internal error: load of " + f.id.String() + " returned neither key nor error")
	}
}

// land ends f.
func (c *Cache) land(f *flight, k *Key, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(f.done)
	defer f.cancel()
	switch {
	case f.stale:
		c.stats.Stale++
		k.Destroy()
		return
	case err != nil:
		c.stats.LoadErrors++
		k.Destroy()
		f.err = err
	default:
		f.entry = c.insert(f.id, k, f.waiters)
	}
	delete(c.flights, f.id)
}
