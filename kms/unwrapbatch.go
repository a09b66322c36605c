package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/keyward/keyward/dek"
)

// maxBatch bounds UnwrapBatch, in items.
const maxBatch = 1000

// batchWorkers bounds the items of one batch in the token's queue at a time.
const batchWorkers = 32

// UnwrapBatch unwraps up to 1000 DEKs. Each item has its own key (the caller
// destroys it) or error, of the classes of Unwrap; the last error is about the
// batch as a whole, and then there are no keys. A batch in which each item is
// refused for the same reason is refused as a whole.
//
// Each keyring has an intent and an outcome of its own, which name the versions,
// so that who looks for a keyring in the log finds all of its unwraps.
func (s *Service) UnwrapBatch(ctx context.Context, c Caller, ws []dek.Wrapped) ([]*dek.Key, []error, error) {
	if err := s.ready(); err != nil {
		return nil, nil, err
	}
	if len(ws) == 0 || len(ws) > maxBatch {
		ev := s.event(c, OpKeyringUnwrap, "")
		ev.Count = len(ws)
		return nil, nil, s.refuse(ctx, ev, fmt.Errorf("%w: a batch has 1 to %d items", dek.ErrInvalid, maxBatch))
	}
	b := &batch{s: s, ws: ws, keys: make([]*dek.Key, len(ws))}
	b.admit(ctx, c)
	if err := b.intend(ctx, c); err != nil {
		return nil, nil, err
	}
	if err := b.refused(); err != nil {
		return nil, b.errs, err
	}
	b.decrypt(ctx)
	s.gate.RLock()
	defer s.gate.RUnlock()
	b.dropLost()
	if err := b.end(ctx, s.ready()); err != nil {
		for _, k := range b.keys {
			k.Destroy()
		}
		return nil, nil, err
	}
	return b.keys, b.errs, nil
}

// A batch is one UnwrapBatch under way. Items have the same index everywhere.
type batch struct {
	s       *Service
	ws      []dek.Wrapped
	tickets []ticket
	keys    []*dek.Key
	errs    []error
	parts   []*part
}

// A part is what one pair of records is about: items of one keyring.
type part struct {
	items []int
	act   *act // nil if each item was refused
}

// maxPart bounds the items of a part, and so its records: versions are numbers
// of up to ten digits.
const maxPart = 250

// admit admits each item.
func (b *batch) admit(ctx context.Context, c Caller) {
	b.tickets, b.errs = make([]ticket, len(b.ws)), make([]error, len(b.ws))
	open := map[dek.KeyringID]*part{}
	for i, w := range b.ws {
		ring := w.ID().KeyringID
		var err error
		if b.tickets[i], err = b.s.admit(c, w); err != nil {
			b.errs[i] = b.s.badness(ctx, c, ring, err)
		}
		p := open[ring]
		if p == nil || len(p.items) == maxPart {
			p = &part{}
			open[ring], b.parts = p, append(b.parts, p)
		}
		p.items = append(p.items, i)
	}
}

// each runs f for all parts at once, since their records reach the disk
// together, and returns what went wrong.
func (b *batch) each(f func(p *part) error) error {
	if len(b.parts) == 1 {
		return f(b.parts[0])
	}
	errs := make([]error, len(b.parts))
	var all sync.WaitGroup
	for i, p := range b.parts {
		all.Go(func() { errs[i] = f(p) })
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err // that of the log, which is the same for all
		}
	}
	return nil
}

// intend records what is asked for: an intent, or a refusal where nothing of a
// part was admitted. If one can't be recorded, the others get an outcome.
func (b *batch) intend(ctx context.Context, c Caller) error {
	err := b.each(func(p *part) (err error) {
		first := p.items[0]
		id := b.ws[first].ID()
		ev := b.s.event(c, OpKeyringUnwrap, ringScope(id.Vault, id.Keyring))
		ev.Rule, ev.Count, ev.Note = b.tickets[first].rule, len(p.items), b.summary(p, "asked")
		if len(p.items) == 1 {
			ev.Version = id.Version
		}
		admitted := slices.IndexFunc(p.items, func(i int) bool { return b.errs[i] == nil })
		if admitted < 0 {
			ev.Phase, ev.Result = PhaseRefused, result(b.errs[first])
			_, err = b.s.append(ctx, ev)
			return err
		}
		ev.Rule = b.tickets[p.items[admitted]].rule
		p.act, err = b.s.intend(ctx, ev)
		return err
	})
	if err == nil {
		return nil
	}
	return errors.Join(err, b.each(func(p *part) error {
		if p.act != nil {
			_ = p.act.end(ctx, err) // returns err
		}
		return nil
	}))
}

// refused is the error of the batch if each item has one of the same class.
func (b *batch) refused() error {
	for _, err := range b.errs {
		if err == nil || result(err) != result(b.errs[0]) {
			return nil
		}
	}
	return b.errs[0]
}

// decrypt keeps the token's queue fed.
func (b *batch) decrypt(ctx context.Context) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(batchWorkers, len(b.ws)) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(b.ws) {
					return
				}
				if b.errs[i] == nil {
					b.keys[i], b.errs[i] = b.s.decrypt(ctx, b.tickets[i].header, b.tickets[i].inner)
				}
			}
		})
	}
	wg.Wait()
}

// dropLost takes back the keys whose right was lost since they were admitted.
func (b *batch) dropLost() {
	for i, t := range b.tickets {
		if b.errs[i] != nil {
			continue
		}
		if _, err := b.s.still(t); err != nil {
			b.keys[i].Destroy()
			b.keys[i], b.errs[i] = nil, err
		}
	}
}

// end records the outcomes: of the batch if it failed as a whole, else those of
// the items. A part of which no key goes out has the class of its first item.
func (b *batch) end(ctx context.Context, whole error) error {
	err := b.each(func(p *part) error {
		if p.act == nil {
			return nil
		}
		p.act.ev.Note = b.summary(p, resultOK)
		failed := whole
		if failed == nil && !slices.ContainsFunc(p.items, func(i int) bool { return b.errs[i] == nil }) {
			failed = b.errs[p.items[0]]
		}
		if err := p.act.end(ctx, failed); failed == nil {
			return err
		}
		return nil
	})
	return errors.Join(whole, err)
}

// summary tells per class which versions had it: "ok: 1-4,7; denied: 5".
func (b *batch) summary(p *part, ok string) string {
	var order []string
	versions := make(map[string][]dek.Version)
	for _, i := range p.items {
		class := ok
		if b.errs[i] != nil {
			class = result(b.errs[i])
		}
		if versions[class] == nil {
			order = append(order, class)
		}
		versions[class] = append(versions[class], b.ws[i].ID().Version)
	}
	for n, class := range order {
		order[n] = class + ": " + ranges(versions[class])
	}
	return strings.Join(order, "; ")
}

// ranges writes versions in ascending order, those that follow each other as
// one range.
func ranges(vs []dek.Version) string {
	slices.Sort(vs)
	var out strings.Builder
	for i := 0; i < len(vs); {
		last := i
		for last+1 < len(vs) && vs[last+1] <= vs[last]+1 {
			last++
		}
		if out.Len() > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, "%d", vs[i])
		if vs[last] != vs[i] {
			fmt.Fprintf(&out, "-%d", vs[last])
		}
		i = last + 1
	}
	return out.String()
}
