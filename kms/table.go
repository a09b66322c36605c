package kms

import (
	"iter"
	"maps"
)

// shardCount trades the pointers copied by every change for the entries copied
// with a shard: at 100,000 entries a change copies 256 pointers and 400 entries.
const shardCount = 256

// A table is a persistent map: set returns a table that shares with the old
// one everything but one shard. Reading needs no lock. Entries must not be
// changed after set, unless the same transaction made them.
type table[T any] struct {
	shards [shardCount]*shard[T]
	n      int
}

type shard[T any] struct {
	owner uint64 // transaction that may change it in place
	m     map[string]T
}

func (t *table[T]) shardOf(key string) int {
	h := uint32(2166136261) // FNV-1a; the keys are names, not attacker-chosen bytes
	for i := 0; i < len(key); i++ {
		h = (h ^ uint32(key[i])) * 16777619
	}
	return int((h ^ h>>16) % shardCount)
}

func (t *table[T]) get(key string) (T, bool) {
	s := t.shards[t.shardOf(key)]
	if s == nil {
		var zero T
		return zero, false
	}
	v, ok := s.m[key]
	return v, ok
}

// own returns the shard of key as one that transaction txn may change.
func (t *table[T]) own(txn uint64, key string) *shard[T] {
	i := t.shardOf(key)
	s := t.shards[i]
	switch {
	case s == nil:
		s = &shard[T]{owner: txn, m: make(map[string]T, 1)}
	case s.owner != txn:
		s = &shard[T]{owner: txn, m: maps.Clone(s.m)}
	}
	t.shards[i] = s
	return s
}

// set changes t itself: callers hold a private copy of the table's pointers.
func (t *table[T]) set(txn uint64, key string, v T) {
	s := t.own(txn, key)
	if _, ok := s.m[key]; !ok {
		t.n++
	}
	s.m[key] = v
}

func (t *table[T]) remove(txn uint64, key string) {
	if _, ok := t.get(key); !ok {
		return
	}
	delete(t.own(txn, key).m, key)
	t.n--
}

// all goes over the entries in no order.
func (t *table[T]) all() iter.Seq2[string, T] {
	return func(yield func(string, T) bool) {
		for _, s := range t.shards {
			if s == nil {
				continue
			}
			for k, v := range s.m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}
