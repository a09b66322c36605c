package kms

import (
	"context"
	"fmt"
	"sync"

	"github.com/keyward/keyward/dek"
)

// A keyedMutex serialises work on one thing without a lock for all of them.
type keyedMutex struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed when released
}

// lock waits until key is free or ctx ends (wrapping dek.ErrUnavailable).
func (k *keyedMutex) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		busy, ok := k.held[key]
		if !ok {
			free := make(chan struct{})
			if k.held == nil {
				k.held = make(map[string]chan struct{})
			}
			k.held[key] = free
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, key)
				k.mu.Unlock()
				close(free)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s is being made by another call: %w", dek.ErrUnavailable, key, ctx.Err())
		}
	}
}

// tryLock is lock for one who can come again later.
func (k *keyedMutex) tryLock(key string) (unlock func(), ok bool) {
	k.mu.Lock()
	_, busy := k.held[key]
	k.mu.Unlock()
	if busy {
		return nil, false
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	unlock, err := k.lock(ctx, key)
	return unlock, err == nil
}
