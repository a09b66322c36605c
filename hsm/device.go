package hsm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// A device is the token as the child has it: one login, kept handles, kept
// identity. Its parts are safe for concurrent use; sessions are not.
type device struct {
	p11   *pkcs11.Ctx
	raw   cryptoki
	maker maker
	slot  uint

	id    Identity
	caps  Capabilities
	probe probe

	mu      sync.RWMutex
	handles map[handleKey]object
	publics map[handleKey]crypto.PublicKey
}

// An handleKey is kind and id: what a handle is kept under.
type handleKey struct {
	kind objectKind
	id   dek.ObjectID
}

// An object is a kept handle, with the modulus size for RSA.
type object struct {
	handle   pkcs11.ObjectHandle
	rsaBytes int // 0: not RSA
}

// A probe is a ciphertext of known content under the identity pair: what
// decides whether the device is well.
type probe struct {
	pair       object
	public     *rsa.PublicKey
	hash       crypto.Hash
	ciphertext []byte
	want       [sha256.Size]byte // hash of the plaintext
}

// openDevice initialises the module, finds the one token, refuses the wrong
// one before it sees the PIN, logs in once, and proves its identity.
func openDevice(ctx context.Context, h hello) (*device, error) {
	u, err := parseURI(h.uri)
	if err != nil {
		return nil, err
	}
	if h.module, err = realModule(h.module); err != nil {
		return nil, err
	}
	d := &device{handles: map[handleKey]object{}, publics: map[handleKey]crypto.PublicKey{}}
	if d.maker, err = openMaker(h.module, u); err != nil {
		return nil, err
	}
	if d.p11 = pkcs11.New(h.module); d.p11 == nil {
		return nil, fmt.Errorf("%w: load PKCS#11 module %s", dek.ErrPrecondition, h.module)
	}
	if d.raw, err = loadCryptoki(h.module); err != nil {
		return nil, err
	}
	info, err := d.selectToken(u)
	if err != nil {
		return nil, err
	}
	expect := h.expect
	expect.Fingerprint = "" // proved below
	if err := expect.matches(d.id); err != nil {
		return nil, err
	}
	s, err := d.newSession()
	if err != nil {
		return nil, classed("open session", err)
	}
	defer s.close()
	if err := d.refuseStranger(s, h.expect.Fingerprint); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	if err := d.login(s, h, info); err != nil {
		return nil, err
	}
	if err := d.prove(s, h.expect); err != nil {
		return nil, err
	}
	d.probeRest(s)
	return d, nil
}

// selectToken finds the one token that matches u. crypto11 took the first with
// the same slot, serial or label; if that may be another, the URI must say more.
func (d *device) selectToken(u tokenURI) (pkcs11.TokenInfo, error) {
	slots, err := d.p11.GetSlotList(true)
	if err != nil {
		return pkcs11.TokenInfo{}, classed("list slots", err)
	}
	var found []pkcs11.TokenInfo
	twins := 0
	for _, slot := range slots {
		info, err := d.p11.GetTokenInfo(slot)
		if err != nil {
			continue // a slot of someone else
		}
		id := Identity{Label: trim(info.Label), Serial: trim(info.SerialNumber), Model: trim(info.Model), Manufacturer: trim(info.ManufacturerID)}
		if u.firstFor(slot, id) {
			twins++
		}
		if !u.matches(slot, id) {
			continue
		}
		if len(found) == 0 {
			d.slot, d.id = slot, id
		}
		found = append(found, info)
	}
	switch {
	case len(found) == 0:
		return pkcs11.TokenInfo{}, fmt.Errorf("%w: no token is %s", dek.ErrUnavailable, u)
	case len(found) > 1 || twins > 1:
		return pkcs11.TokenInfo{}, fmt.Errorf("%w: %d tokens are %s: add serial= or slot-id= to the URI", dek.ErrPrecondition, max(len(found), twins), u)
	}
	info := found[0]
	if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
		return info, fmt.Errorf("%w: the token is not initialised; its keys are gone: never initialise it over a loss, restore", dek.ErrPrecondition)
	}
	return info, nil
}

// trim undoes the blank padding of PKCS#11 strings.
func trim(s string) string { return strings.TrimRight(s, " \x00") }

// refuseStranger looks, before the PIN is used, at the public halves that
// anyone may see: a token with identity pairs, none of them ours, is another.
func (d *device) refuseStranger(s *session, want string) error {
	if want == "" {
		return nil
	}
	publics, err := d.identities(s)
	if err != nil {
		return err
	}
	for _, p := range publics {
		if p.fingerprint == want {
			return nil
		}
	}
	if len(publics) > 0 {
		found := d.id
		found.Fingerprint = publics[0].fingerprint
		return Identity{Fingerprint: want}.matches(found)
	}
	return nil
}

// An identityPublic is the public half of an identity pair.
type identityPublic struct {
	id          dek.ObjectID
	public      *rsa.PublicKey
	fingerprint string
}

// identities returns all public halves of identity pairs, sorted by id.
func (d *device) identities(s *session) ([]identityPublic, error) {
	handles, err := s.find(pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, kindIdentity.label()))
	if err != nil {
		return nil, classed("find identity", err)
	}
	var all []identityPublic
	for _, h := range handles {
		a, err := d.p11.GetAttributeValue(s.h, h, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_ID, nil),
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil),
			pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, nil),
		})
		if err != nil || len(a) != 3 || len(a[0].Value) != 16 || len(a[2].Value) > 4 {
			continue // half-made: no use
		}
		pub := &rsa.PublicKey{N: new(big.Int).SetBytes(a[1].Value), E: int(new(big.Int).SetBytes(a[2].Value).Int64())}
		fp, err := Fingerprint(pub)
		if err != nil || pub.N.BitLen() < 2048 {
			continue
		}
		all = append(all, identityPublic{dek.ObjectID(a[0].Value), pub, fp})
	}
	slices.SortFunc(all, func(a, b identityPublic) int { return slices.Compare(a.id[:], b.id[:]) })
	return all, nil
}

// prove finds (or, if nothing is pinned, makes) the identity pair, has the
// token decrypt a fresh challenge under it, and pins it.
func (d *device) prove(s *session, expect Identity) error {
	publics, err := d.identities(s)
	if err != nil {
		return err
	}
	for _, p := range publics {
		if expect.Fingerprint != "" && p.fingerprint != expect.Fingerprint {
			continue
		}
		pair, err := d.lookUp(s, kindIdentity, p.id)
		if errors.Is(err, dek.ErrNotFound) {
			continue // private half missing: a crash while it was made
		}
		if err != nil {
			return err
		}
		return d.pin(s, p, pair)
	}
	if expect.Fingerprint != "" {
		return expect.matches(d.id)
	}
	var id dek.ObjectID
	rand.Read(id[:])
	pub, err := d.maker.generateRSA(kindIdentity, id, 2048)
	if err != nil {
		return classed("make identity pair", err)
	}
	fp, err := Fingerprint(pub)
	if err != nil {
		return err
	}
	pair, err := d.lookUp(s, kindIdentity, id)
	if err != nil {
		return err
	}
	return d.pin(s, identityPublic{id, pub, fp}, pair)
}

// pin keeps the pair as identity and probe after one challenge per OAEP hash.
func (d *device) pin(s *session, p identityPublic, pair object) error {
	var last error
	for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA1} {
		pr, err := newProbe(pair, p.public, h)
		if err != nil {
			return err
		}
		d.probe = pr
		if last = s.probe(); last != nil {
			if err := s.renew(); err != nil {
				return classed("renew session", err)
			}
			continue
		}
		d.caps.OAEP = append([]crypto.Hash{h}, d.caps.OAEP...)
	}
	if len(d.caps.OAEP) == 0 {
		return fmt.Errorf("%w: the token can't prove that it holds its identity key: %w", dek.ErrPrecondition, last)
	}
	pr, err := newProbe(pair, p.public, d.caps.OAEP[0])
	d.probe, d.id.Fingerprint = pr, p.fingerprint
	return err
}

func newProbe(pair object, pub *rsa.PublicKey, h crypto.Hash) (probe, error) {
	plain := make([]byte, dek.KeySize)
	rand.Read(plain)
	c, err := rsa.EncryptOAEP(h.New(), rand.Reader, pub, plain, nil)
	if err != nil {
		return probe{}, fmt.Errorf("%w: identity key: %w", dek.ErrCorrupt, err)
	}
	return probe{pair: pair, public: pub, hash: h, ciphertext: c, want: sha256.Sum256(plain)}, nil
}

// good reports whether plain is the content of the probe.
func (p probe) good(plain []byte) bool {
	sum := sha256.Sum256(plain)
	return subtle.ConstantTimeCompare(sum[:], p.want[:]) == 1
}

// probeRest tries what the hot path may use. Failures are abilities that the
// token lacks; the session is renewed after each, because a failed operation
// can leave it unusable.
func (d *device) probeRest(s *session) {
	if i, err := d.p11.GetMechanismInfo(d.slot, mechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN)); err == nil {
		for _, bits := range rsaSizes {
			if uint(bits) >= i.MinKeySize && uint(bits) <= i.MaxKeySize {
				d.caps.RSABits = append(d.caps.RSABits, bits)
			}
		}
	}
	d.caps.AESGCM = d.probeGCM(s) == nil
	d.caps.ECDSA = d.probeEC(s) == nil
	// The identity pair is known to have been made in the token.
	local, known, err := s.boolean(d.probe.pair.handle, pkcs11.CKA_LOCAL)
	d.caps.Origin = err == nil && known && local
	// By name, because no call tells: SoftHSM never calls fsync (measured).
	d.caps.Survives = !strings.HasPrefix(d.id.Model, "SoftHSM")
	_ = s.renew() // unused below; a failure shows in the first operation
}

func mechanism(m uint) []*pkcs11.Mechanism {
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)}
}

// probeGCM seals, opens and fails to open a tampered text, with a session key.
func (d *device) probeGCM(s *session) error {
	key, err := d.p11.GenerateKey(s.h, mechanism(pkcs11.CKM_AES_KEY_GEN), []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, dek.KeySize),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
	})
	if err != nil {
		return err
	}
	defer d.p11.DestroyObject(s.h, key)
	m := gcmMessage{nonce: make([]byte, gcmNonce), aad: []byte("probe"), text: make([]byte, dek.KeySize)}
	rand.Read(m.nonce)
	n, err := d.raw.gcm(s.h, key, true, m, s.out[:])
	if err != nil {
		return err
	}
	sealed := slices.Clone(s.out[:n])
	m.text = sealed
	n, err = d.raw.gcm(s.h, key, false, m, s.out[:])
	if err != nil || n != dek.KeySize || len(sealed) != dek.KeySize+gcmTag {
		return errors.Join(errShort, err)
	}
	m.aad = []byte("Probe")
	if _, err = d.raw.gcm(s.h, key, false, m, s.out[:]); err == nil {
		return errShort // ignores the additional data: worse than none
	}
	_ = s.renew()
	return nil
}

// probeEC signs with a session key.
func (d *device) probeEC(s *session) error {
	p256, err := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7})
	if err != nil {
		return err
	}
	pubHandle, priv, err := d.p11.GenerateKeyPair(s.h, mechanism(pkcs11.CKM_EC_KEY_PAIR_GEN), []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, p256),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
	}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
	})
	if err != nil {
		return err
	}
	defer d.p11.DestroyObject(s.h, priv)
	defer d.p11.DestroyObject(s.h, pubHandle)
	a, err := d.p11.GetAttributeValue(s.h, pubHandle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil || len(a) != 1 {
		return errors.Join(errShort, err)
	}
	var point []byte
	if _, err := asn1.Unmarshal(a[0].Value, &point); err != nil {
		point = a[0].Value // some tokens leave the OCTET STRING off
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return err
	}
	digest := sha256.Sum256([]byte("probe"))
	sig, err := s.signWith(object{handle: priv}, sigECDSA, digest[:])
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(pub, digest[:], sig) {
		return errShort
	}
	return nil
}
