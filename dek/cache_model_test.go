package dek_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
)

// A keyService is the model of the key service behind a cache. A key carries
// the id and the epoch it was made in; revoke begins a new epoch.
type keyService struct {
	epoch [modelIDs]atomic.Uint64 // what the service would answer now
	floor [modelIDs]atomic.Uint64 // what a purged cache may answer at least

	mu   sync.Mutex
	made []*dek.Key
}

const modelIDs = 12

var errModel = errors.New("service has a bad day")

func (s *keyService) load(n int, slow bool) func(context.Context) (*dek.Key, error) {
	return func(ctx context.Context) (*dek.Key, error) {
		b := make([]byte, dek.KeySize)
		binary.BigEndian.PutUint64(b, uint64(n))
		binary.BigEndian.PutUint64(b[8:], s.epoch[n].Load())
		if slow { // between the service's answer and its arrival
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Microsecond):
			}
		}
		if b[15]%16 == 15 {
			return nil, errModel
		}
		k, err := dek.KeyFrom(b)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.made = append(s.made, k)
		s.mu.Unlock()
		return k, nil
	}
}

// revoke makes every older key of n unwelcome.
func (s *keyService) revoke(c *dek.Cache, n int) {
	e := s.epoch[n].Add(1)
	c.Purge(func(k dek.KeyID) bool { return k == id(n) })
	for old := s.floor[n].Load(); old < e && !s.floor[n].CompareAndSwap(old, e); old = s.floor[n].Load() {
	}
}

// use gets a key of n and checks it against the model while holding it.
func (s *keyService) use(t *testing.T, c *dek.Cache, r *rand.Rand, n int) {
	ctx := t.Context()
	if r.IntN(8) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.IntN(60))*time.Microsecond)
		defer cancel()
	}
	floor := s.floor[n].Load()
	l, err := c.Get(ctx, id(n), s.load(n, r.IntN(2) == 0))
	if err != nil {
		if !errors.Is(err, errModel) && !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("Get: %v", err)
		}
		return
	}
	defer l.Release()
	for range 1 + r.IntN(4) {
		err := l.Key().Use(func(b []byte) error {
			if got := binary.BigEndian.Uint64(b); got != uint64(n) {
				t.Errorf("asked for key %d, got %d", n, got)
			}
			if got := binary.BigEndian.Uint64(b[8:]); got < floor {
				t.Errorf("key %d of epoch %d after revocation to %d", n, got, floor)
			}
			return nil
		})
		if err != nil {
			t.Errorf("use of a leased key: %v", err)
		}
	}
}

// TestCacheModel runs random callers against the model: no one ever holds a
// wiped, wrong or revoked key, the bound holds, and nothing is left over.
func TestCacheModel(t *testing.T) {
	before := dek.Memory().Keys
	c, err := dek.NewCache(dek.CacheConfig{MaxKeys: 6, MaxAge: 2 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	var s keyService
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			for range 4000 {
				n := r.IntN(modelIDs)
				switch x := r.IntN(100); {
				case x < 4:
					s.revoke(c, n)
				case x < 5:
					c.Purge(all)
				case x < 10:
					if l, ok := c.Peek(id(n)); ok {
						if !alive(l.Key()) {
							t.Error("Peek gave a wiped key")
						}
						l.Release()
					}
				case x < 12:
					if got := c.Stats().Keys; got > 6 {
						t.Errorf("%d keys held, want at most 6", got)
					}
				default:
					s.use(t, c, r, n)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%+v", c.Stats())
	c.Close()
	for _, k := range s.made {
		if alive(k) {
			t.Fatal("a key outlived its cache")
		}
	}
	if got := dek.Memory().Keys; got != before {
		t.Errorf("slots in use = %d, want %d", got, before)
	}
}
