package kms

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/keyward/keyward/dek"
)

// Unwrap returns the DEK of w; the caller destroys it. The order is: the rules,
// the outer layer, the intent on disk, the token, the outcome on disk, the
// answer. It touches neither the store nor a lock that a change holds.
//
// It wraps dek.ErrDenied (no rule, no such keyring, disabled, too many bad
// ciphertexts: one answer), dek.ErrAuth (whatever is wrong with w: one answer),
// dek.ErrConflict (w is genuine but for a master key that is gone, after a
// restore: fetch the keyring's wraps again), dek.ErrUnavailable or
// dek.ErrExhausted (token or log: try again). Identical unwraps of one caller
// at the same time share one token operation; each has its own records.
func (s *Service) Unwrap(ctx context.Context, c Caller, w dek.Wrapped) (*dek.Key, error) {
	if err := s.ready(); err != nil {
		return nil, err
	}
	id := w.ID()
	ev := s.event(c, OpKeyringUnwrap, ringScope(id.Vault, id.Keyring))
	ev.Version = id.Version
	t, err := s.admit(c, w)
	ev.Rule = t.rule
	if err != nil {
		return nil, s.refuse(ctx, ev, s.badness(ctx, c, id.KeyringID, err))
	}
	f, leader := s.flights.join(c.Principal, w)
	if leader {
		return s.lead(ctx, c, ev, t, f)
	}
	return s.follow(ctx, c, ev, w, t, f)
}

// A ticket is an unwrap that the rules and the outer layer let through.
type ticket struct {
	caller Caller
	view   *view // that it was decided on, or an older one
	rule   string
	header dek.Header
	inner  []byte
}

// admit decides on one wrapped DEK without a device.
func (s *Service) admit(c Caller, w dek.Wrapped) (ticket, error) {
	id := w.ID()
	v := s.view.Load()
	t := ticket{caller: c, view: v}
	var err error
	if t.rule, err = s.decide(c, OpKeyringUnwrap, ringScope(id.Vault, id.Keyring)); err != nil {
		return t, err
	}
	if s.lockouts.locked(c.Principal, id.KeyringID, s.cfg.Clock.Now()) {
		t.rule = "locked out after too many bad ciphertexts"
		return t, dek.ErrDenied
	}
	if v.ring(id.Vault, id.Keyring) == nil {
		t.rule = "no such keyring"
		return t, dek.ErrDenied
	}
	if t.header, t.inner, err = s.outer(v, w); err != nil {
		return t, err
	}
	rule, err := v.usable(t.header)
	if err != nil {
		t.rule = rule
	}
	return t, err
}

// outer checks the outer layer of w: that this service made it for this place.
func (s *Service) outer(v *view, w dek.Wrapped) (dek.Header, []byte, error) {
	h := w.Header()
	seal := s.sealOf(v, h.Vault, h.SealVersion)
	if seal == nil || h.Master.Vault != h.Vault {
		return h, nil, dek.ErrAuth
	}
	inner, err := w.Inner(seal)
	if err != nil {
		return h, nil, dek.ErrAuth
	}
	return h, inner, nil
}

// usable decides on a proven header by the states of its versions.
func (v *view) usable(h dek.Header) (rule string, err error) {
	rec := v.ring(h.Vault, h.Keyring).version(h.Version)
	master := v.key(h.Master.Vault, h.Master.Key).version(h.Master.Version)
	switch {
	case rec == nil || master == nil:
		return "no such version", dek.ErrAuth
	case rec.State != Enabled:
		return "keyring version is not enabled", dek.ErrDenied
	case master.State == Destroyed || dek.ObjectID(master.Object) != h.Object:
		return "wrap is for a master key that is gone", fmt.Errorf("%w: the master key of this wrap is gone; fetch the keyring again", dek.ErrConflict)
	case master.State != Enabled:
		return "master key version is not enabled", dek.ErrDenied
	}
	return "", nil
}

// lead does the token operation of a flight.
func (s *Service) lead(ctx context.Context, c Caller, ev Event, t ticket, f *flight) (*dek.Key, error) {
	a, err := s.intend(ctx, ev)
	if err != nil {
		s.flights.finish(f, nil, err, true)
		s.flights.leave(f)
		return nil, err
	}
	k, err := s.decrypt(ctx, t.header, t.inner)
	s.flights.finish(f, k, err, err != nil && ctx.Err() != nil)
	out, err := s.flights.take(f)
	// The flight can be joined until the outcome is on disk: callers who were
	// late by less than that share the operation too.
	out, err = s.conclude(ctx, a, t, out, err)
	s.flights.leave(f)
	return out, err
}

// follow waits for the leader of a flight, between an intent and an outcome of
// its own.
func (s *Service) follow(ctx context.Context, c Caller, ev Event, w dek.Wrapped, t ticket, f *flight) (*dek.Key, error) {
	defer func() { s.flights.leave(f) }()
	ev.Note = "collapsed"
	a, err := s.intend(ctx, ev)
	if err != nil {
		return nil, err
	}
	for {
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, a.end(ctx, fmt.Errorf("%w: %w", dek.ErrUnavailable, ctx.Err()))
		}
		if !f.abandoned || ctx.Err() != nil {
			k, err := s.flights.take(f)
			return s.conclude(ctx, a, t, k, err)
		}
		// The leader gave up; this caller has not.
		s.flights.leave(f)
		var leader bool
		if f, leader = s.flights.join(c.Principal, w); leader {
			a.ev.Note = ""
			k, err := s.decrypt(ctx, t.header, t.inner)
			s.flights.finish(f, k, err, err != nil && ctx.Err() != nil)
		}
	}
}

// decrypt has the token undo the inner layer.
func (s *Service) decrypt(ctx context.Context, h dek.Header, inner []byte) (*dek.Key, error) {
	k, err := s.cfg.Token.DecryptKey(ctx, h.Object, h.Hash, inner)
	switch {
	case errors.Is(err, dek.ErrNotFound):
		return nil, fmt.Errorf("%w: the token does not hold master key %s", dek.ErrUnavailable, h.Master)
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%w: %w", dek.ErrUnavailable, ctx.Err())
	case err != nil:
		return nil, classed(err)
	}
	return k, nil
}

// openWrapped opens w for the service itself.
func (s *Service) openWrapped(ctx context.Context, v *view, w dek.Wrapped) (*dek.Key, error) {
	h, inner, err := s.outer(v, w)
	if err != nil {
		return nil, err
	}
	return s.decrypt(ctx, h, inner)
}

// conclude looks at the rules once more, records the outcome and hands the key
// out, all inside the gate: what it records is what happens.
func (s *Service) conclude(ctx context.Context, a *act, t ticket, k *dek.Key, err error) (*dek.Key, error) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	if err == nil {
		a.ev.Rule, err = s.still(t)
	}
	if err == nil {
		err = s.ready()
	}
	if err = a.end(ctx, err); err != nil {
		k.Destroy()
		return nil, err
	}
	return k, nil
}

// maxBatch bounds UnwrapBatch, in items.
const maxBatch = 1000

// batchWorkers bounds the items of one batch in the token's queue at a time.
const batchWorkers = 32

// UnwrapBatch unwraps up to 1000 DEKs between one intent and one outcome. Each
// item has its own key (the caller destroys it) or error, of the classes of
// Unwrap; the last error is about the batch as a whole, and then there are no
// keys.
func (s *Service) UnwrapBatch(ctx context.Context, c Caller, ws []dek.Wrapped) ([]*dek.Key, []error, error) {
	if err := s.ready(); err != nil {
		return nil, nil, err
	}
	ev := s.event(c, OpKeyringUnwrap, "")
	ev.Count = len(ws)
	if len(ws) == 0 || len(ws) > maxBatch {
		return nil, nil, s.refuse(ctx, ev, fmt.Errorf("%w: a batch has 1 to %d items", dek.ErrInvalid, maxBatch))
	}
	tickets, errs, rule := s.admitAll(ctx, c, ws)
	ev.Rule, ev.Object, ev.Note = rule, commonScope(ws), summary(ws, errs)
	if refused(errs) {
		return nil, errs, s.refuse(ctx, ev, errs[0])
	}
	a, err := s.intend(ctx, ev)
	if err != nil {
		return nil, nil, err
	}
	keys := make([]*dek.Key, len(ws))
	s.decryptAll(ctx, tickets, keys, errs)
	s.gate.RLock()
	defer s.gate.RUnlock()
	s.dropLost(tickets, keys, errs)
	a.ev.Note = summary(ws, errs)
	if err := a.end(ctx, s.ready()); err != nil {
		for _, k := range keys {
			k.Destroy()
		}
		return nil, nil, err
	}
	return keys, errs, nil
}

// admitAll admits each item.
func (s *Service) admitAll(ctx context.Context, c Caller, ws []dek.Wrapped) ([]ticket, []error, string) {
	tickets, errs := make([]ticket, len(ws)), make([]error, len(ws))
	rule := ""
	for i, w := range ws {
		var err error
		tickets[i], err = s.admit(c, w)
		if err == nil {
			rule = tickets[i].rule
			continue
		}
		rule = or(rule, tickets[i].rule)
		errs[i] = s.badness(ctx, c, w.ID().KeyringID, err)
	}
	return tickets, errs, rule
}

// dropLost takes back the keys whose right was lost since they were admitted.
func (s *Service) dropLost(tickets []ticket, keys []*dek.Key, errs []error) {
	for i, t := range tickets {
		if errs[i] != nil {
			continue
		}
		if _, err := s.still(t); err != nil {
			keys[i].Destroy()
			keys[i], errs[i] = nil, err
		}
	}
}

func refused(errs []error) bool {
	for _, err := range errs {
		if err == nil {
			return false
		}
	}
	return true
}

// decryptAll keeps the token's queue fed.
func (s *Service) decryptAll(ctx context.Context, tickets []ticket, keys []*dek.Key, errs []error) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(batchWorkers, len(tickets)) {
		wg.Go(func() {
			for i := range next {
				keys[i], errs[i] = s.decrypt(ctx, tickets[i].header, tickets[i].inner)
			}
		})
	}
	for i := range tickets {
		if errs[i] == nil {
			next <- i
		}
	}
	close(next)
	wg.Wait()
}

// commonScope is the keyring of the whole batch, or the nearest place above.
func commonScope(ws []dek.Wrapped) string {
	first := ws[0].ID()
	scope := ringScope(first.Vault, first.Keyring)
	for _, w := range ws[1:] {
		switch id := w.ID(); {
		case id.Vault != first.Vault:
			return "/"
		case id.Keyring != first.Keyring:
			scope = vaultScope(first.Vault)
		}
	}
	return scope
}

// maxSummary bounds the note of a batch, in bytes.
const maxSummary = 2000

// summary tells per class which versions of which keyrings had it.
func summary(ws []dek.Wrapped, errs []error) string {
	type group struct {
		result string
		id     dek.KeyringID
	}
	var order []group
	versions := make(map[group][]string)
	for i, w := range ws {
		g := group{result(errs[i]), w.ID().KeyringID}
		if versions[g] == nil {
			order = append(order, g)
		}
		versions[g] = append(versions[g], strconv.FormatUint(uint64(w.ID().Version), 10))
	}
	var b strings.Builder
	for _, g := range order {
		fmt.Fprintf(&b, "%s: %s/%s; ", g.result, g.id, strings.Join(versions[g], ","))
		if b.Len() > maxSummary {
			return b.String()[:maxSummary] + "..."
		}
	}
	return strings.TrimSuffix(b.String(), "; ")
}
