package kms

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/keyward/keyward/dek"
)

// CreateKeyring makes a keyring and its first DEK version under the current
// version of a master key. Request id and errors as CreateKey.
func (s *Service) CreateKeyring(ctx context.Context, c Caller, req CreateKeyring) (Keyring, error) {
	input := errors.Join(dek.CheckName("vault", req.Vault), dek.CheckName("keyring", req.Name),
		dek.CheckName("master key", req.MasterKey), checkRequest(req.RequestID))
	return s.newRing(ctx, c, OpKeyringCreate, input, ringRequest{req.RequestID, req.Vault, req.Name, req.MasterKey, req.ServerKey})
}

// RollKeyring makes a new DEK version and makes it current. Older ones stay.
// Request id and errors as CreateKey.
func (s *Service) RollKeyring(ctx context.Context, c Caller, req RollKeyring) (Keyring, error) {
	input := errors.Join(dek.CheckName("vault", req.Vault), dek.CheckName("keyring", req.Name), checkRequest(req.RequestID))
	return s.newRing(ctx, c, OpKeyringRoll, input, ringRequest{req.RequestID, req.Vault, req.Name, "", 0})
}

// A ringRequest asks for a version; an empty master: of an existing keyring.
type ringRequest struct {
	id, vault, name, master string
	serverKey               uint32
}

func (s *Service) newRing(ctx context.Context, c Caller, op Operation, input error, req ringRequest) (Keyring, error) {
	var out Keyring
	err := s.do(ctx, c, op, ringScope(req.vault, req.name), input, func(a *act) error {
		n, ch, err := s.makeRing(ctx, req)
		a.change, a.ev.Version = ch, n
		a.ev.Note = s.view.Load().ringNote(req.vault, req.name, n)
		if err != nil {
			return err
		}
		out = s.view.Load().ring(req.vault, req.name).model(req.vault, req.name, false)
		return nil
	})
	return out, err
}

// makeRing runs the create protocol of a keyring version.
func (s *Service) makeRing(ctx context.Context, req ringRequest) (dek.Version, change, error) {
	unlock, err := s.work.lock(ctx, ringPath(req.vault, req.name))
	if err != nil {
		return 0, change{}, err
	}
	defer unlock()
	v := s.view.Load()
	n, done, err := v.nextRing(req)
	if err != nil {
		return 0, change{}, err
	}
	if done {
		ch, err := s.finishRing(ctx, req.vault, req.name, n, nil)
		return n, ch, err
	}
	k, err := dek.NewKey()
	if err != nil {
		return 0, change{}, err
	}
	defer k.Destroy()
	rec, err := s.wrapNew(ctx, req, n, k)
	if err != nil {
		return 0, change{}, err
	}
	pending, err := s.recordRing(ctx, req, n, rec)
	if err != nil {
		return 0, change{}, err
	}
	ch, err := s.finishRing(ctx, req.vault, req.name, n, k)
	if ch.n == 0 {
		ch = pending
	}
	return n, ch, err
}

// nextRing decides which version a request means; done: it is there already.
func (v *view) nextRing(req ringRequest) (n dek.Version, done bool, err error) {
	path := ringPath(req.vault, req.name)
	if _, ok := v.vaults.get(req.vault); !ok {
		return 0, false, fmt.Errorf("vault %s: %w", req.vault, dek.ErrNotFound)
	}
	if n, ok := v.request(path, req.id); ok {
		return n, true, nil
	}
	r := v.ring(req.vault, req.name)
	switch {
	case req.master == "" && r == nil:
		return 0, false, fmt.Errorf("keyring %s/%s: %w", req.vault, req.name, dek.ErrNotFound)
	case req.master != "" && r != nil && !r.neverWas():
		return 0, false, fmt.Errorf("keyring %s/%s: %w", req.vault, req.name, dek.ErrExists)
	case req.master != "" && v.key(req.vault, req.master) == nil:
		return 0, false, fmt.Errorf("key %s/%s: %w", req.vault, req.master, dek.ErrNotFound)
	case r == nil:
		return 1, false, nil
	}
	return dek.Version(len(r.versions) + 1), false, nil
}

// neverWas reports whether no version of the keyring ever came to be.
func (r *ringState) neverWas() bool {
	for _, v := range r.versions {
		if v.State != Failed {
			return false
		}
	}
	return true
}

// nextServer is the server version of the next version: the first is 1, each
// later one two more than the largest a server may have seen, so that it can
// tell "the next" from "the one after it": MariaDB's background re-encryption
// needs that.
func (r *ringState) nextServer() uint32 {
	if r == nil || len(r.versions) == 0 {
		return 1
	}
	var n uint32
	for _, v := range r.versions {
		n = max(n, v.ServerVersion)
	}
	return n + 2
}

// wrapNew makes the record of a new version around k.
func (s *Service) wrapNew(ctx context.Context, req ringRequest, n dek.Version, k *dek.Key) (*ringVersionRecord, error) {
	v := s.view.Load()
	r, master := v.ring(req.vault, req.name), req.master
	rec := &ringVersionRecord{State: Pending, ServerVersion: r.nextServer(), Created: s.now(), Request: req.id}
	rec.Changed = rec.Created
	if r != nil && master == "" {
		master = r.rec.MasterKey
	}
	id := dek.KeyID{KeyringID: dek.KeyringID{Vault: req.vault, Keyring: req.name}, Version: n}
	current := v.key(req.vault, master).current()
	if current == 0 {
		return nil, fmt.Errorf("%w: key %s/%s has no enabled version", dek.ErrPrecondition, req.vault, master)
	}
	w, err := s.wrap(ctx, id, dek.MasterID{Vault: req.vault, Key: master, Version: current}, k)
	if err != nil {
		return nil, err
	}
	rec.Master, rec.Wrapped = current, w.Bytes()
	rec.Recovery, err = s.recoveryCopy(dekRecoveryBinding(id), k)
	return rec, err
}

// wrap makes both layers around k.
func (s *Service) wrap(ctx context.Context, id dek.KeyID, m dek.MasterID, k *dek.Key) (dek.Wrapped, error) {
	master := s.view.Load().key(m.Vault, m.Key).version(m.Version)
	if master == nil || master.State != Enabled {
		return dek.Wrapped{}, fmt.Errorf("%w: master key %s is not enabled", dek.ErrPrecondition, m)
	}
	pub, err := parseSPKI(master.SPKI)
	if err != nil {
		return dek.Wrapped{}, fmt.Errorf("master key %s: %w", m, err)
	}
	hash := s.cfg.Token.OAEPHash()
	inner, err := dek.EncryptToMaster(pub, hash, k)
	if err != nil {
		return dek.Wrapped{}, err
	}
	seal, sv, err := s.vaultSeal(ctx, id.Vault, 1)
	if err != nil {
		return dek.Wrapped{}, err
	}
	return dek.Wrap(dek.Header{
		KeyID: id, Master: m, Object: dek.ObjectID(master.Object), Hash: hash, SealVersion: sv.Version, SealedSealKey: sv.Sealed,
	}, seal, inner)
}

func parseSPKI(der []byte) (*rsa.PublicKey, error) {
	any, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %w", dek.ErrCorrupt, err)
	}
	pub, ok := any.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: public key is not RSA", dek.ErrCorrupt)
	}
	return pub, nil
}

// recordRing commits the PENDING version.
func (s *Service) recordRing(ctx context.Context, req ringRequest, n dek.Version, rec *ringVersionRecord) (change, error) {
	path := ringPath(req.vault, req.name)
	return s.update(ctx, func(v *view) ([]mut, error) {
		now, done, err := v.nextRing(req)
		if err != nil {
			return nil, err
		}
		r := v.ring(req.vault, req.name)
		if done && now == n && string(r.version(n).Wrapped) == string(rec.Wrapped) {
			return nil, nil // an earlier try of this very change was stored after all
		}
		if done || now != n {
			return nil, fmt.Errorf("keyring %s/%s: %w", req.vault, req.name, dek.ErrConflict)
		}
		muts := []mut{{versionPath(path, n), rec}}
		if req.master != "" {
			muts = append(muts, mut{path, &ringRecord{MasterKey: req.master, ServerKey: req.serverKey, Created: rec.Created}})
		}
		return muts, nil
	})
}

// finishRing takes a PENDING version to ENABLED, after the token has given its
// DEK back (the same as want, if that is known), or to FAILED. It is the one
// path of normal work, start-up and reconciler. The caller holds the work lock.
func (s *Service) finishRing(ctx context.Context, vault, name string, n dek.Version, want *dek.Key) (change, error) {
	rec := s.view.Load().ring(vault, name).version(n)
	switch {
	case rec == nil:
		return change{}, fmt.Errorf("keyring %s/%s/%d: %w", vault, name, n, dek.ErrNotFound)
	case rec.State == Failed:
		return change{}, fmt.Errorf("%w: making keyring version %s/%s/%d failed; ask again with a new request id", dek.ErrPrecondition, vault, name, n)
	case rec.State != Pending:
		return change{}, nil
	}
	err := s.proveRing(ctx, rec, want)
	switch {
	case err == nil:
	case !errors.Is(err, dek.ErrAuth) && !errors.Is(err, dek.ErrCorrupt) && !errors.Is(err, dek.ErrInvalid):
		return change{}, err // nothing is known about the wrap: it stays PENDING
	default:
		ch, ferr := s.moveRing(ctx, vault, name, n, Failed)
		if ferr != nil {
			return ch, ferr
		}
		return ch, fmt.Errorf("%w: making keyring version %s/%s/%d failed and was given up (%v); ask again with a new request id",
			dek.ErrPrecondition, vault, name, n, err)
	}
	if err := s.saver.save(ctx, s); err != nil {
		return change{}, err
	}
	ch, err := s.moveRing(ctx, vault, name, n, Enabled)
	if err == nil {
		s.hub.tell(s.view.Load(), vault, []string{name}, NoticeRolled)
	}
	return ch, err
}

// proveRing unwraps what is stored through the token.
func (s *Service) proveRing(ctx context.Context, rec *ringVersionRecord, want *dek.Key) error {
	w, err := dek.ParseWrapped(rec.Wrapped)
	if err != nil {
		return err
	}
	got, err := s.openWrapped(ctx, s.view.Load(), w)
	if err != nil {
		return fmt.Errorf("unwrap the new version: %w", err)
	}
	defer got.Destroy()
	if want != nil && !got.Equal(want) {
		return fmt.Errorf("%w: the token unwraps the new version to another key", dek.ErrCorrupt)
	}
	return nil
}

// moveRing is the compare-and-swap out of PENDING.
func (s *Service) moveRing(ctx context.Context, vault, name string, n dek.Version, to State) (change, error) {
	return s.update(ctx, func(v *view) ([]mut, error) {
		rec := v.ring(vault, name).version(n)
		if rec == nil || rec.State != Pending {
			return nil, nil
		}
		next := *rec
		next.State, next.Changed = to, s.now()
		return []mut{{versionPath(ringPath(vault, name), n), &next}}, nil
	})
}

// Keyring returns a keyring without wrapped bytes. It wraps dek.ErrDenied,
// dek.ErrNotFound, dek.ErrInvalid.
func (s *Service) Keyring(ctx context.Context, c Caller, vault, name string) (Keyring, error) {
	var out Keyring
	input := errors.Join(dek.CheckName("vault", vault), dek.CheckName("keyring", name))
	err := s.do(ctx, c, OpKeyringRead, ringScope(vault, name), input, func(*act) error {
		r := s.view.Load().ring(vault, name)
		if r == nil {
			return fmt.Errorf("keyring %s/%s: %w", vault, name, dek.ErrNotFound)
		}
		out = r.model(vault, name, false)
		return nil
	})
	return out, err
}

// Keyrings lists the keyrings of a vault that the caller may read, without
// wrapped bytes. It wraps dek.ErrDenied if there is none it may.
func (s *Service) Keyrings(ctx context.Context, c Caller, vault string) ([]Keyring, error) {
	var out []Keyring
	scope := vaultScope(vault)
	for _, e := range sorted(&s.view.Load().rings, vault+"/") {
		name := e.key[len(vault)+1:]
		if s.allowed(c, OpKeyringRead, ringScope(vault, name)) {
			out = append(out, e.value.model(vault, name, false))
		}
	}
	if len(out) > 0 {
		scope = ringScope(vault, out[0].Name)
	}
	err := s.do(ctx, c, OpKeyringRead, scope, dek.CheckName("vault", vault), func(a *act) error {
		a.ev.Object, a.ev.Count = vaultScope(vault), len(out)
		return s.vaultThere(vault)
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (r *ringState) model(vault, name string, wrapped bool) Keyring {
	k := Keyring{Vault: vault, Name: name, MasterKey: r.rec.MasterKey, ServerKey: r.rec.ServerKey, Current: r.current()}
	for i, v := range r.versions {
		m := KeyringVersion{
			Version: dek.Version(i + 1), ServerVersion: v.ServerVersion, State: v.State, Created: v.Created, Master: v.Master,
		}
		if wrapped {
			m.Wrapped = v.Wrapped
		}
		k.Versions = append(k.Versions, m)
	}
	return k
}
