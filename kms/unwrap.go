package kms

import (
	"context"
	"errors"
	"fmt"

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
// at the same time share one token operation, unless anything was changed
// between them; each has its own records.
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
	f, leader := s.flights.join(c.Principal, w, t.view)
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
		if f, leader = s.flights.join(c.Principal, w, t.view); leader {
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
