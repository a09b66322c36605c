package kms

import (
	"context"

	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// CreateVault makes a vault with a seal key of its own. It wraps
// dek.ErrInvalid, dek.ErrDenied, dek.ErrExists, or dek.ErrUnavailable (ask
// Vaults before trying again).
func (s *Service) CreateVault(ctx context.Context, c Caller, name string) (Vault, error) {
	var out Vault
	err := s.do(ctx, c, OpVaultCreate, vaultScope(name), dek.CheckName("vault", name), func(a *act) error {
		if _, ok := s.view.Load().vaults.get(name); ok {
			return fmt.Errorf("vault %s: %w", name, dek.ErrExists)
		}
		sv, err := s.makeSeal(ctx, name, 1)
		if err != nil {
			return err
		}
		rec := &vaultRecord{Created: s.now(), Seals: []sealVersion{sv}, Reserved: s.cfg.limits.block}
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			if _, ok := v.vaults.get(name); ok {
				return nil, fmt.Errorf("vault %s: %w", name, dek.ErrExists)
			}
			return []mut{{vaultPath(name), rec}}, nil
		})
		out = rec.model(name)
		return err
	})
	return out, err
}

// Vaults lists the vaults the caller may read. It wraps dek.ErrDenied if there
// is none it may.
func (s *Service) Vaults(ctx context.Context, c Caller) ([]Vault, error) {
	var out []Vault
	for _, e := range sorted(&s.view.Load().vaults, "") {
		if s.allowed(c, OpVaultRead, vaultScope(e.key)) {
			out = append(out, e.value.model(e.key))
		}
	}
	scope := "/"
	if len(out) > 0 {
		scope = vaultScope(out[0].Name)
	}
	err := s.do(ctx, c, OpVaultRead, scope, nil, func(a *act) error {
		a.ev.Object, a.ev.Count = "/vaults", len(out)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (r *vaultRecord) model(name string) Vault {
	return Vault{Name: name, Created: r.Created, SealVersion: r.Seals[len(r.Seals)-1].Version}
}

// now is the time for records: UTC, microseconds.
func (s *Service) now() time.Time { return s.cfg.Clock.Now().UTC().Truncate(time.Microsecond) }

// makeSeal makes one version of a seal key, sealed under the root and to the
// recovery recipient, and proves that the token opens it again.
func (s *Service) makeSeal(ctx context.Context, vault string, version dek.Version) (sealVersion, error) {
	k, err := dek.NewKey()
	if err != nil {
		return sealVersion{}, err
	}
	sv, err := s.sealSeal(ctx, dek.ObjectID(s.view.Load().boot.Root), vault, version, k)
	if err != nil {
		k.Destroy()
		return sealVersion{}, err
	}
	s.keepSeal(sv.Sealed, k)
	return sv, nil
}

// sealSeal seals a seal key for storage; k stays the caller's.
func (s *Service) sealSeal(ctx context.Context, root dek.ObjectID, vault string, version dek.Version, k *dek.Key) (sealVersion, error) {
	b := sealKeyBinding(vault, version)
	sealed, err := s.cfg.Token.SealKey(ctx, root, b, k)
	if err != nil {
		return sealVersion{}, fmt.Errorf("seal the seal key: %w", err)
	}
	again, err := s.cfg.Token.OpenKey(ctx, root, b, sealed)
	if err != nil {
		return sealVersion{}, fmt.Errorf("open the new seal key: %w", err)
	}
	defer again.Destroy()
	if !again.Equal(k) {
		return sealVersion{}, fmt.Errorf("%w: the token does not give back the seal key it sealed", dek.ErrUnavailable)
	}
	recovery, err := s.recoveryCopy(b, k)
	if err != nil {
		return sealVersion{}, err
	}
	return sealVersion{Version: version, Sealed: sealed, Recovery: recovery}, nil
}

// rollSystemSeal adds a new version of the system seal key to muts when the
// current one has sealed enough. undo takes the sealer back if the change is
// not stored.
func (s *Service) rollSystemSeal(ctx context.Context, muts []mut) (_ []mut, undo func(), err error) {
	w := s.w
	if w.sealer.used < s.cfg.limits.seals {
		return muts, func() {}, nil
	}
	for _, m := range muts {
		if m.path == pathBoot {
			return nil, nil, fmt.Errorf("%w: the system seal key must be rolled first", dek.ErrConflict)
		}
	}
	boot := s.view.Load().boot
	next := w.sealer.current + 1
	sv, err := s.makeSeal(ctx, "", next)
	if err != nil {
		return nil, nil, fmt.Errorf("roll the system seal key: %w", err)
	}
	boot.Seals = append(slices.Clone(boot.Seals), sv)
	key, _ := s.seals.Load(string(sv.Sealed))
	old, reserved := *w.sealer, w.head.Reserved
	w.sealer.keys[next] = key.(*dek.Key)
	w.sealer.current, w.sealer.used, w.head.Reserved = next, 0, 0
	undo = func() {
		delete(w.sealer.keys, next)
		w.sealer.current, w.sealer.used, w.head.Reserved = old.current, old.used, reserved
	}
	return append(slices.Clone(muts), mut{pathBoot, &boot}), undo, nil
}

// A sealUse counts the seals of one vault's current seal key ahead of use.
type sealUse struct {
	mu       sync.Mutex
	known    bool
	sealed   string // which version the figures are of
	used     uint64
	reserved uint64
}

// vaultSeal returns the current seal key of a vault for n more seals: the
// count is on disk before the key is used, and a key that has sealed enough is
// rolled first. The key belongs to the Service.
func (s *Service) vaultSeal(ctx context.Context, vault string, n uint64) (*dek.Key, sealVersion, error) {
	u, _ := s.sealUses.LoadOrStore(vault, &sealUse{})
	use := u.(*sealUse)
	use.mu.Lock()
	defer use.mu.Unlock()
	rec, ok := s.view.Load().vaults.get(vault)
	if !ok {
		return nil, sealVersion{}, fmt.Errorf("vault %s: %w", vault, dek.ErrNotFound)
	}
	sv := rec.Seals[len(rec.Seals)-1]
	if !use.known || use.sealed != string(sv.Sealed) {
		// Of an earlier life only the reservation is known: count it as used.
		use.known, use.sealed, use.used, use.reserved = true, string(sv.Sealed), rec.Reserved, rec.Reserved
	}
	if use.used+n > s.cfg.limits.seals {
		next, err := s.makeSeal(ctx, vault, sv.Version+1)
		if err != nil {
			return nil, sealVersion{}, fmt.Errorf("roll the seal key of vault %s: %w", vault, err)
		}
		sv, use.used, use.reserved = next, 0, 0
	}
	if use.used+n > use.reserved {
		if err := s.reserveSeals(ctx, vault, sv, use.used+n+s.cfg.limits.block); err != nil {
			use.known = false
			return nil, sealVersion{}, err
		}
		use.sealed, use.reserved = string(sv.Sealed), use.used+n+s.cfg.limits.block
	}
	use.used += n
	key, err := s.openSeal(ctx, dek.ObjectID(s.view.Load().boot.Root), vault, sv)
	return key, sv, err
}

// reserveSeals stores how many seals the version sv may have made, adding the
// version if it is new.
func (s *Service) reserveSeals(ctx context.Context, vault string, sv sealVersion, reserved uint64) error {
	_, err := s.keepBooks(ctx, func(v *view) ([]mut, error) {
		rec, ok := v.vaults.get(vault)
		if !ok {
			return nil, fmt.Errorf("vault %s: %w", vault, dek.ErrNotFound)
		}
		next := *rec
		if last := rec.Seals[len(rec.Seals)-1]; last.Version < sv.Version {
			next.Seals = append(slices.Clone(rec.Seals), sv)
		}
		next.Reserved = reserved
		return []mut{{vaultPath(vault), &next}}, nil
	})
	return err
}

// sealOf returns the seal key of a version and vault, opened at start.
func (s *Service) sealOf(v *view, vault string, version dek.Version) *dek.Key {
	rec, ok := v.vaults.get(vault)
	if !ok {
		return nil
	}
	i, ok := slices.BinarySearchFunc(rec.Seals, version, func(sv sealVersion, n dek.Version) int { return int(sv.Version) - int(n) })
	if !ok {
		return nil
	}
	k, ok := s.seals.Load(string(rec.Seals[i].Sealed))
	if !ok {
		return nil
	}
	return k.(*dek.Key)
}

// recoveryCopy seals k to the recovery recipient; nil if there is none.
func (s *Service) recoveryCopy(b dek.Binding, k *dek.Key) ([]byte, error) {
	text := s.view.Load().system.Recipient
	if text == "" {
		return nil, nil
	}
	return sealToRecipient(text, b, k)
}
