package kms

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/keyward/keyward/dek"
)

// defaultBits is the size of a master key when none is asked for: 128 bits of
// strength (NIST SP 800-57 part 1, table 2).
const defaultBits = 3072

// maxRequestID bounds request ids, in bytes.
const maxRequestID = 128

func checkRequest(id string) error {
	if len(id) > maxRequestID {
		return fmt.Errorf("%w: request id over %d bytes", dek.ErrInvalid, maxRequestID)
	}
	for _, r := range []byte(id) {
		if r < 0x20 || r > 0x7e {
			return fmt.Errorf("%w: request id: use printable ASCII", dek.ErrInvalid)
		}
	}
	return nil
}

// CreateKey makes a master key and its first version in the token. The same
// request id gives the same version, also after an error that wraps
// dek.ErrUnavailable: try again with it. It wraps dek.ErrInvalid,
// dek.ErrDenied, dek.ErrNotFound (vault), dek.ErrExists,
// dek.ErrPrecondition (this request failed for good: use a new id).
func (s *Service) CreateKey(ctx context.Context, c Caller, req CreateKey) (MasterKey, error) {
	bits := or(req.Bits, defaultBits)
	input := errors.Join(dek.CheckName("vault", req.Vault), dek.CheckName("key", req.Name), checkRequest(req.RequestID))
	if bits != 2048 && bits != 3072 && bits != 4096 {
		input = errors.Join(input, fmt.Errorf("%w: bits %d: use 2048, 3072 or 4096", dek.ErrInvalid, bits))
	}
	return s.newMaster(ctx, c, OpKeyCreate, input, masterRequest{req.RequestID, req.Vault, req.Name, bits})
}

// RollKey makes a new version of a master key and makes it current: new wraps
// use it, older versions keep unwrapping. Request id and errors as CreateKey.
func (s *Service) RollKey(ctx context.Context, c Caller, req RollKey) (MasterKey, error) {
	input := errors.Join(dek.CheckName("vault", req.Vault), dek.CheckName("key", req.Name), checkRequest(req.RequestID))
	return s.newMaster(ctx, c, OpKeyRoll, input, masterRequest{req.RequestID, req.Vault, req.Name, 0})
}

// A masterRequest asks for a version; bits 0: of an existing key.
type masterRequest struct {
	id, vault, name string
	bits            int
}

func (s *Service) newMaster(ctx context.Context, c Caller, op Operation, input error, req masterRequest) (MasterKey, error) {
	var out MasterKey
	err := s.do(ctx, c, op, keyScope(req.vault, req.name), input, func(a *act) error {
		n, ch, err := s.makeMaster(ctx, req)
		a.change, a.ev.Version = ch, n
		a.ev.Note = s.view.Load().keyNote(req.vault, req.name, n)
		if err != nil {
			return err
		}
		out = s.view.Load().key(req.vault, req.name).model(req.vault, req.name)
		return nil
	})
	return out, err
}

// makeMaster runs the create protocol of a master key version.
func (s *Service) makeMaster(ctx context.Context, req masterRequest) (dek.Version, change, error) {
	path := keyPath(req.vault, req.name)
	unlock, err := s.work.lock(ctx, path)
	if err != nil {
		return 0, change{}, err
	}
	defer unlock()
	var n dek.Version
	pending, err := s.update(ctx, func(v *view) (muts []mut, err error) {
		n, muts, err = s.pendingMaster(v, req)
		return muts, err
	})
	if err != nil {
		return 0, change{}, err
	}
	ch, err := s.finishMaster(ctx, req.vault, req.name, n, true)
	if ch.n == 0 {
		ch = pending
	}
	return n, ch, err
}

// pendingMaster decides which version a request means and records a new one.
func (s *Service) pendingMaster(v *view, req masterRequest) (dek.Version, []mut, error) {
	path := keyPath(req.vault, req.name)
	if _, ok := v.vaults.get(req.vault); !ok {
		return 0, nil, fmt.Errorf("vault %s: %w", req.vault, dek.ErrNotFound)
	}
	if n, ok := v.request(path, req.id); ok {
		return n, nil, nil
	}
	k := v.key(req.vault, req.name)
	switch {
	case req.bits == 0 && k == nil:
		return 0, nil, fmt.Errorf("key %s/%s: %w", req.vault, req.name, dek.ErrNotFound)
	case req.bits != 0 && k != nil && !k.neverWas():
		return 0, nil, fmt.Errorf("key %s/%s: %w", req.vault, req.name, dek.ErrExists)
	}
	now := s.now()
	rec := &keyVersionRecord{State: Pending, Created: now, Changed: now, Request: req.id}
	rand.Read(rec.Object[:])
	n := dek.Version(1)
	var muts []mut
	if k == nil || req.bits != 0 && k.rec.Bits != req.bits {
		muts = append(muts, mut{path, &keyRecord{Bits: req.bits, Created: now}})
	}
	if k != nil {
		n = dek.Version(len(k.versions) + 1)
	}
	return n, append(muts, mut{versionPath(path, n), rec}), nil
}

// neverWas reports whether no version of the key ever came to be.
func (k *keyState) neverWas() bool {
	for _, v := range k.versions {
		if v.State != Failed {
			return false
		}
	}
	return true
}

// finishMaster takes a PENDING version to ENABLED or FAILED, by what is in the
// token. It is the one path of normal work (generate: make the pair if there
// is none), of start-up and of the reconciler. A version that is already past
// PENDING is left as it is. The caller holds the work lock.
func (s *Service) finishMaster(ctx context.Context, vault, name string, n dek.Version, generate bool) (change, error) {
	k := s.view.Load().key(vault, name)
	rec := k.version(n)
	switch {
	case rec == nil:
		return change{}, fmt.Errorf("key %s/%s/%d: %w", vault, name, n, dek.ErrNotFound)
	case rec.State == Failed:
		return change{}, fmt.Errorf("%w: making key %s/%s/%d failed; ask again with a new request id", dek.ErrPrecondition, vault, name, n)
	case rec.State != Pending:
		return change{}, nil
	}
	object := dek.ObjectID(rec.Object)
	pub, err := s.findOrMake(ctx, object, k.rec.Bits, generate)
	if err == nil {
		err = s.testPair(ctx, object, pub)
	}
	switch {
	case err == nil:
	case !noPair(err):
		return change{}, err // nothing is known about the pair: it stays PENDING
	default:
		ch, ferr := s.failMaster(ctx, vault, name, n)
		if ferr != nil {
			return ch, ferr
		}
		return ch, fmt.Errorf("%w: making key %s/%s/%d failed and was given up (%v); ask again with a new request id",
			dek.ErrPrecondition, vault, name, n, err)
	}
	spki := marshalSPKI(pub)
	if err := s.saver.save(ctx, s); err != nil {
		return change{}, err
	}
	return s.moveMaster(ctx, vault, name, n, func(r *keyVersionRecord) { r.State, r.SPKI = Enabled, spki })
}

// noPair reports whether err of findOrMake or testPair says that there is no
// whole pair and none will come. Whatever else a token answers (not reached, a
// wrong PIN, another token for a moment) says nothing about the pair.
func noPair(err error) bool {
	for _, open := range []error{dek.ErrUnavailable, dek.ErrPrecondition, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, open) {
			return false
		}
	}
	return slices.ContainsFunc([]error{dek.ErrNotFound, dek.ErrCorrupt, dek.ErrExists, dek.ErrInvalid},
		func(class error) bool { return errors.Is(err, class) })
}

// findOrMake returns the public half of the one pair under object; noPair
// judges the error.
func (s *Service) findOrMake(ctx context.Context, object dek.ObjectID, bits int, generate bool) (*rsa.PublicKey, error) {
	pub, err := s.cfg.Token.FindPair(ctx, object)
	if !errors.Is(err, dek.ErrNotFound) || !generate {
		return pub, named(err, "find the pair")
	}
	made, gerr := s.cfg.Token.GeneratePair(ctx, object, bits)
	pub, err = s.cfg.Token.FindPair(ctx, object) // decides, whatever generating said
	switch {
	case err == nil && gerr == nil && !made.Equal(pub):
		return nil, fmt.Errorf("%w: the token shows another pair than it made", dek.ErrCorrupt)
	case errors.Is(err, dek.ErrNotFound) && gerr == nil:
		return nil, fmt.Errorf("%w: the token lost the pair it made", dek.ErrUnavailable)
	case errors.Is(err, dek.ErrNotFound):
		return nil, named(classed(gerr), "generate the pair")
	}
	return pub, named(err, "find the pair")
}

// marshalSPKI can't fail for an RSA key.
func marshalSPKI(pub *rsa.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		panic("kms: internal error: encode a public key: " + err.Error())
	}
	return der
}

func named(err error, what string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// testPair proves that what is encrypted to pub the token decrypts under
// object: the pair is whole and this is its public half.
func (s *Service) testPair(ctx context.Context, object dek.ObjectID, pub *rsa.PublicKey) error {
	k, err := dek.NewKey()
	if err != nil {
		return err
	}
	defer k.Destroy()
	hash := s.cfg.Token.OAEPHash()
	inner, err := dek.EncryptToMaster(pub, hash, k)
	if err != nil {
		return err
	}
	again, err := s.cfg.Token.DecryptKey(ctx, object, hash, inner)
	if errors.Is(err, dek.ErrNotFound) { // it was there a moment ago
		err = fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	if err != nil {
		return fmt.Errorf("test the pair: %w", err)
	}
	defer again.Destroy()
	if !again.Equal(k) {
		return fmt.Errorf("%w: test the pair: the token decrypts to another key", dek.ErrCorrupt)
	}
	return nil
}

// failMaster gives a PENDING version up: first whatever stands under the
// object it recorded is destroyed, then it is FAILED. No other object is ever
// destroyed.
func (s *Service) failMaster(ctx context.Context, vault, name string, n dek.Version) (change, error) {
	rec := s.view.Load().key(vault, name).version(n)
	if rec.State != Pending || rec.SPKI != nil {
		return change{}, fmt.Errorf("kms: internal error: giving up key %s/%s/%d that was enabled", vault, name, n)
	}
	if err := s.cfg.Token.DestroyPair(ctx, dek.ObjectID(rec.Object)); err != nil {
		return change{}, fmt.Errorf("destroy the half pair: %w", err)
	}
	return s.moveMaster(ctx, vault, name, n, func(r *keyVersionRecord) { r.State = Failed })
}

// moveMaster is the compare-and-swap out of PENDING.
func (s *Service) moveMaster(ctx context.Context, vault, name string, n dek.Version, f func(*keyVersionRecord)) (change, error) {
	return s.update(ctx, func(v *view) ([]mut, error) {
		rec := v.key(vault, name).version(n)
		if rec == nil || rec.State != Pending {
			return nil, nil // someone finished it
		}
		next := *rec
		f(&next)
		next.Changed = s.now()
		return []mut{{versionPath(keyPath(vault, name), n), &next}}, nil
	})
}

// Key returns a master key. It wraps dek.ErrDenied, dek.ErrNotFound,
// dek.ErrInvalid.
func (s *Service) Key(ctx context.Context, c Caller, vault, name string) (MasterKey, error) {
	var out MasterKey
	input := errors.Join(dek.CheckName("vault", vault), dek.CheckName("key", name))
	err := s.do(ctx, c, OpKeyRead, keyScope(vault, name), input, func(*act) error {
		k := s.view.Load().key(vault, name)
		if k == nil {
			return fmt.Errorf("key %s/%s: %w", vault, name, dek.ErrNotFound)
		}
		out = k.model(vault, name)
		return nil
	})
	return out, err
}

// Keys lists the master keys of a vault that the caller may read. It wraps
// dek.ErrDenied if there is none it may.
func (s *Service) Keys(ctx context.Context, c Caller, vault string) ([]MasterKey, error) {
	var out []MasterKey
	scope := vaultScope(vault)
	for _, e := range sorted(&s.view.Load().keys, vault+"/") {
		name := e.key[len(vault)+1:]
		if s.allowed(c, OpKeyRead, keyScope(vault, name)) {
			out = append(out, e.value.model(vault, name))
		}
	}
	if len(out) > 0 {
		scope = keyScope(vault, out[0].Name)
	}
	err := s.do(ctx, c, OpKeyRead, scope, dek.CheckName("vault", vault), func(a *act) error {
		a.ev.Object, a.ev.Count = vaultScope(vault), len(out)
		return s.vaultThere(vault)
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (s *Service) vaultThere(vault string) error {
	if _, ok := s.view.Load().vaults.get(vault); !ok {
		return fmt.Errorf("vault %s: %w", vault, dek.ErrNotFound)
	}
	return nil
}

func (k *keyState) model(vault, name string) MasterKey {
	m := MasterKey{Vault: vault, Name: name, Bits: k.rec.Bits, Current: k.current()}
	for i, v := range k.versions {
		m.Versions = append(m.Versions, MasterVersion{
			Version: dek.Version(i + 1), State: v.State, Object: dek.ObjectID(v.Object), Created: v.Created, SPKI: v.SPKI,
		})
	}
	return m
}
