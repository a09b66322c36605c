package hsm

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/keyward/keyward/dek"
)

// Identity returns the pinned identity: it never changes while the Token is
// open, whatever lies in the slot.
func (t *Token) Identity() Identity { return t.pinned }

// Capabilities returns what the token could do when its child was started last.
func (t *Token) Capabilities() Capabilities {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.caps
}

// call makes one call to the child. A call whose answer is that the context is
// lost is made once more on the next child if it changes nothing.
func (t *Token) call(ctx context.Context, op byte, body []byte) (*call, error) {
	limit := t.cfg.Deadline
	if op == opGenerate {
		limit = t.cfg.GenerateDeadline
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: token: %w", dek.ErrUnavailable, context.Cause(ctx))
	}
	for attempt := 0; ; attempt++ {
		l, err := t.current(ctx)
		if err != nil {
			return nil, err
		}
		c, err := l.do(ctx, op, limit, body)
		if err == nil {
			return c, nil
		}
		if attempt > 0 || op == opGenerate || op == opDestroy || !errors.Is(err, errRebuild) {
			return nil, err
		}
	}
}

// GeneratePair makes master key id: RSA of 2048, 3072 or 4096 bits that only
// decrypts, private, sensitive, never extractable. One at a time. It wraps
// ErrExists if any object has that id, ErrInvalid for other sizes or a zero
// id, ErrPrecondition for a size the token can't make. After ErrUnavailable the
// token may hold the pair, half of it, or nothing: FindPair tells.
func (t *Token) GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error) {
	if err := errors.Join(checkBits(bits), checkID(id)); err != nil {
		return nil, err
	}
	pub, err := t.generate(ctx, kindMaster, id, bits)
	if err != nil {
		return nil, err
	}
	return rsaPublic(pub)
}

func (t *Token) generate(ctx context.Context, kind objectKind, id dek.ObjectID, bits int) (crypto.PublicKey, error) {
	body := binary.BigEndian.AppendUint16([]byte{byte(kind)}, uint16(bits))
	c, err := t.call(ctx, opGenerate, append(body, id[:]...))
	if err != nil || kind == kindRoot {
		return nil, err
	}
	return parseSPKI(c.body)
}

// FindPair returns the public half of master key id if the token holds exactly
// one private and one public half, with the attributes that GeneratePair
// orders, and a self-test works. It wraps ErrNotFound if there is neither half,
// ErrCorrupt if there are halves, duplicates or wrong attributes.
func (t *Token) FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error) {
	pub, err := t.find(ctx, kindMaster, id)
	if err != nil {
		return nil, err
	}
	return rsaPublic(pub)
}

func (t *Token) find(ctx context.Context, kind objectKind, id dek.ObjectID) (crypto.PublicKey, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	c, err := t.call(ctx, opFind, append([]byte{byte(kind)}, id[:]...))
	if err != nil {
		return nil, err
	}
	return parseSPKI(c.body)
}

// parseSPKI reads a public key of the child.
func parseSPKI(der []byte) (crypto.PublicKey, error) {
	pub, err := x509.ParsePKIXPublicKey(der)
	if err != nil || sigAlgorithm(pub) == 0 {
		return nil, fmt.Errorf("%w: public key in the token: %w", dek.ErrCorrupt, errors.Join(errShort, err))
	}
	return pub, nil
}

// DestroyPair destroys every Keyward object with the id (halves of pairs,
// signers, roots), never the identity pair, and proves by a fresh search that
// none is left. It returns nil if there was none. It may be repeated after
// ErrUnavailable.
func (t *Token) DestroyPair(ctx context.Context, id dek.ObjectID) error {
	if err := checkID(id); err != nil {
		return err
	}
	_, err := t.call(ctx, opDestroy, id[:])
	return err
}

// Objects returns the ids of all master keys, signers and roots in the token,
// halves included, sorted.
func (t *Token) Objects(ctx context.Context) ([]dek.ObjectID, error) {
	c, err := t.call(ctx, opObjects, nil)
	if err != nil {
		return nil, err
	}
	if len(c.body)%16 != 0 {
		return nil, fmt.Errorf("%w: token child: %w list", dek.ErrUnavailable, errShort)
	}
	var ids []dek.ObjectID
	for b := c.body; len(b) > 0; b = b[16:] {
		ids = append(ids, dek.ObjectID(b))
	}
	return ids, nil
}

// DecryptKey decrypts one RSA-OAEP ciphertext (empty label, hash h for label
// and MGF1, RFC 8017 §7.1) to a 32-byte key, which the caller destroys. It
// wraps ErrAuth for every kind of bad ciphertext, after the device has proved
// by a probe that it is well; ErrUnavailable if it is not; ErrNotFound if
// there is no master key id; ErrPrecondition if the token can't do h.
func (t *Token) DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error) {
	if err := errors.Join(checkHash(h), checkID(id)); err != nil {
		return nil, err
	}
	if len(inner) == 0 || len(inner) > maxInner {
		return nil, errCiphertext()
	}
	var store [16 + 1 + maxInner]byte
	body := append(append(append(store[:0], id[:]...), hashCode(h)), inner...)
	c, err := t.call(ctx, opDecrypt, body)
	if err != nil {
		return nil, err
	}
	return c.key, nil
}

// maxInner is the size of an RSA-4096 ciphertext in bytes.
const maxInner = 512

// GenerateSigner makes signer id, ECDSA P-256 or, on tokens without EC,
// RSA-3072, that only signs. Errors as GeneratePair.
func (t *Token) GenerateSigner(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	return t.generate(ctx, kindSigner, id, 0)
}

// SignerPublic returns the public half of signer id (*ecdsa.PublicKey or
// *rsa.PublicKey) after the same checks as FindPair.
func (t *Token) SignerPublic(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	return t.find(ctx, kindSigner, id)
}

// Sign signs a SHA-256 digest with signer id: ECDSA as ASN.1, RSA as PKCS #1
// v1.5; the type of SignerPublic tells which. It wraps ErrInvalid for other
// digest sizes, ErrNotFound if there is no such signer.
func (t *Token) Sign(ctx context.Context, id dek.ObjectID, digest []byte) ([]byte, error) {
	if err := errors.Join(checkDigest(digest), checkID(id)); err != nil {
		return nil, err
	}
	c, err := t.call(ctx, opSign, append(id[:], digest...))
	if err != nil {
		return nil, err
	}
	return c.body, nil
}

// GenerateRoot makes root id: AES-256, or without AES-GCM in the token an
// RSA-3072 pair and a signer beside it. Errors as GeneratePair.
func (t *Token) GenerateRoot(ctx context.Context, id dek.ObjectID) error {
	if err := checkID(id); err != nil {
		return err
	}
	_, err := t.generate(ctx, kindRoot, id, 0)
	return err
}

// maxPlace bounds the canonical form of a binding that a token seals for.
const maxPlace = 4096

// SealKey seals k for the place b under root, inside the token (FORMAT.md). The
// result is at most 2048 bytes. It wraps ErrNotFound if there is no such root,
// ErrInvalid if b has no purpose or more than 4 KB of names. Nonces are random:
// a root is for seal keys, of which there are far fewer than 2^32 (NIST SP
// 800-38D §8.3), and is not counted.
func (t *Token) SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error) {
	place, err := place(root, b)
	if err != nil {
		return nil, err
	}
	body := make([]byte, 0, 16+2+len(place)+dek.KeySize) // one allocation, wiped below
	body = appendBytes16(append(body, root[:]...), place)
	defer func() { clear(body[:cap(body)]) }()
	if err := k.Use(func(plain []byte) error {
		body = append(body, plain...)
		return nil
	}); err != nil {
		return nil, err
	}
	c, err := t.call(ctx, opSeal, body)
	if err != nil {
		return nil, err
	}
	return c.body, nil
}

// OpenKey opens what SealKey sealed under root for the same b; the caller
// destroys the key. It wraps ErrAuth, with no hint why, for anything else.
func (t *Token) OpenKey(ctx context.Context, root dek.ObjectID, b dek.Binding, sealed []byte) (*dek.Key, error) {
	place, err := place(root, b)
	if err != nil {
		return nil, err
	}
	if len(sealed) > maxSealed {
		return nil, errSealed()
	}
	body := appendBytes16(appendBytes16(append([]byte(nil), root[:]...), place), sealed)
	c, err := t.call(ctx, opOpen, body)
	if err != nil {
		return nil, err
	}
	return c.key, nil
}

// place returns the canonical form of b, or why it can't be sealed for.
func place(root dek.ObjectID, b dek.Binding) ([]byte, error) {
	if err := checkID(root); err != nil {
		return nil, err
	}
	p, err := b.Canonical()
	if err != nil {
		return nil, err
	}
	if len(p) > maxPlace {
		return nil, fmt.Errorf("%w: binding of %d bytes: at most %d", dek.ErrInvalid, len(p), maxPlace)
	}
	return p, nil
}

// Health has the token decrypt a known ciphertext under its identity pair: that
// alone decides whether it is well, never the outcome of a caller's input. It
// wraps ErrUnavailable or ErrPrecondition (wrong PIN, another token).
func (t *Token) Health(ctx context.Context) error {
	_, err := t.call(ctx, opHealth, nil)
	return err
}
