package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/keyward/keyward/dek"
)

func (r SetEnabled) check(field string) error {
	return errors.Join(dek.CheckName("vault", r.Vault), dek.CheckName(field, r.Name))
}

// outcome is the state that r asks for.
func (r SetEnabled) outcome() (from, to State, notice NoticeKind) {
	if r.Enabled {
		return Disabled, Enabled, NoticeEnabled
	}
	return Enabled, Disabled, NoticeDisabled
}

// SetKeyEnabled switches versions of a master key off or on. Off holds before
// it returns: no call returns a key under them later, whenever it began.
// Connected instances are told; the Effect names those that are not connected.
// It wraps dek.ErrInvalid, dek.ErrDenied, dek.ErrNotFound (key or version),
// dek.ErrUnavailable (not known: ask Key, then try again).
func (s *Service) SetKeyEnabled(ctx context.Context, c Caller, req SetEnabled) (Effect, error) {
	var out Effect
	err := s.do(ctx, c, OpKeySetEnabled, keyScope(req.Vault, req.Name), req.check("key"), func(a *act) error {
		from, to, notice := req.outcome()
		a.ev.Version, a.ev.Note = req.Version, noteOf(req.Enabled)
		touched := make(map[dek.Version]bool)
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			clear(touched)
			k := v.key(req.Vault, req.Name)
			if k == nil || req.Version != 0 && k.version(req.Version) == nil {
				return nil, fmt.Errorf("key %s/%s version %d: %w", req.Vault, req.Name, req.Version, dek.ErrNotFound)
			}
			var muts []mut
			for i, rec := range k.versions {
				n := dek.Version(i + 1)
				if req.Version != 0 && req.Version != n {
					continue
				}
				touched[n] = true // also if it was done before: the instances are told again
				if rec.State != from {
					continue
				}
				next := *rec
				next.State, next.Changed = to, s.now()
				muts = append(muts, mut{versionPath(keyPath(req.Vault, req.Name), n), &next})
			}
			return muts, bounded(muts)
		})
		if err != nil {
			return err
		}
		s.settle()
		out = s.hub.tell(s.view.Load(), req.Vault, s.view.Load().ringsUnder(req.Vault, req.Name, touched), notice)
		return nil
	})
	return out, err
}

// SetKeyringEnabled switches versions of a keyring off or on, as SetKeyEnabled
// does for master keys.
func (s *Service) SetKeyringEnabled(ctx context.Context, c Caller, req SetEnabled) (Effect, error) {
	var out Effect
	err := s.do(ctx, c, OpKeyringSetState, ringScope(req.Vault, req.Name), req.check("keyring"), func(a *act) error {
		from, to, notice := req.outcome()
		a.ev.Version, a.ev.Note = req.Version, noteOf(req.Enabled)
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			r := v.ring(req.Vault, req.Name)
			if r == nil || req.Version != 0 && r.version(req.Version) == nil {
				return nil, fmt.Errorf("keyring %s/%s version %d: %w", req.Vault, req.Name, req.Version, dek.ErrNotFound)
			}
			var muts []mut
			for i, rec := range r.versions {
				n := dek.Version(i + 1)
				if rec.State != from || req.Version != 0 && req.Version != n {
					continue
				}
				next := *rec
				next.State, next.Changed = to, s.now()
				muts = append(muts, mut{versionPath(ringPath(req.Vault, req.Name), n), &next})
			}
			return muts, bounded(muts)
		})
		if err != nil {
			return err
		}
		s.settle()
		out = s.hub.tell(s.view.Load(), req.Vault, []string{req.Name}, notice)
		return nil
	})
	return out, err
}

func noteOf(enabled bool) string {
	if enabled {
		return "enable"
	}
	return "disable"
}

// maxMuts bounds one transaction, in records; a store takes 128 with the head
// and the boot record.
const maxMuts = 120

func bounded(muts []mut) error {
	if len(muts) > maxMuts {
		return fmt.Errorf("%w: %d versions in one change, %d fit; name the versions", dek.ErrExhausted, len(muts), maxMuts)
	}
	return nil
}

// ringsUnder returns the keyrings of a vault with a version wrapped for one of
// the versions of a master key.
func (v *view) ringsUnder(vault, key string, versions map[dek.Version]bool) []string {
	names := make(map[string]bool)
	for _, e := range sorted(&v.rings, vault+"/") {
		if e.value.rec.MasterKey != key {
			continue
		}
		for _, rec := range e.value.versions {
			if versions[rec.Master] {
				names[e.key[len(vault)+1:]] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(names))
}
