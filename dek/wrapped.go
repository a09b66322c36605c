package dek

import (
	"bytes"
	"crypto"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // OAEP hash of tokens that know no other
	_ "crypto/sha256"
	"encoding/binary"
	"fmt"
)

// MaxWrapped is the largest wrapped DEK in bytes. RSA-4096 with an AES root
// takes about 700.
const MaxWrapped = 4096

const (
	wrappedMagic  = "KWDK"
	wrappedFormat = 1
	// prefixBytes are magic, format version and header length.
	prefixBytes = len(wrappedMagic) + 1 + 2
	// maxInner bounds the inner layer: RSA-8192.
	maxInner = 1024
)

// A Header says which key a wrapped DEK is and what opens it. All of it is
// authenticated by the outer layer: until Inner has succeeded it is a claim.
type Header struct {
	KeyID                     // the DEK itself
	Master        MasterID    // master key version of the inner layer
	Object        ObjectID    // that version's object in the token
	Hash          crypto.Hash // of the OAEP: crypto.SHA256, or crypto.SHA1 where a token has no other
	SealVersion   Version     // version of the seal key of KeyID.Vault
	SealedSealKey []byte      // that seal key under the root; 1 to 2,048 bytes
}

// maxSealedSealKey keeps a whole wrapped DEK inside MaxWrapped.
const maxSealedSealKey = 2048

// check wraps ErrInvalid around the first field that can't be encoded.
func (h Header) check() error {
	names := []struct{ field, value string }{
		{"vault", h.Vault}, {"keyring", h.Keyring}, {"master key vault", h.Master.Vault}, {"master key", h.Master.Key},
	}
	for _, n := range names {
		if err := CheckName(n.field, n.value); err != nil {
			return err
		}
	}
	if h.Version == 0 || h.Master.Version == 0 || h.SealVersion == 0 {
		return fmt.Errorf("%w: version 0 of DEK, master key or seal key", ErrInvalid)
	}
	if h.Hash != crypto.SHA1 && h.Hash != crypto.SHA256 {
		return fmt.Errorf("%w: OAEP hash %v: use SHA-1 or SHA-256", ErrInvalid, h.Hash)
	}
	if n := len(h.SealedSealKey); n == 0 || n > maxSealedSealKey {
		return fmt.Errorf("%w: sealed seal key of %d bytes: 1 to %d fit", ErrInvalid, n, maxSealedSealKey)
	}
	return nil
}

// A Wrapped is one wrapped DEK (FORMAT.md, "Wrapped DEK"): it may be stored
// anywhere. It is immutable and safe for concurrent use; two are the same if
// their Bytes are. The zero Wrapped names nothing and opens never.
type Wrapped struct {
	raw    []byte
	header Header
	outer  int // where the outer layer starts in raw; aad is all before its length
}

// Wrap puts the outer layer around inner, the RSA-OAEP ciphertext of the DEK
// under h.Master (see EncryptToMaster), with the vault's seal key. Nothing it
// is given is kept. It wraps ErrInvalid for a header or inner layer that does
// not fit the format; other errors are those of Key.Seal.
func Wrap(h Header, seal *Key, inner []byte) (Wrapped, error) {
	if err := h.check(); err != nil {
		return Wrapped{}, fmt.Errorf("wrap: %w", err)
	}
	if len(inner) == 0 || len(inner) > maxInner {
		return Wrapped{}, fmt.Errorf("wrap: %w: inner layer of %d bytes: 1 to %d fit", ErrInvalid, len(inner), maxInner)
	}
	h.SealedSealKey = bytes.Clone(h.SealedSealKey)
	aad := h.encode()
	raw := binary.BigEndian.AppendUint16(bytes.Clone(aad), uint16(gcmOverhead+len(inner)))
	outer := len(raw)
	raw, err := seal.seal(raw, PurposeDEK, aad, inner)
	if err != nil {
		return Wrapped{}, fmt.Errorf("wrap: %w", err)
	}
	return Wrapped{raw: raw, header: h, outer: outer}, nil
}

// Inner checks the outer layer with the vault's seal key and returns the inner
// one: from then on the header is proven. It returns ErrAuth for a wrapped DEK
// of another installation, one whose header was changed, and any damage;
// ErrDestroyed if seal is destroyed.
func (w Wrapped) Inner(seal *Key) ([]byte, error) {
	if w.raw == nil {
		return nil, ErrAuth
	}
	return seal.open(PurposeDEK, w.raw[:w.outer-2], w.raw[w.outer:])
}

// Header returns the header: a claim until Inner has succeeded.
func (w Wrapped) Header() Header {
	h := w.header
	h.SealedSealKey = bytes.Clone(h.SealedSealKey)
	return h
}

// Bytes returns the encoding; ParseWrapped of it gives w again.
func (w Wrapped) Bytes() []byte { return bytes.Clone(w.raw) }

// ID names the DEK: a claim until Inner has succeeded.
func (w Wrapped) ID() KeyID { return w.header.KeyID }

// encode returns magic, format version, header length and header: what the
// outer layer authenticates. The header has been checked.
func (h Header) encode() []byte {
	b := make([]byte, prefixBytes, 512+len(h.SealedSealKey))
	copy(b, wrappedMagic)
	b[len(wrappedMagic)] = wrappedFormat
	b = append(b, hashCode(h.Hash))
	b = binary.BigEndian.AppendUint32(b, uint32(h.Version))
	b = binary.BigEndian.AppendUint32(b, uint32(h.Master.Version))
	b = binary.BigEndian.AppendUint32(b, uint32(h.SealVersion))
	b = append(b, h.Object[:]...)
	for _, s := range []string{h.Vault, h.Keyring, h.Master.Vault, h.Master.Key} {
		b = append(b, byte(len(s)))
		b = append(b, s...)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(len(h.SealedSealKey)))
	b = append(b, h.SealedSealKey...)
	binary.BigEndian.PutUint16(b[prefixBytes-2:], uint16(len(b)-prefixBytes))
	return b
}

// The OAEP hash codes of the format.
const (
	hashSHA1   = 1
	hashSHA256 = 2
)

func hashCode(h crypto.Hash) byte {
	if h == crypto.SHA1 {
		return hashSHA1
	}
	return hashSHA256
}

// EncryptToMaster makes the inner layer: RSA-OAEP (RFC 8017 §7.1) with hash h
// for label and MGF1 and an empty label, in software. The result is as long as
// the modulus. It wraps ErrInvalid for a key under 2048 or over 4096 bits or
// another hash than SHA-1 and SHA-256, ErrPrecondition for SHA-1 where FIPS
// 140-3 mode forbids it, and ErrDestroyed if k is destroyed.
func EncryptToMaster(pub *rsa.PublicKey, h crypto.Hash, k *Key) ([]byte, error) {
	if pub == nil || pub.N == nil || pub.N.BitLen() < 2048 || pub.N.BitLen() > 4096 {
		return nil, fmt.Errorf("encrypt to master key: %w: RSA of 2048 to 4096 bits needed", ErrInvalid)
	}
	if h != crypto.SHA1 && h != crypto.SHA256 {
		return nil, fmt.Errorf("encrypt to master key: %w: OAEP hash %v: use SHA-1 or SHA-256", ErrInvalid, h)
	}
	if h == crypto.SHA1 && fips140.Enforced() {
		return nil, fmt.Errorf("encrypt to master key: %w: FIPS 140-3 mode forbids SHA-1; use a token with SHA-256 OAEP", ErrPrecondition)
	}
	var out []byte
	err := k.Use(func(b []byte) (err error) {
		out, err = rsa.EncryptOAEP(h.New(), rand.Reader, pub, b, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("encrypt to master key: %w", err)
	}
	return out, nil
}
