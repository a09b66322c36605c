package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/keyward/keyward/dek"
)

const (
	cacheKeys = 1000 // all of them fit: every access is a hit
	cacheOps  = 1 << 20
)

// cacheHit measures a hit of dek.Cache against golang-lru alone. The work of
// ours beyond it: expiry, the lease that keeps a key alive while it is used.
func cacheHit(ctx context.Context, b *bench) ([]Result, error) {
	ids, order := cacheLoad()
	c, err := dek.NewCache(dek.CacheConfig{MaxKeys: 2 * cacheKeys, MaxAge: time.Hour})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	load := func(context.Context) (*dek.Key, error) { return dek.NewKey() }
	peer, err := lru.New[dek.KeyID, *int](2 * cacheKeys)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		l, err := c.Get(ctx, id, load)
		if err != nil {
			return nil, err
		}
		l.Release()
		peer.Add(id, new(int))
	}
	hit := func(id dek.KeyID) error {
		l, err := c.Get(ctx, id, load)
		if err == nil {
			l.Release()
		}
		return err
	}
	if n := testing.AllocsPerRun(1000, func() { err = hit(ids[0]) }); n != 0 || err != nil {
		return nil, fmt.Errorf("a hit allocates %v times (%v), want 0", n, err)
	}
	got, err := b.interleave(ctx,
		func(context.Context) (sample, error) { return perHit(order, func(i int) error { return hit(ids[i]) }) },
		func(context.Context) (sample, error) {
			return perHit(order, func(i int) error {
				if _, ok := peer.Get(ids[i]); !ok {
					return errors.New("a miss in the peer")
				}
				return nil
			})
		})
	if err != nil {
		return nil, err
	}
	q := question{name: "cache/hit", against: "golang-lru alone", unit: "ns/op", goal: "<= 1.6", lessIsBetter: true}
	return []Result{q.compare(got[0][0], got[1][0])}, nil
}

// perHit is the time of one hit in nanoseconds.
func perHit(order []int, hit func(int) error) (sample, error) {
	start := time.Now()
	for _, i := range order {
		if err := hit(i); err != nil {
			return nil, err
		}
	}
	return sample{float64(time.Since(start).Nanoseconds()) / float64(len(order))}, nil
}

// cacheLoad makes the ids and a Zipf-like order of access, the same for both.
func cacheLoad() ([]dek.KeyID, []int) {
	ids := make([]dek.KeyID, cacheKeys)
	for i := range ids {
		ids[i] = dek.KeyID{KeyringID: dek.KeyringID{Vault: "bench", Keyring: fmt.Sprintf("ring-%d", i)}, Version: 1}
	}
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.1, 1, cacheKeys-1)
	order := make([]int, cacheOps)
	for i := range order {
		order[i] = int(zipf.Uint64())
	}
	return ids, order
}
