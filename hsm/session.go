package hsm

import (
	"crypto"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// A session is one worker's PKCS#11 session with its own output buffer. It is
// used by one goroutine. After any error it is thrown away and opened anew: a
// failed operation can leave it in CKR_OPERATION_ACTIVE for ever.
type session struct {
	d    *device
	h    pkcs11.SessionHandle
	live bool
	out  [1024]byte // an RSA-8192 modulus, or any other result of ours
}

func (d *device) newSession() (*session, error) {
	s := &session{d: d}
	return s, s.renew()
}

// renew closes the session, whatever its state, and opens another.
func (s *session) renew() error {
	s.close()
	h, err := s.d.p11.OpenSession(s.d.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	s.h, s.live = h, true
	return nil
}

// close also wipes the output buffer. The error of C_CloseSession is of no use:
// the session is gone or was gone.
func (s *session) close() {
	clear(s.out[:])
	if s.live {
		s.live = false
		_ = s.d.p11.CloseSession(s.h)
	}
}

// find returns the handles of all objects with the attributes.
func (s *session) find(a ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := s.d.p11.FindObjectsInit(s.h, a); err != nil {
		return nil, err
	}
	var all []pkcs11.ObjectHandle
	for {
		some, _, err := s.d.p11.FindObjects(s.h, 256)
		if err != nil {
			_ = s.d.p11.FindObjectsFinal(s.h)
			return nil, err
		}
		if len(some) == 0 {
			return all, s.d.p11.FindObjectsFinal(s.h)
		}
		all = append(all, some...)
	}
}

// probe decrypts the known ciphertext: the one judge of the device's health,
// and a proof that it is still the pinned token.
func (s *session) probe() error {
	p := &s.d.probe
	n, err := s.d.raw.decrypt(s.h, p.pair.handle, p.hash, p.ciphertext, s.out[:])
	defer clear(s.out[:])
	if err != nil {
		return err
	}
	if !p.good(s.out[:n]) {
		return fmt.Errorf("%w: another token answers", dek.ErrPrecondition)
	}
	return nil
}

// errWell marks failures of an operation on a device that passed the probe.
var errWell = errors.New("device is well")

// judge says what an operation that failed although its input was in order
// means: one object is at fault if the probe works, else the whole context.
func (s *session) judge(what string, err error) error {
	if s.renew() == nil && s.probe() == nil {
		return fmt.Errorf("%w: %w: %s: %w", dek.ErrUnavailable, errWell, what, err)
	}
	return fmt.Errorf("%w: %w: %s: %w", dek.ErrUnavailable, errRebuild, what, err)
}

// attempts bounds the tries of one operation. A device that is flaky must not
// make us tell a caller, finally, that good data is bad.
const attempts = 3

// retry runs op with a kept handle and, while that fails, again with a fresh
// session and handle. That is safe: op signs, seals or opens, nothing is spent.
func (s *session) retry(what string, kind objectKind, id dek.ObjectID, op func(object) error) error {
	var last error
	for attempt := range attempts {
		if attempt > 0 {
			if err := s.renew(); err != nil {
				return s.judge(what, err)
			}
			s.d.forget(kind, id)
		}
		o, err := s.d.lookUp(s, kind, id)
		if err != nil {
			return err
		}
		if last = op(o); last == nil {
			return nil
		}
	}
	return s.judge(what, last)
}

// health probes, once more on a fresh session if need be.
func (s *session) health() error {
	err := s.probe()
	if err == nil || errors.Is(err, dek.ErrPrecondition) {
		return err
	}
	if err := s.renew(); err != nil {
		return s.judge("open session", err)
	}
	if err := s.probe(); err != nil {
		return fmt.Errorf("%w: %w: probe: %w", dek.ErrUnavailable, errRebuild, err)
	}
	return nil
}

// decryptMaster is decrypt for callers: hashes that the token can't do are
// told from bad ciphertexts.
func (s *session) decryptMaster(id dek.ObjectID, h crypto.Hash, inner []byte) ([]byte, error) {
	if !slices.Contains(s.d.caps.OAEP, h) {
		return nil, fmt.Errorf("%w: this token can't decrypt RSA-OAEP with %v; rewrap with %v where it can", dek.ErrPrecondition, h, s.d.caps.PreferredOAEP())
	}
	return s.decrypt(kindMaster, id, h, inner)
}

// decrypt returns the 32 bytes in the session's buffer; the caller wipes them.
// Every way of being bad takes the same path: all attempts, a fresh session
// for each, then the probe.
func (s *session) decrypt(kind objectKind, id dek.ObjectID, h crypto.Hash, inner []byte) ([]byte, error) {
	o, err := s.d.lookUp(s, kind, id)
	if err != nil {
		return nil, err
	}
	var last error
	for attempt := range attempts {
		if attempt > 0 {
			if err := s.renew(); err != nil {
				return nil, s.judge("open session", err)
			}
			if staleHandle(last) {
				s.d.forget(kind, id)
				if o, err = s.d.lookUp(s, kind, id); err != nil {
					return nil, err
				}
			}
		}
		if o.rsaBytes != len(inner) {
			return nil, errCiphertext() // public knowledge: the key's size
		}
		n, err := s.d.raw.decrypt(s.h, o.handle, h, inner, s.out[:])
		if err == nil && n == dek.KeySize {
			return s.out[:n], nil
		}
		last = err
	}
	if last == nil {
		last = errShort // decrypted, but not to a key
	}
	if err := s.judge("decrypt", last); !errors.Is(err, errWell) || deviceFault(last) {
		return nil, err
	}
	return nil, errCiphertext()
}

// signWith signs a SHA-256 digest in the form of the algorithm.
func (s *session) signWith(o object, alg byte, digest []byte) ([]byte, error) {
	if alg == sigRSA {
		// DigestInfo of SHA-256, RFC 8017 §9.2 note 1: CKM_RSA_PKCS is everywhere.
		prefix := []byte{0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20}
		n, err := s.d.raw.sign(s.h, o.handle, pkcs11.CKM_RSA_PKCS, append(prefix, digest...), s.out[:])
		return append([]byte(nil), s.out[:n]...), err
	}
	n, err := s.d.raw.sign(s.h, o.handle, pkcs11.CKM_ECDSA, digest, s.out[:])
	if err != nil {
		return nil, err
	}
	if n == 0 || n%2 != 0 {
		return nil, fmt.Errorf("%w signature of %d bytes", errShort, n)
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(s.out[:n/2]), new(big.Int).SetBytes(s.out[n/2 : n])})
}

// sign signs with a signer or seal signer.
func (s *session) sign(kind objectKind, id dek.ObjectID, digest []byte) (sig []byte, alg byte, err error) {
	err = s.retry("sign", kind, id, func(o object) (err error) {
		alg = sigECDSA
		if o.rsaBytes > 0 {
			alg = sigRSA
		}
		sig, err = s.signWith(o, alg, digest)
		return err
	})
	return sig, alg, err
}

// seal seals plain for a place under the root.
func (s *session) seal(root dek.ObjectID, place, plain []byte) ([]byte, error) {
	o, err := s.d.lookUp(s, kindRoot, root)
	if err != nil {
		return nil, err
	}
	if o.rsaBytes > 0 {
		return s.sealRSA(root, place, plain)
	}
	header := sealHeader(algTokenGCM, root)
	nonce := randomNonce()
	m := gcmMessage{nonce: nonce, aad: append(header, place...), text: plain}
	sealed := append(header[:sealedHeader:sealedHeader], nonce...)
	err = s.retry("seal", kindRoot, root, func(o object) error {
		n, err := s.d.raw.gcm(s.h, o.handle, true, m, s.out[:])
		if err == nil && n != len(plain)+gcmTag {
			err = fmt.Errorf("%w: sealed key of %d bytes", errShort, n)
		}
		if err == nil {
			sealed = append(sealed, s.out[:n]...)
		}
		return err
	})
	return sealed, err
}

// open returns the 32 bytes in the session's buffer; the caller wipes them.
func (s *session) open(root dek.ObjectID, place, sealed []byte) ([]byte, error) {
	alg, header, payload, err := splitSealed(root, sealed)
	if err != nil {
		return nil, err
	}
	switch {
	case alg == algTokenRSA:
		return s.openRSA(root, header, payload, place)
	case alg != algTokenGCM || len(payload) != gcmNonce+dek.KeySize+gcmTag:
		return nil, errSealed()
	}
	m := gcmMessage{nonce: payload[:gcmNonce], aad: append(append([]byte(nil), header...), place...), text: payload[gcmNonce:]}
	var plain []byte
	err = s.retry("open", kindRoot, root, func(o object) error {
		if o.rsaBytes > 0 {
			return errShort
		}
		n, err := s.d.raw.gcm(s.h, o.handle, false, m, s.out[:])
		if err == nil && n != dek.KeySize {
			err = errShort
		}
		plain = s.out[:n]
		return err
	})
	if errors.Is(err, errWell) && !deviceFault(err) {
		return nil, errSealed() // the probe has spoken for the device
	}
	return plain, err
}

// sealRSA is the way of tokens without AES: OAEP to the root's public half,
// then a signature by the token over header, place and ciphertext, because
// anyone can encrypt to a public key.
func (s *session) sealRSA(root dek.ObjectID, place, plain []byte) ([]byte, error) {
	pub, err := s.d.public(kindRoot, root)
	if err != nil {
		return nil, err
	}
	rsaPub, err := rsaPublic(pub)
	if err != nil {
		return nil, err
	}
	p := rsaSealed{hash: s.d.caps.PreferredOAEP()}
	if p.ciphertext, err = encryptOAEP(rsaPub, p.hash, plain); err != nil {
		return nil, err
	}
	signer, err := s.d.public(kindSealSigner, sealSignerID(root))
	if err != nil {
		return nil, err
	}
	p.sigAlg = sigAlgorithm(signer)
	header := sealHeader(algTokenRSA, root)
	if p.signature, _, err = s.sign(kindSealSigner, sealSignerID(root), p.digest(header, place)); err != nil {
		return nil, err
	}
	return p.append(header), nil
}

// openRSA checks the signature in software before the token sees anything.
func (s *session) openRSA(root dek.ObjectID, header, payload, place []byte) ([]byte, error) {
	p, err := parseRSASealed(payload)
	if err != nil {
		return nil, err
	}
	signer, err := s.d.public(kindSealSigner, sealSignerID(root))
	if err != nil {
		return nil, err
	}
	if !verify(signer, p.sigAlg, p.digest(header, place), p.signature) {
		return nil, errSealed()
	}
	return s.decrypt(kindRoot, root, p.hash, p.ciphertext)
}

// sealSignerID derives the id of an RSA root's signer, so that no two objects
// of different keys share a CKA_ID.
func sealSignerID(root dek.ObjectID) dek.ObjectID {
	sum := sha256.Sum256(append([]byte("keyward seal signer\x00"), root[:]...))
	return dek.ObjectID(sum[:16])
}
