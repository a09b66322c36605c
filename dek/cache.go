package dek

import (
	"container/list"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// CacheConfig configures a Cache.
type CacheConfig struct {
	// MaxKeys bounds the keys held, at least 1. The least recently used one
	// makes room; a key in use leaves the cache at once and memory when its
	// last lease ends.
	MaxKeys int
	// MaxAge is how long after its load a key may still be handed out,
	// measured by the monotonic clock, which stands still while the machine
	// sleeps. A timer wipes what is that old, also if nobody asks for it: a
	// clock read per hit would cost half of the hit again. Zero means no limit;
	// negative is refused.
	MaxAge time.Duration
	// Now replaces the clock in tests: hits then look at it as well, since no
	// timer follows it. Nil means time.Now.
	Now func() time.Time
}

// CacheStats counts what a Cache has done since it was made.
type CacheStats struct {
	Keys       int    // held now
	Hits       uint64 // leases given without waiting
	Misses     uint64 // Gets that had to wait for a load
	Shared     uint64 // of these, how many joined a load that was running
	Loads      uint64 // loads started
	LoadErrors uint64 // loads that failed
	Stale      uint64 // loads whose result was wiped: purged or abandoned meanwhile
	Evicted    uint64 // keys that made room
	Expired    uint64 // keys that reached MaxAge
	Purged     uint64 // keys dropped by Purge
}

// A Cache holds unwrapped keys for reuse: bounded, least recently used out
// first, each at most MaxAge old. A key is wiped once it has left the cache
// *and* its last Lease is released, never while in use. Concurrent Gets of an
// absent key share one load. All methods may be called concurrently.
//
// golang-lru serves as the recency index only: by itself it forgets replaced
// values unwiped and evicts under its users' feet.
type Cache struct {
	maxKeys int
	maxAge  time.Duration
	age     func() time.Duration // time since the cache was made, monotonic
	strict  bool                 // hits look at the clock: it is not the one that runs timers

	loads sync.WaitGroup // running load goroutines

	mu      sync.Mutex
	lru     *simplelru.LRU[KeyID, *entry]
	byAge   *list.List // of *entry, oldest load first
	flights map[KeyID]*flight
	timer   *time.Timer // runs when the oldest key reaches maxAge; nil if unarmed
	stats   CacheStats
	closed  bool
}

// An entry is one loaded key.
type entry struct {
	id     KeyID
	key    *Key
	loaded time.Duration // by Cache.age
	place  *list.Element // in Cache.byAge
	given  int64         // leases given; belongs to Cache.mu

	// open is minus the leases released, and given more once the entry has
	// left the cache: only then can it come to zero. So a hit, which holds
	// Cache.mu anyway, needs no atomic operation of its own.
	open atomic.Int64
}

// release ends one lease; the last one after left wipes the key.
func (e *entry) release() {
	if left := e.open.Add(-1); left == 0 {
		e.key.Destroy()
	}
}

// left says that no more leases are given; Cache.mu is held.
func (e *entry) left() {
	if e.open.Add(e.given) <= 0 { // below: someone released twice
		e.key.Destroy()
	}
}

// A Lease is the right to use one cached key. Whoever got it releases it,
// once, as soon as the key is no longer used.
type Lease struct{ e *entry }

// Key returns the leased key, valid until Release. It belongs to the cache:
// the holder must not destroy it. It is nil for the zero Lease.
func (l Lease) Key() *Key {
	if l.e == nil {
		return nil
	}
	return l.e.key
}

// Release ends the lease; the zero Lease has nothing to release. A second
// Release of one lease is a bug of the caller: it may take the key from another
// lease, whose uses then get ErrDestroyed; it never wipes under a running use.
func (l Lease) Release() {
	if l.e != nil {
		l.e.release()
	}
}

// NewCache returns an empty cache; Close ends it. It wraps ErrInvalid for a
// configuration out of range.
func NewCache(cfg CacheConfig) (*Cache, error) {
	if cfg.MaxAge < 0 {
		return nil, fmt.Errorf("key cache: %w: MaxAge %v is negative", ErrInvalid, cfg.MaxAge)
	}
	lru, err := simplelru.NewLRU[KeyID, *entry](cfg.MaxKeys, nil)
	if err != nil {
		return nil, fmt.Errorf("key cache: %w: MaxKeys %d: %w", ErrInvalid, cfg.MaxKeys, err)
	}
	c := &Cache{
		maxKeys: cfg.MaxKeys, maxAge: cfg.MaxAge, lru: lru,
		byAge: list.New(), flights: make(map[KeyID]*flight),
	}
	if cfg.Now != nil {
		start := cfg.Now()
		c.age = func() time.Duration { return cfg.Now().Sub(start) }
		c.strict = cfg.MaxAge > 0
	} else {
		start := time.Now()
		c.age = func() time.Duration { return time.Since(start) } // reads the monotonic clock only
	}
	return c, nil
}

// Get leases the key named id, calling load if the cache does not hold it. A
// hit allocates nothing and does not look at ctx (a load that captures
// variables may cost its caller an allocation: Peek first where that counts).
//
// Concurrent Gets of one id share one load, which runs in a goroutine of its
// own: with the values of the first caller's ctx, but cancelled only when every
// caller has gone. load must heed its context, bring its own deadline and must
// not call Close; the key it returns belongs to the cache. If Purge drops id
// while a load runs, its result is wiped and those who waited load anew.
//
// Get returns load's error wrapped with the id, for everyone who waited, and
// remembers no failure. It wraps ErrUnavailable and the context's error if ctx
// ends first, and ErrUnavailable after Close.
func (c *Cache) Get(ctx context.Context, id KeyID, load func(context.Context) (*Key, error)) (Lease, error) {
	c.mu.Lock()
	if e := c.hit(id); e != nil {
		c.mu.Unlock()
		return Lease{e}, nil
	}
	c.stats.Misses++
	c.mu.Unlock()
	e, err := c.wait(ctx, id, load)
	if err != nil {
		return Lease{}, fmt.Errorf("key %s: %w", id, err)
	}
	return Lease{e}, nil
}

// Peek is Get without a load: it leases the key if the cache holds it.
func (c *Cache) Peek(id KeyID) (Lease, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.hit(id)
	return Lease{e}, e != nil
}

// hit returns the entry of id with one more reference, or nil; c.mu is held.
func (c *Cache) hit(id KeyID) *entry {
	e, ok := c.lru.Get(id)
	if !ok {
		return nil
	}
	if c.strict && c.age()-e.loaded >= c.maxAge {
		c.drop(e)
		c.stats.Expired++
		return nil
	}
	e.given++
	c.stats.Hits++
	return e
}

// insert takes a fresh key with the given number of leases; c.mu is held.
func (c *Cache) insert(id KeyID, k *Key, leases int) *entry {
	if old, ok := c.lru.Peek(id); ok {
		c.drop(old)
	}
	for c.lru.Len() >= c.maxKeys {
		_, oldest, _ := c.lru.GetOldest()
		c.drop(oldest)
		c.stats.Evicted++
	}
	e := &entry{id: id, key: k, loaded: c.age(), given: int64(leases)}
	e.place = c.byAge.PushBack(e)
	c.lru.Add(id, e)
	if c.maxAge > 0 && c.timer == nil {
		c.timer = time.AfterFunc(c.maxAge, c.expire)
	}
	return e
}

// drop takes e out of the cache; c.mu is held.
func (c *Cache) drop(e *entry) {
	c.lru.Remove(e.id)
	c.byAge.Remove(e.place)
	e.left()
}

// minTick keeps the timer calm if Config.Now and the real clock disagree.
const minTick = 10 * time.Millisecond

// expire drops what has reached maxAge and arms the timer for the next.
func (c *Cache) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.timer = nil
	if c.closed {
		return
	}
	for front := c.byAge.Front(); front != nil; front = c.byAge.Front() {
		e := front.Value.(*entry)
		if left := c.maxAge - (c.age() - e.loaded); left > 0 {
			c.timer = time.AfterFunc(max(left, minTick), c.expire)
			return
		}
		c.drop(e)
		c.stats.Expired++
	}
}

// Purge drops every key whose id matches and returns how many it dropped. A
// Get that begins after Purge returned is given no key that was loaded before:
// running loads are cancelled and their results wiped, those who waited for
// them load anew. Leases given before or meanwhile stay valid. match is called
// under the cache's lock and must not call the cache.
func (c *Cache) Purge(match func(KeyID) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.purge(match)
}

// purge is Purge with c.mu held.
func (c *Cache) purge(match func(KeyID) bool) int {
	n := 0
	for _, id := range c.lru.Keys() {
		if match(id) {
			e, _ := c.lru.Peek(id)
			c.drop(e)
			n++
		}
	}
	c.stats.Purged += uint64(n)
	for id, f := range c.flights {
		if match(id) {
			c.discard(f)
		}
	}
	return n
}

// Len returns the number of keys held.
func (c *Cache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lru.Len()
}

// Stats returns the counters, all of one moment.
func (c *Cache) Stats() CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Keys = c.lru.Len()
	return s
}

// Close drops every key, cancels running loads and waits for them; Gets that
// wait end with ErrUnavailable. Leases already given stay valid. Close may be
// called more than once.
func (c *Cache) Close() {
	c.mu.Lock()
	c.closed = true
	c.purge(func(KeyID) bool { return true })
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	c.mu.Unlock()
	c.loads.Wait()
}
