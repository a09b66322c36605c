package kms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// A mut is one record to write (rec nil: to remove) in a change.
type mut struct {
	path string
	rec  any
}

// A change is what the audit log keeps of one transaction.
type change struct {
	n     uint64
	state []byte
}

// A located record is one as the writer knows it.
type located struct {
	revision int64
	term     sum
	change   uint64 // that wrote it
}

// A writer is the state of the one writing side; all of it is guarded by
// Service.mu.
type writer struct {
	sealer   *sealer
	head     headRecord
	headRev  int64
	digest   sum
	index    map[string]located // every record but the head
	unsure   bool               // a commit had no outcome and reading it failed
	revision int64              // of the newest transaction known
}

// resolveTimeout bounds finding out about a commit whose outcome is unknown;
// the caller's own deadline has often passed by then.
const resolveTimeout = 10 * time.Second

// maxConflicts bounds how often a change is decided anew.
const maxConflicts = 5

// update makes one change: f decides on the newest state which records to
// write (none: nothing to do, nothing is written). It may be called again if
// the store was changed meanwhile, so it must have no effects of its own.
// An error of the store that wraps dek.ErrUnavailable means: not done as far
// as the store says, or not known; the next change looks first.
func (s *Service) update(ctx context.Context, f func(v *view) ([]mut, error)) (change, error) {
	return s.write(ctx, f, true)
}

// keepBooks is update for counters, reports and dates: no record of the log
// names the change, and losing it is no rollback.
func (s *Service) keepBooks(ctx context.Context, f func(v *view) ([]mut, error)) (change, error) {
	return s.write(ctx, f, false)
}

func (s *Service) write(ctx context.Context, f func(v *view) ([]mut, error), act bool) (change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for try := 0; ; try++ {
		if err := s.ready(); err != nil {
			return change{}, err
		}
		if s.w.unsure {
			if err := s.reload(ctx); err != nil {
				return change{}, fmt.Errorf("read the state again: %w", err)
			}
		}
		muts, err := f(s.view.Load())
		if err != nil || len(muts) == 0 {
			return change{}, err
		}
		ch, err := s.commit(ctx, muts, act)
		if errors.Is(err, dek.ErrConflict) && try < maxConflicts {
			if err := s.reload(ctx); err != nil {
				return change{}, fmt.Errorf("read the state again: %w", err)
			}
			continue
		}
		return ch, err
	}
}

// A draft is a change that is sealed but not stored yet.
type draft struct {
	changes []Change
	plain   map[string][]byte
	head    headRecord
	headRaw []byte
	digest  sum
	boot    []byte // hash of the boot record
	places  map[string]located
}

// commit stores muts and publishes the new view; act is false for bookkeeping.
func (s *Service) commit(ctx context.Context, muts []mut, act bool) (change, error) {
	muts, undo, err := s.rollSystemSeal(ctx, muts)
	if err != nil {
		return change{}, err
	}
	d, err := s.draft(muts, act)
	if err != nil {
		undo()
		return change{}, err
	}
	next, err := s.preview(d)
	if err != nil {
		undo()
		return change{}, err
	}
	rev, err := s.cfg.Store.Commit(ctx, d.changes)
	switch {
	case err == nil:
		s.adopt(d, next, rev)
		return change{d.head.Change, next.state}, nil
	case errors.Is(err, dek.ErrConflict), errors.Is(err, dek.ErrInvalid), errors.Is(err, dek.ErrExhausted):
		undo()
		return change{}, fmt.Errorf("store: %w", err) // nothing happened
	}
	// Nobody knows: ask the store before anything else is decided.
	s.w.unsure = true
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resolveTimeout)
	defer cancel()
	if rerr := s.reload(rctx); rerr != nil {
		return change{}, fmt.Errorf("store: %w; reading it again: %v", classed(err), rerr)
	}
	if v := s.view.Load(); v.change == d.head.Change && string(v.state) == string(next.state) {
		return change{v.change, v.state}, nil
	}
	return change{}, fmt.Errorf("store: %w", classed(err))
}

// classed makes sure that an error of a plugged-in part carries a class.
func classed(err error) error {
	if classOf(err) == "" {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	return err
}

// draft seals muts and the head that closes them.
func (s *Service) draft(muts []mut, act bool) (*draft, error) {
	w := s.w
	n := w.head.Change + 1
	d := &draft{digest: w.digest, boot: w.head.Boot, plain: make(map[string][]byte, len(muts)), places: make(map[string]located, len(muts))}
	for _, m := range muts {
		old, known := w.index[m.path]
		c := Change{Path: m.path, Expect: old.revision}
		if known {
			d.digest = d.digest.sub(old.term)
		}
		if m.rec == nil {
			d.plain[m.path] = nil
			d.changes = append(d.changes, c)
			continue
		}
		if b, ok := m.rec.(*bootRecord); ok {
			b.Change = n
		}
		plain, err := json.Marshal(m.rec)
		if err != nil {
			return nil, fmt.Errorf("encode record %q: %w", m.path, err)
		}
		c.Value = plain
		if m.path != pathBoot {
			if c.Value, err = w.sealer.seal(m.path, n, plain); err != nil {
				return nil, err
			}
		}
		if m.path == pathBoot {
			d.boot = stateHash(plain)
		}
		term := w.sealer.term(m.path, n, c.Value)
		d.digest = d.digest.add(term)
		d.plain[m.path] = plain
		d.places[m.path] = located{term: term, change: n}
		d.changes = append(d.changes, c)
	}
	return d, s.closeDraft(d, n, act)
}

// closeDraft adds the head.
func (s *Service) closeDraft(d *draft, n uint64, act bool) error {
	w := s.w
	d.head = headRecord{
		Change: n, Act: w.head.Act, Epoch: w.head.Epoch, Digest: d.digest.bytes(), Boot: d.boot, Log: s.logged.Load(), Reserved: w.head.Reserved,
	}
	if act {
		d.head.Act = n
	}
	// Reserve while there is still half a block, so that a crash never
	// under-counts.
	if block := s.cfg.limits.block; w.sealer.used+block/2 >= d.head.Reserved {
		d.head.Reserved = w.sealer.used + block
	}
	plain, err := json.Marshal(d.head)
	if err != nil {
		return fmt.Errorf("encode head: %w", err)
	}
	if d.headRaw, err = w.sealer.seal(pathHead, n, plain); err != nil {
		return err
	}
	d.changes = append(d.changes, Change{Path: pathHead, Value: d.headRaw, Expect: w.headRev})
	return nil
}

// preview makes the view as it will be.
func (s *Service) preview(d *draft) (*view, error) {
	next := new(view)
	*next = *s.view.Load()
	next.change, next.epoch, next.state = d.head.Change, d.head.Epoch, stateHash(d.headRaw)
	for path, plain := range d.plain {
		if err := next.apply(d.head.Change, path, plain); err != nil {
			return nil, fmt.Errorf("kms: internal error: record %q does not read back: %w", path, err)
		}
	}
	return next, nil
}

// adopt makes a stored draft the state.
func (s *Service) adopt(d *draft, next *view, rev int64) {
	w := s.w
	for path, plain := range d.plain {
		if plain == nil {
			delete(w.index, path)
			continue
		}
		p := d.places[path]
		p.revision = rev
		w.index[path] = p
	}
	w.head, w.headRev, w.digest, w.revision = d.head, rev, d.digest, rev
	s.view.Store(next)
}

// reload replaces writer and view by what the store holds, verified. Held
// back: a state older than the one in memory is a store put back in time.
func (s *Service) reload(ctx context.Context) error {
	l, err := s.load(ctx)
	if err != nil {
		if errors.Is(err, dek.ErrCorrupt) {
			s.halt(err)
		}
		return err
	}
	old := s.view.Load()
	switch {
	case l.view.epoch != s.w.head.Epoch:
		err = fmt.Errorf("%w: another process has taken this store over; this one stops serving", dek.ErrPrecondition)
	case l.view.change < old.change:
		err = fmt.Errorf("%w: rollback suspected: the store is at change %d, this process has seen %d", dek.ErrCorrupt, l.view.change, old.change)
	}
	if err != nil {
		s.halt(err)
		return err
	}
	if l.w.sealer.current == s.w.sealer.current {
		l.w.sealer.used = max(l.w.sealer.used, s.w.sealer.used)
	}
	s.w = l.w
	s.view.Store(l.view)
	return nil
}
