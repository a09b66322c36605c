// Package storetest holds the contract of a kms.Store as tests, and a store in
// memory with faults on order. A store that passes Run may stand below kms.
package storetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A Fault is how one call of Memory goes wrong.
type Fault uint8

// The faults. Every outside effect can fail without having happened, and fail
// although it happened; a caller must survive both.
const (
	// FailedNotDone returns Err; nothing happened.
	FailedNotDone Fault = iota + 1
	// FailedButDone does the work and returns Err.
	FailedButDone
)

// A Rule decides about one call: op is "load", "commit" or "watch", n counts
// the calls of that op from 1, changes are those of a commit. It returns zero
// for no fault. It may block, to delay the call until the test lets it go on.
type Rule func(op string, n int, changes []kms.Change) Fault

// Memory is a Store that forgets all when the process ends. It may be used
// concurrently. Tamper and Snapshot play the attacker who owns the disk.
type Memory struct {
	mu      sync.Mutex
	now     map[string]kms.Record
	history []transaction
	rev     int64
	base    int64 // revisions up to here are compacted
	changed chan struct{}
	rule    Rule
	err     error
	calls   map[string]int
}

type transaction struct {
	rev  int64
	recs []kms.Record
}

var _ kms.Store = (*Memory)(nil)

// NewMemory returns an empty store without faults. Its first revision is 1, as
// etcd's is.
func NewMemory() *Memory {
	return &Memory{now: map[string]kms.Record{}, rev: 1, changed: make(chan struct{}), calls: map[string]int{}}
}

// Inject sets the rule for calls from now on, nil for none, and the error that
// faults return (nil: one of class dek.ErrUnavailable). The counters restart.
func (m *Memory) Inject(rule Rule, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		err = fmt.Errorf("%w: injected fault", dek.ErrUnavailable)
	}
	m.rule, m.err, m.calls = rule, err, map[string]int{}
}

// FailNth makes call n (from 1) of op go wrong, once.
func FailNth(op string, n int, f Fault) Rule {
	return func(o string, i int, _ []kms.Change) Fault {
		if o == op && i == n {
			return f
		}
		return 0
	}
}

// ask counts the call and asks the rule, outside the lock since it may block.
func (m *Memory) ask(op string, changes []kms.Change) (Fault, error) {
	m.mu.Lock()
	m.calls[op]++
	rule, n, err := m.rule, m.calls[op], m.err
	m.mu.Unlock()
	if rule == nil {
		return 0, nil
	}
	return rule(op, n, changes), err
}

// Load implements kms.Store.
func (m *Memory) Load(ctx context.Context, f func(kms.Record) error) (int64, error) {
	fault, ferr := m.ask("load", nil)
	if fault == FailedNotDone {
		return 0, ferr
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("%w: load: %w", dek.ErrUnavailable, err)
	}
	m.mu.Lock()
	rev, recs := m.rev, slices.Collect(maps.Values(m.now))
	m.mu.Unlock()
	slices.SortFunc(recs, func(a, b kms.Record) int { return cmpPath(a.Path, b.Path) })
	for _, r := range recs {
		r.Value = append([]byte{}, r.Value...)
		if err := f(r); err != nil {
			return 0, err
		}
	}
	if fault == FailedButDone {
		return 0, ferr
	}
	return rev, nil
}

func cmpPath(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Commit implements kms.Store.
func (m *Memory) Commit(ctx context.Context, changes []kms.Change) (int64, error) {
	fault, ferr := m.ask("commit", changes)
	if fault == FailedNotDone {
		return 0, ferr
	}
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("%w: commit: %w", dek.ErrUnavailable, err)
	}
	rev, err := m.commit(changes)
	if err == nil && fault == FailedButDone {
		return 0, ferr
	}
	return rev, err
}

func (m *Memory) commit(changes []kms.Change) (int64, error) {
	if len(changes) == 0 {
		return 0, fmt.Errorf("%w: empty transaction", dek.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := map[string]bool{}
	for _, c := range changes {
		if c.Path == "" || seen[c.Path] || c.Expect < 0 || c.Value == nil && c.Expect == 0 {
			return 0, fmt.Errorf("%w: change of %q", dek.ErrInvalid, c.Path)
		}
		seen[c.Path] = true
	}
	for _, c := range changes {
		if m.now[c.Path].Revision != c.Expect {
			return 0, fmt.Errorf("%w: %q has revision %d, not %d", dek.ErrConflict, c.Path, m.now[c.Path].Revision, c.Expect)
		}
	}
	m.rev++
	t := transaction{rev: m.rev}
	for _, c := range changes {
		r := kms.Record{Path: c.Path, Revision: m.rev}
		if c.Value == nil {
			delete(m.now, c.Path)
		} else {
			r.Value = append([]byte{}, c.Value...)
			m.now[c.Path] = r
		}
		t.recs = append(t.recs, r)
	}
	m.history = append(m.history, t)
	close(m.changed)
	m.changed = make(chan struct{})
	return m.rev, nil
}

// Watch implements kms.Store.
func (m *Memory) Watch(ctx context.Context, after int64, f func([]kms.Record, int64) error) error {
	for {
		if fault, ferr := m.ask("watch", nil); fault != 0 {
			return ferr
		}
		m.mu.Lock()
		if after < m.base {
			m.mu.Unlock()
			return fmt.Errorf("%w: revision %d is compacted", dek.ErrConflict, after)
		}
		i, _ := slices.BinarySearchFunc(m.history, after+1, func(t transaction, rev int64) int { return int(t.rev - rev) })
		todo, changed := slices.Clone(m.history[i:]), m.changed
		m.mu.Unlock()
		for _, t := range todo {
			if err := f(cloneRecords(t.recs), t.rev); err != nil {
				return err
			}
			after = t.rev
		}
		if len(todo) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func cloneRecords(recs []kms.Record) []kms.Record {
	out := slices.Clone(recs)
	for i := range out {
		if out[i].Value != nil {
			out[i].Value = append([]byte{}, out[i].Value...)
		}
	}
	return out
}

// Tamper changes records behind the back of the user, as someone with the disk
// can: f may edit, add and delete values by path. No revision moves and no
// watch sees it.
func (m *Memory) Tamper(f func(values map[string][]byte)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	values := make(map[string][]byte, len(m.now))
	for p, r := range m.now {
		values[p] = append([]byte{}, r.Value...)
	}
	f(values)
	for p := range m.now {
		if _, ok := values[p]; !ok {
			delete(m.now, p)
		}
	}
	for p, v := range values {
		r, ok := m.now[p]
		if !ok {
			r = kms.Record{Path: p, Revision: m.rev}
		}
		r.Value = append([]byte{}, v...)
		m.now[p] = r
	}
}

// Snapshot returns an independent copy as it stands now, without faults and
// history: an old disk put back.
func (m *Memory) Snapshot() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := NewMemory()
	c.rev, c.base = m.rev, m.rev
	for p, r := range m.now {
		r.Value = append([]byte{}, r.Value...)
		c.now[p] = r
	}
	return c
}

// Compact forgets the history up to the present revision.
func (m *Memory) Compact(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.base, m.history = m.rev, nil
	return nil
}

// Delay returns a rule that holds each call of op for d; under testing/synctest
// the clock is the bubble's.
func Delay(op string, d time.Duration) Rule {
	return func(o string, _ int, _ []kms.Change) Fault {
		if o == op {
			time.Sleep(d)
		}
		return 0
	}
}
