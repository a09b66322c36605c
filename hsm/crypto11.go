package hsm

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"runtime"

	"github.com/ThalesIgnite/crypto11"
	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// maker wraps crypto11 v1.2.5, which initialises the module, makes keys and
// reads public halves. What is known to be wrong with it is dealt with here:
//
//   - it panics on device errors in places (AEAD.Seal): guard recovers, and only
//     what crypto11 throws;
//   - it keeps the PIN as a string and prints it under %v: it never gets the PIN;
//     it is told that the token has no login, and cryptoki.login does it;
//   - a failed Configure finalises the module for everyone: there is one call
//     per process, and its failure ends the process;
//   - sessions that failed go back to its pool (CKR_OPERATION_ACTIVE for ever):
//     any device error ends the child, and with it the pool;
//   - FindKeyPair returns nil, nil for nothing, and the first of several:
//     objects are counted with miekg's binding before it is asked;
//   - its key templates allow signing with decryption keys and omit
//     CKA_PRIVATE: every attribute is ordered here.
type maker struct {
	ctx *crypto11.Context
}

// makerSessions: one is kept by crypto11, two are for the one admin worker.
const makerSessions = 3

// openMaker initialises the module, and opens sessions on the token that u
// names first; whether it is the right one is checked afterwards.
func openMaker(module string, u tokenURI) (maker, error) {
	cfg := &crypto11.Config{Path: module, MaxSessions: makerSessions, LoginNotSupported: true}
	switch {
	case u.slot >= 0:
		cfg.SlotNumber = &u.slot
	case u.serial != "":
		cfg.TokenSerial = u.serial
	default:
		cfg.TokenLabel = u.label
	}
	var ctx *crypto11.Context
	err := guard(func() (err error) {
		ctx, err = crypto11.Configure(cfg)
		return err
	})
	if err != nil {
		return maker{}, fmt.Errorf("%w: token %s through %s: %w", dek.ErrUnavailable, u, module, err)
	}
	return maker{ctx}, nil
}

// guard runs one call of crypto11 and turns its panics into errors.
func guard(f func() error) (err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case runtime.Error:
			panic(r)
		case error:
			err = fmt.Errorf("crypto11 panicked: %w", r)
		default:
			panic(r)
		}
	}()
	return f()
}

// keyAttributes are the attributes that both halves of every key share.
func keyAttributes(kind objectKind, id dek.ObjectID, more map[uint]any) (crypto11.AttributeSet, error) {
	a := crypto11.NewAttributeSet()
	all := map[uint]any{
		pkcs11.CKA_TOKEN: true,
		pkcs11.CKA_ID:    id[:],
		pkcs11.CKA_LABEL: kind.label(),
	}
	for k, v := range more {
		all[k] = v
	}
	for k, v := range all {
		if err := a.Set(k, v); err != nil {
			return nil, fmt.Errorf("%w: attribute %#x: %w", dek.ErrInvalid, k, err)
		}
	}
	return a, nil
}

// privateAttributes: in the token, behind the PIN, never out, for one use.
func privateAttributes(kind objectKind, id dek.ObjectID) (crypto11.AttributeSet, error) {
	decrypts := kind.decrypts()
	return keyAttributes(kind, id, map[uint]any{
		pkcs11.CKA_PRIVATE:     true,
		pkcs11.CKA_SENSITIVE:   true,
		pkcs11.CKA_EXTRACTABLE: false,
		pkcs11.CKA_DECRYPT:     decrypts,
		pkcs11.CKA_SIGN:        !decrypts,
		pkcs11.CKA_UNWRAP:      false,
	})
}

func publicAttributes(kind objectKind, id dek.ObjectID) (crypto11.AttributeSet, error) {
	decrypts := kind.decrypts()
	return keyAttributes(kind, id, map[uint]any{
		pkcs11.CKA_PRIVATE: false,
		pkcs11.CKA_ENCRYPT: decrypts,
		pkcs11.CKA_VERIFY:  !decrypts,
		pkcs11.CKA_WRAP:    false,
	})
}

// generateRSA makes a pair for the one use of its kind.
func (m maker) generateRSA(kind objectKind, id dek.ObjectID, bits int) (*rsa.PublicKey, error) {
	public, err := publicAttributes(kind, id)
	if err != nil {
		return nil, err
	}
	private, err := privateAttributes(kind, id)
	if err != nil {
		return nil, err
	}
	var key crypto11.SignerDecrypter
	err = guard(func() (err error) {
		key, err = m.ctx.GenerateRSAKeyPairWithAttributes(public, private, bits)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate RSA-%d: %w", bits, err)
	}
	return rsaPublic(key.Public())
}

// generateEC makes an ECDSA P-256 pair that only signs.
func (m maker) generateEC(kind objectKind, id dek.ObjectID) (crypto.PublicKey, error) {
	public, err := publicAttributes(kind, id)
	if err != nil {
		return nil, err
	}
	private, err := privateAttributes(kind, id)
	if err != nil {
		return nil, err
	}
	var key crypto11.Signer
	err = guard(func() (err error) {
		key, err = m.ctx.GenerateECDSAKeyPairWithAttributes(public, private, elliptic.P256())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("generate P-256: %w", err)
	}
	return key.Public(), nil
}

// generateAES makes an AES-256 key that only encrypts and decrypts.
func (m maker) generateAES(kind objectKind, id dek.ObjectID) error {
	a, err := keyAttributes(kind, id, map[uint]any{
		pkcs11.CKA_PRIVATE:     true,
		pkcs11.CKA_SENSITIVE:   true,
		pkcs11.CKA_EXTRACTABLE: false,
		pkcs11.CKA_ENCRYPT:     true,
		pkcs11.CKA_DECRYPT:     true,
		pkcs11.CKA_SIGN:        false,
		pkcs11.CKA_VERIFY:      false,
		pkcs11.CKA_WRAP:        false,
		pkcs11.CKA_UNWRAP:      false,
	})
	if err != nil {
		return err
	}
	err = guard(func() error {
		_, err := m.ctx.GenerateSecretKeyWithAttributes(a, 256, crypto11.CipherAES)
		return err
	})
	if err != nil {
		return fmt.Errorf("generate AES-256: %w", err)
	}
	return nil
}

// public reads the public half of the one pair with kind and id, which the
// caller has counted.
func (m maker) public(kind objectKind, id dek.ObjectID) (crypto.PublicKey, error) {
	a, err := keyAttributes(kind, id, nil)
	if err != nil {
		return nil, err
	}
	var keys []crypto11.Signer
	err = guard(func() (err error) {
		keys, err = m.ctx.FindKeyPairsWithAttributes(a)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	if len(keys) != 1 || keys[0] == nil {
		return nil, fmt.Errorf("%w: %d pairs for %s key %x", dek.ErrCorrupt, len(keys), kind, id)
	}
	return keys[0].Public(), nil
}

// close finalises the module.
func (m maker) close() error {
	return guard(func() error { return m.ctx.Close() })
}

// rvOf returns the PKCS#11 code in err, if any. crypto11 wraps with pkg/errors
// (which unwraps by Cause) or loses the code.
func rvOf(err error) (pkcs11.Error, bool) {
	var rv pkcs11.Error
	if errors.As(err, &rv) {
		return rv, true
	}
	for err != nil {
		if e, ok := err.(pkcs11.Error); ok {
			return e, true
		}
		switch e := err.(type) {
		case interface{ Cause() error }:
			err = e.Cause()
		default:
			err = errors.Unwrap(err)
		}
	}
	return 0, false
}
