package dek_test

import (
	"context"
	"slices"
	"strconv"
	"testing"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/keyward/keyward/dek"
)

func benchID(i int) dek.KeyID {
	return dek.KeyID{
		KeyringID: dek.KeyringID{Vault: "payroll", Keyring: "tables-" + strconv.Itoa(i%100)},
		Version:   dek.Version(i/100 + 1),
	}
}

// BenchmarkCacheHit times a hit (Get and Release, with age limit) against a
// bare golang-lru Get of the same keys, in alternating rounds of one run, and
// reports the median of the rounds' ratios.
func BenchmarkCacheHit(b *testing.B) {
	const held, perRound = 1000, 5000
	cache, err := dek.NewCache(dek.CacheConfig{MaxKeys: held, MaxAge: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	defer cache.Close()
	bare, err := lru.New[dek.KeyID, *dek.Key](held)
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.Background()
	load := func(context.Context) (*dek.Key, error) { return dek.NewKey() }
	ids := make([]dek.KeyID, held)
	for i := range ids {
		ids[i] = benchID(i)
		l, err := cache.Get(ctx, ids[i], load)
		if err != nil {
			b.Fatal(err)
		}
		bare.Add(ids[i], l.Key())
		l.Release()
	}
	ours := func() {
		for i := range perRound {
			l, err := cache.Get(ctx, ids[i%held], load)
			if err != nil {
				b.Fatal(err)
			}
			l.Release()
		}
	}
	other := func() {
		for i := range perRound {
			if _, ok := bare.Get(ids[i%held]); !ok {
				b.Fatal("not held")
			}
		}
	}
	b.ReportAllocs()
	var ratios, a, o []float64
	for b.Loop() {
		t0 := time.Now()
		ours()
		t1 := time.Now()
		other()
		t2 := time.Now()
		ratios = append(ratios, float64(t1.Sub(t0))/float64(t2.Sub(t1)))
		a = append(a, float64(t1.Sub(t0))/perRound)
		o = append(o, float64(t2.Sub(t1))/perRound)
	}
	b.ReportMetric(median(a), "ns/hit")
	b.ReportMetric(median(o), "ns/bare-lru")
	b.ReportMetric(median(ratios), "ratio")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func BenchmarkCacheHitParallel(b *testing.B) {
	cache, err := dek.NewCache(dek.CacheConfig{MaxKeys: 100, MaxAge: time.Hour})
	if err != nil {
		b.Fatal(err)
	}
	defer cache.Close()
	load := func(context.Context) (*dek.Key, error) { return dek.NewKey() }
	id := benchID(1)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			l, err := cache.Get(b.Context(), id, load)
			if err != nil {
				b.Fatal(err)
			}
			l.Release()
		}
	})
}

func BenchmarkKeyUse(b *testing.B) {
	k := newKey(b)
	var sum byte
	f := func(v []byte) error { sum += v[0]; return nil }
	b.ReportAllocs()
	for b.Loop() {
		if err := k.Use(f); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNewKey(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		k, err := dek.NewKey()
		if err != nil {
			b.Fatal(err)
		}
		k.Destroy()
	}
}

func BenchmarkSeal(b *testing.B) {
	k, plain := newKey(b), make([]byte, 512)
	where := dek.Binding{Purpose: dek.PurposeRecord, Vault: "hr", Object: "keyrings/payroll", Version: 1}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.Seal(where, plain); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkUnwrapOuter times what the service does for an unwrap besides the
// token: parse and open the outer layer.
func BenchmarkUnwrapOuter(b *testing.B) {
	seal := newKey(b)
	raw := goodWrapped(b, seal).Bytes()
	b.ReportAllocs()
	for b.Loop() {
		w, err := dek.ParseWrapped(raw)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := w.Inner(seal); err != nil {
			b.Fatal(err)
		}
	}
}
