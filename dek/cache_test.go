package dek_test

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyward/keyward/dek"
)

func newCache(t testing.TB, cfg dek.CacheConfig) *dek.Cache {
	t.Helper()
	c, err := dek.NewCache(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func id(n int) dek.KeyID {
	return dek.KeyID{KeyringID: dek.KeyringID{Vault: "v", Keyring: "k"}, Version: dek.Version(n)}
}

func load(context.Context) (*dek.Key, error) { return dek.NewKey() }

func noLoad(context.Context) (*dek.Key, error) { return nil, errors.New("must not load") }

func get(t testing.TB, c *dek.Cache, n int) dek.Lease {
	t.Helper()
	l, err := c.Get(t.Context(), id(n), load)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func alive(k *dek.Key) bool { return k.Use(func([]byte) error { return nil }) == nil }

func all(dek.KeyID) bool { return true }

func TestCacheConfig(t *testing.T) {
	for _, cfg := range []dek.CacheConfig{{}, {MaxKeys: -1}, {MaxKeys: 1, MaxAge: -1}} {
		if _, err := dek.NewCache(cfg); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", cfg, err)
		}
	}
}

func TestCacheHit(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 2, MaxAge: time.Hour})
	if _, ok := c.Peek(id(1)); ok {
		t.Error("Peek found a key in an empty cache")
	}
	first := get(t, c, 1)
	second, err := c.Get(t.Context(), id(1), noLoad)
	if err != nil || second.Key() != first.Key() {
		t.Errorf("second Get = %v, want the same key", err)
	}
	third, ok := c.Peek(id(1))
	if !ok || third.Key() != first.Key() {
		t.Error("Peek did not find the key")
	}
	for _, l := range []dek.Lease{first, second, third, {}} {
		l.Release()
	}
	if !alive(first.Key()) || (dek.Lease{}).Key() != nil {
		t.Error("a cached key was wiped with its leases")
	}
	want := dek.CacheStats{Keys: 1, Hits: 2, Misses: 1, Loads: 1}
	if got := c.Stats(); got != want {
		t.Errorf("stats = %+v, want %+v", got, want)
	}
}

// TestCacheEvict: the least recently used key leaves, in use or not, and is
// wiped exactly when its last lease ends.
func TestCacheEvict(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 2})
	one, two := get(t, c, 1), get(t, c, 2)
	one2 := get(t, c, 1) // one is the more recent now
	two.Release()
	three := get(t, c, 3)
	defer three.Release()
	if alive(two.Key()) {
		t.Error("evicted key without lease still there")
	}
	four := get(t, c, 4)
	defer four.Release()
	if c.Len() != 2 {
		t.Errorf("Len = %d, want 2", c.Len())
	}
	one.Release()
	if !alive(one2.Key()) {
		t.Error("evicted key wiped under its second lease")
	}
	one2.Release()
	if alive(one2.Key()) {
		t.Error("evicted key survived its last lease")
	}
	if got := c.Stats().Evicted; got != 2 {
		t.Errorf("Evicted = %d, want 2", got)
	}
}

func TestCacheStampede(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, dek.CacheConfig{MaxKeys: 10})
		open, loads := make(chan struct{}), 0
		slow := func(ctx context.Context) (*dek.Key, error) {
			loads++
			<-open
			return dek.NewKey()
		}
		leases := make(chan dek.Lease, 64)
		for range cap(leases) {
			go func() {
				l, err := c.Get(t.Context(), id(1), slow)
				if err != nil {
					t.Error(err)
				}
				leases <- l
			}()
		}
		synctest.Wait()
		close(open)
		synctest.Wait()
		if loads != 1 {
			t.Errorf("%d loads, want 1", loads)
		}
		if n := c.Purge(all); n != 1 {
			t.Errorf("Purge = %d, want 1", n)
		}
		for i := range cap(leases) {
			l := <-leases
			if !alive(l.Key()) {
				t.Fatalf("wiped with %d leases left", cap(leases)-i)
			}
			l.Release()
			if i == cap(leases)-1 && alive(l.Key()) {
				t.Error("purged key survived its last lease")
			}
		}
		want := dek.CacheStats{Misses: 64, Shared: 63, Loads: 1, Purged: 1}
		if got := c.Stats(); got != want {
			t.Errorf("stats = %+v, want %+v", got, want)
		}
	})
}

func TestCacheLoadError(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 1})
	for range 2 { // failures are not remembered
		_, err := c.Get(t.Context(), id(1), func(context.Context) (*dek.Key, error) { return nil, dek.ErrDenied })
		if !errors.Is(err, dek.ErrDenied) {
			t.Errorf("Get = %v, want ErrDenied", err)
		}
	}
	k := newKey(t)
	_, err := c.Get(t.Context(), id(1), func(context.Context) (*dek.Key, error) { return k, dek.ErrDenied })
	if !errors.Is(err, dek.ErrDenied) || alive(k) {
		t.Errorf("Get = %v, want ErrDenied and the key beside it wiped", err)
	}
	_, err = c.Get(t.Context(), id(1), func(context.Context) (*dek.Key, error) { runtime.Goexit(); return nil, nil })
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("load that exits its goroutine: %v, want ErrUnavailable", err)
	}
	if s := c.Stats(); s.LoadErrors != 4 || c.Len() != 0 {
		t.Errorf("stats = %+v, want 4 errors and no key", s)
	}
	get(t, c, 1).Release()
}

type ctxKey struct{}

// TestCacheCancel: the caller that started a load goes away; the others get the
// key. When all have gone the load is cancelled and its result wiped.
func TestCacheCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, dek.CacheConfig{MaxKeys: 1})
		open := make(chan struct{})
		slow := func(ctx context.Context) (*dek.Key, error) {
			if ctx.Value(ctxKey{}) != "first" {
				t.Error("load lost the caller's context values")
			}
			select {
			case <-open:
				return dek.NewKey()
			case <-ctx.Done():
				return dek.NewKey() // a load that does not look
			}
		}
		ctx, cancel := context.WithTimeout(context.WithValue(t.Context(), ctxKey{}, "first"), time.Second)
		defer cancel()
		first := make(chan error)
		go func() { _, err := c.Get(ctx, id(1), slow); first <- err }()
		synctest.Wait()
		second := make(chan dek.Lease)
		go func() {
			l, err := c.Get(t.Context(), id(1), noLoad)
			if err != nil {
				t.Error(err)
			}
			second <- l
		}()
		if err := <-first; !errors.Is(err, dek.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("first caller: %v, want ErrUnavailable and DeadlineExceeded", err)
		}
		close(open)
		l := <-second
		if !alive(l.Key()) {
			t.Error("second caller got a wiped key")
		}
		l.Release()
		c.Purge(all)

		open = make(chan struct{}) // never opened
		before := dek.Memory().Keys
		ctx, cancel = context.WithTimeout(context.WithValue(t.Context(), ctxKey{}, "first"), time.Second)
		defer cancel()
		if _, err := c.Get(ctx, id(1), slow); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("only caller: %v, want DeadlineExceeded", err)
		}
		synctest.Wait()
		if s := c.Stats(); s.Keys != 0 || s.Stale != 1 || dek.Memory().Keys != before {
			t.Errorf("abandoned load: stats %+v, %d slots more", s, dek.Memory().Keys-before)
		}
	})
}

// TestCachePurgeDuringLoad is the denial race: what was loaded before a purge
// neither enters the cache nor reaches those who wait; they ask again and hear
// the new answer.
func TestCachePurgeDuringLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, dek.CacheConfig{MaxKeys: 4})
		open, denied := make(chan struct{}), false
		var old *dek.Key
		slow := func(ctx context.Context) (*dek.Key, error) {
			if denied {
				return nil, dek.ErrDenied
			}
			k, err := dek.NewKey()
			old = k
			<-open // the answer is on its way, not to be stopped by ctx
			return k, err
		}
		answers := make(chan error, 8)
		for range cap(answers) {
			go func() { _, err := c.Get(t.Context(), id(1), slow); answers <- err }()
		}
		synctest.Wait()
		denied = true
		if n := c.Purge(func(k dek.KeyID) bool { return k == id(1) }); n != 0 {
			t.Errorf("Purge = %d, want 0", n)
		}
		if _, err := c.Get(t.Context(), id(1), slow); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("Get after Purge joined the old load: %v", err)
		}
		close(open)
		for range cap(answers) {
			if err := <-answers; !errors.Is(err, dek.ErrDenied) {
				t.Errorf("waiter got %v, want ErrDenied", err)
			}
		}
		if alive(old) || c.Len() != 0 {
			t.Error("the stale key survived")
		}
	})
}

// TestCachePurgeStorm: a Get whose every load is purged gives up.
func TestCachePurgeStorm(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 4})
	_, err := c.Get(t.Context(), id(1), func(context.Context) (*dek.Key, error) {
		c.Purge(all)
		return dek.NewKey()
	})
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("Get = %v, want ErrUnavailable", err)
	}
}

func TestCacheAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, dek.CacheConfig{MaxKeys: 4, MaxAge: time.Minute})
		old := get(t, c, 1)
		old.Release()
		held := get(t, c, 2)
		time.Sleep(30 * time.Second) // the bubble's clock
		young := get(t, c, 3)
		young.Release()
		get(t, c, 1).Release() // use does not make it younger
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if alive(old.Key()) {
			t.Error("a key nobody asked for outlived MaxAge")
		}
		if !alive(held.Key()) {
			t.Error("an expired key was wiped in use")
		}
		held.Release()
		if alive(held.Key()) || !alive(young.Key()) || c.Len() != 1 {
			t.Errorf("held %v, young %v, Len %d", alive(held.Key()), alive(young.Key()), c.Len())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if s := c.Stats(); s.Expired != 3 || s.Keys != 0 {
			t.Errorf("stats = %+v, want 3 expired and none left", s)
		}
		get(t, c, 1).Release() // the timer starts again
		time.Sleep(time.Minute)
		synctest.Wait()
		if c.Len() != 0 {
			t.Error("the timer did not start again")
		}
	})
}

// TestCacheAgeClock: with a clock of the caller's, hits judge.
func TestCacheAgeClock(t *testing.T) {
	now := time.Now()
	c := newCache(t, dek.CacheConfig{MaxKeys: 4, MaxAge: time.Hour, Now: func() time.Time { return now }})
	l := get(t, c, 1)
	l.Release()
	now = now.Add(time.Hour - 1)
	get(t, c, 1).Release()
	now = now.Add(1)
	if _, ok := c.Peek(id(1)); ok || alive(l.Key()) {
		t.Error("a key was handed out at MaxAge")
	}
	get(t, c, 1).Release()
	if s := c.Stats(); s.Expired != 1 || s.Loads != 2 {
		t.Errorf("stats = %+v, want 1 expired, 2 loads", s)
	}
}

func TestCacheClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, dek.CacheConfig{MaxKeys: 4, MaxAge: time.Hour})
		held := get(t, c, 1)
		loadEnded, answer := false, make(chan error, 1)
		go func() {
			_, err := c.Get(t.Context(), id(2), func(ctx context.Context) (*dek.Key, error) {
				<-ctx.Done()
				time.Sleep(time.Second)
				loadEnded = true
				return nil, ctx.Err()
			})
			answer <- err
		}()
		synctest.Wait()
		c.Close()
		if !loadEnded {
			t.Error("Close did not wait for the load")
		}
		if err := <-answer; !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("waiter got %v, want ErrUnavailable", err)
		}
		if _, err := c.Get(t.Context(), id(1), noLoad); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("Get after Close = %v, want ErrUnavailable", err)
		}
		if !alive(held.Key()) {
			t.Error("Close wiped a leased key")
		}
		held.Release()
		if alive(held.Key()) {
			t.Error("the key outlived cache and lease")
		}
		c.Close()
	})
}

// TestCacheDoubleRelease: the bug of one caller never wipes under another's
// running use, and loses no key.
func TestCacheDoubleRelease(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 1})
	before := dek.Memory().Keys
	bad, good := get(t, c, 1), get(t, c, 1)
	bad.Release()
	bad.Release()
	err := good.Key().Use(func([]byte) error {
		c.Purge(all)
		if dek.Memory().Keys != before+1 {
			t.Error("wiped under a running use")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	good.Release()
	if got := dek.Memory().Keys; got != before {
		t.Errorf("slots in use = %d, want %d", got, before)
	}
}

func TestCacheHitAllocs(t *testing.T) {
	c := newCache(t, dek.CacheConfig{MaxKeys: 4, MaxAge: time.Hour})
	get(t, c, 1).Release()
	ctx := t.Context()
	n := testing.AllocsPerRun(1000, func() {
		l, err := c.Get(ctx, id(1), noLoad)
		if err != nil {
			t.Error(err)
		}
		l.Release()
	})
	if n != 0 {
		t.Errorf("a hit allocates %v times, want 0", n)
	}
}
