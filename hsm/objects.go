package hsm

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// signerRSABits is the size of signers and roots on tokens without EC or AES.
const signerRSABits = 3072

// lookUp returns the kept handle of the private half (or secret key) of an
// object, or finds it: a search scans the whole token and costs more than an
// RSA operation once there are fifty objects, so it is done once.
func (d *device) lookUp(s *session, kind objectKind, id dek.ObjectID) (object, error) {
	key := handleKey{kind, id}
	d.mu.RLock()
	o, ok := d.handles[key]
	d.mu.RUnlock()
	if ok {
		return o, nil
	}
	o, err := s.search(kind, id)
	if err != nil && !errors.Is(err, dek.ErrNotFound) && !errors.Is(err, dek.ErrCorrupt) {
		if e := s.renew(); e != nil {
			return object{}, s.judge("find key", e)
		}
		o, err = s.search(kind, id)
	}
	switch {
	case errors.Is(err, dek.ErrCorrupt):
		return object{}, err
	case errors.Is(err, dek.ErrNotFound):
		return object{}, s.confirmAbsence(err)
	case err != nil:
		return object{}, s.judge("find key", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.handles[key] = o
	return o, nil
}

// confirmAbsence lets a "not found" stand only if the login still holds: a
// token that has logged us out hides private objects instead of failing.
func (s *session) confirmAbsence(err error) error {
	if s.d.probe.ciphertext == nil { // while the identity is being looked for
		return err
	}
	handles, e := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, kindIdentity.label()))
	if e != nil || len(handles) == 0 {
		return fmt.Errorf("%w: %w: logged out", dek.ErrUnavailable, errRebuild)
	}
	return err
}

// search finds exactly one object; crypto11 would take the first of several.
func (s *session) search(kind objectKind, id dek.ObjectID) (object, error) {
	classes := []uint{pkcs11.CKO_PRIVATE_KEY}
	if kind == kindRoot {
		classes = []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY}
	}
	for _, class := range classes {
		handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
			pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]), pkcs11.NewAttribute(pkcs11.CKA_LABEL, kind.label()))
		if err != nil {
			return object{}, err
		}
		if len(handles) > 1 {
			return object{}, fmt.Errorf("%w: %d %s keys %x in the token", dek.ErrCorrupt, len(handles), kind, id)
		}
		if len(handles) == 1 {
			o := object{handle: handles[0]}
			if class == pkcs11.CKO_PRIVATE_KEY {
				o.rsaBytes, err = s.modulusBytes(handles[0])
			}
			return o, err
		}
	}
	return object{}, fmt.Errorf("%w: no %s key %x in the token", dek.ErrNotFound, kind, id)
}

// modulusBytes returns 0 for keys that are not RSA.
func (s *session) modulusBytes(h pkcs11.ObjectHandle) (int, error) {
	a, err := s.d.p11.GetAttributeValue(s.h, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, nil)})
	if err != nil {
		return 0, err
	}
	if len(a) != 1 || !slices.Equal(a[0].Value, pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA).Value) {
		return 0, nil
	}
	if a, err = s.d.p11.GetAttributeValue(s.h, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil)}); err != nil || len(a) != 1 {
		return 0, errors.Join(errShort, err)
	}
	n := a[0].Value
	for len(n) > 0 && n[0] == 0 {
		n = n[1:]
	}
	return len(n), nil
}

// forget drops a kept handle.
func (d *device) forget(kind objectKind, id dek.ObjectID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.handles, handleKey{kind, id})
}

// public returns the public half of a pair and keeps it for seal signers and
// roots, which are few.
func (d *device) public(kind objectKind, id dek.ObjectID) (crypto.PublicKey, error) {
	d.mu.RLock()
	pub := d.publics[handleKey{kind, id}]
	d.mu.RUnlock()
	if pub != nil {
		return pub, nil
	}
	pub, err := d.maker.public(kind, id)
	if err != nil {
		return nil, classed("read public key", err)
	}
	if kind == kindSealSigner || kind == kindRoot {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.publics[handleKey{kind, id}] = pub
	}
	return pub, nil
}

// generate makes an object of a kind and returns its public half (nil for an
// AES root). A failure leaves what it leaves: the caller has recorded the id.
func (s *session) generate(kind objectKind, id dek.ObjectID, bits int) (crypto.PublicKey, error) {
	if err := s.free(id); err != nil {
		return nil, err
	}
	pub, err := s.generateKind(kind, id, bits)
	return pub, classed("generate", err)
}

func (s *session) generateKind(kind objectKind, id dek.ObjectID, bits int) (crypto.PublicKey, error) {
	m, caps := s.d.maker, s.d.caps
	switch kind {
	case kindMaster:
		if !slices.Contains(caps.RSABits, bits) {
			return nil, fmt.Errorf("%w: this token makes no RSA keys of %d bits", dek.ErrPrecondition, bits)
		}
		return m.generateRSA(kind, id, bits)
	case kindSigner, kindSealSigner:
		if caps.ECDSA {
			return m.generateEC(kind, id)
		}
		return m.generateRSA(kind, id, signerRSABits)
	case kindRoot:
		if caps.AESGCM {
			return nil, m.generateAES(kind, id)
		}
		// A seal signer without its root is what an earlier attempt left: use it.
		if _, err := s.d.lookUp(s, kindSealSigner, sealSignerID(id)); errors.Is(err, dek.ErrNotFound) {
			if _, err := s.generateKind(kindSealSigner, sealSignerID(id), 0); err != nil {
				return nil, err
			}
		} else if err != nil {
			return nil, err
		}
		return m.generateRSA(kind, id, signerRSABits)
	}
	return nil, fmt.Errorf("%w: object kind %d", dek.ErrInvalid, kind)
}

// free wraps ErrExists if any object, ours or not, has the id.
func (s *session) free(id dek.ObjectID) error {
	handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]))
	if err != nil {
		return s.judge("find key", err)
	}
	if len(handles) > 0 {
		return fmt.Errorf("%w: object %x in the token", dek.ErrExists, id)
	}
	return nil
}

// findPair returns the public half of a whole, well-made pair.
func (s *session) findPair(kind objectKind, id dek.ObjectID) (crypto.PublicKey, error) {
	var count [2]int
	for i, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
			pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]), pkcs11.NewAttribute(pkcs11.CKA_LABEL, kind.label()))
		if err != nil {
			return nil, s.judge("find key", err)
		}
		count[i] = len(handles)
	}
	switch {
	case count == [2]int{}:
		return nil, s.confirmAbsence(fmt.Errorf("%w: no %s key %x in the token", dek.ErrNotFound, kind, id))
	case count[0] == 0 && count[1] > 0:
		if err := s.confirmAbsence(nil); err != nil {
			return nil, err
		}
		fallthrough
	case count != [2]int{1, 1}:
		return nil, fmt.Errorf("%w: %s key %x has %d private and %d public halves in the token", dek.ErrCorrupt, kind, id, count[0], count[1])
	}
	s.d.forget(kind, id)
	o, err := s.d.lookUp(s, kind, id)
	if err != nil {
		return nil, err
	}
	if err := s.checkAttributes(kind, id, o); err != nil {
		return nil, err
	}
	pub, err := s.d.public(kind, id)
	if err != nil {
		return nil, err
	}
	return pub, s.selfTest(kind, id, pub)
}

// checkAttributes refuses a private half that could leave the token or do more
// than its kind. What a token does not tell (not all know every attribute) is
// not held against it.
func (s *session) checkAttributes(kind objectKind, id dek.ObjectID, o object) error {
	for _, a := range []struct {
		name string
		typ  uint
		want bool
	}{
		{"CKA_PRIVATE", pkcs11.CKA_PRIVATE, true},
		{"CKA_SENSITIVE", pkcs11.CKA_SENSITIVE, true},
		{"CKA_ALWAYS_SENSITIVE", pkcs11.CKA_ALWAYS_SENSITIVE, true},
		{"CKA_EXTRACTABLE", pkcs11.CKA_EXTRACTABLE, false},
		{"CKA_NEVER_EXTRACTABLE", pkcs11.CKA_NEVER_EXTRACTABLE, true},
		{"CKA_LOCAL", pkcs11.CKA_LOCAL, true},
		{"CKA_DECRYPT", pkcs11.CKA_DECRYPT, kind.decrypts()},
		{"CKA_SIGN", pkcs11.CKA_SIGN, !kind.decrypts()},
		{"CKA_UNWRAP", pkcs11.CKA_UNWRAP, false},
	} {
		if a.typ == pkcs11.CKA_LOCAL && !s.d.caps.Origin {
			continue
		}
		got, known, err := s.boolean(o.handle, a.typ)
		if err != nil {
			return s.judge("read "+a.name, err)
		}
		if known && got != a.want {
			return fmt.Errorf("%w: %s key %x has the wrong %s", dek.ErrCorrupt, kind, id, a.name)
		}
	}
	return nil
}

// boolean reads one attribute; known is false if the token doesn't tell.
func (s *session) boolean(h pkcs11.ObjectHandle, typ uint) (value, known bool, err error) {
	got, err := s.d.p11.GetAttributeValue(s.h, h, []*pkcs11.Attribute{pkcs11.NewAttribute(typ, nil)})
	if rv, _ := rvOf(err); rv == pkcs11.CKR_ATTRIBUTE_TYPE_INVALID || err == nil && (len(got) != 1 || len(got[0].Value) == 0) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	return got[0].Value[0] != 0, true, nil
}

// selfTest uses both halves together once (pair-wise consistency, FIPS 140-3).
func (s *session) selfTest(kind objectKind, id dek.ObjectID, pub crypto.PublicKey) error {
	var plain [dek.KeySize]byte
	rand.Read(plain[:])
	defer clear(plain[:])
	if !kind.decrypts() {
		sig, alg, err := s.sign(kind, id, plain[:])
		if err == nil && !verify(pub, alg, plain[:], sig) {
			err = fmt.Errorf("%w: the halves of %s key %x don't match", dek.ErrCorrupt, kind, id)
		}
		return err
	}
	rsaPub, err := rsaPublic(pub)
	if err != nil {
		return err
	}
	c, err := encryptOAEP(rsaPub, s.d.caps.PreferredOAEP(), plain[:])
	if err != nil {
		return err
	}
	got, err := s.decrypt(kind, id, s.d.caps.PreferredOAEP(), c)
	defer clear(got)
	if errors.Is(err, dek.ErrAuth) || err == nil && !slices.Equal(got, plain[:]) {
		return fmt.Errorf("%w: the halves of %s key %x don't match", dek.ErrCorrupt, kind, id)
	}
	return err
}

// destroy removes every object of ours with the id, half or whole, and proves
// by a search in a fresh session that none is left.
func (s *session) destroy(id dek.ObjectID) error {
	kinds := []objectKind{kindMaster, kindSigner, kindRoot}
	for _, k := range kinds {
		s.d.forget(k, id)
	}
	s.d.forget(kindSealSigner, sealSignerID(id))
	for range 2 {
		left := 0
		for _, k := range append(kinds, kindSealSigner) {
			kid := id
			if k == kindSealSigner {
				kid = sealSignerID(id)
			}
			handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_ID, kid[:]), pkcs11.NewAttribute(pkcs11.CKA_LABEL, k.label()))
			if err != nil {
				return s.judge("find key", err)
			}
			for _, h := range handles {
				left++
				if err := s.d.p11.DestroyObject(s.h, h); err != nil {
					return s.judge("destroy key", err)
				}
			}
		}
		if left == 0 {
			return s.confirmAbsence(nil)
		}
		if err := s.renew(); err != nil {
			return s.judge("open session", err)
		}
	}
	return fmt.Errorf("%w: key %x is still in the token after its destruction", dek.ErrUnavailable, id)
}

// objects returns the sorted ids of all masters, signers and roots, halves too.
func (s *session) objects() ([]dek.ObjectID, error) {
	if err := s.confirmAbsence(nil); err != nil {
		return nil, err
	}
	var ids []dek.ObjectID
	for _, k := range []objectKind{kindMaster, kindSigner, kindRoot} {
		handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_LABEL, k.label()))
		if err != nil {
			return nil, s.judge("list objects", err)
		}
		for _, h := range handles {
			a, err := s.d.p11.GetAttributeValue(s.h, h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
			if err != nil {
				return nil, s.judge("list objects", err)
			}
			if len(a) == 1 && len(a[0].Value) == 16 {
				ids = append(ids, dek.ObjectID(a[0].Value))
			}
		}
	}
	sortIDs(ids)
	return slices.Compact(ids), nil
}

// encryptOAEP encrypts to a public half in software.
func encryptOAEP(pub *rsa.PublicKey, h crypto.Hash, plain []byte) ([]byte, error) {
	c, err := rsa.EncryptOAEP(h.New(), rand.Reader, pub, plain, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: encrypt to public key: %w", dek.ErrCorrupt, err)
	}
	return c, nil
}

func randomNonce() []byte {
	nonce := make([]byte, gcmNonce)
	rand.Read(nonce)
	return nonce
}
