package dek

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"fmt"
	"runtime"
	"sync/atomic"
)

// sealFormat is the version of the sealed format and of the Binding encoding.
const sealFormat = 1

// SealOverhead is how many bytes a sealed message is longer than its
// plaintext: format version, 96-bit nonce, 128-bit tag.
const SealOverhead = 1 + gcmOverhead

// gcmOverhead is what NewGCMWithRandomNonce adds: nonce and tag.
const gcmOverhead = 12 + 16

// maxSeals bounds the messages under one key, all purposes together: random
// 96-bit nonces, NIST SP 800-38D §8.3.
const maxSeals = 1 << 32

// sealLabel begins every HKDF info; the purpose's name follows.
const sealLabel = "keyward/seal/v1/"

// Seal encrypts and authenticates plaintext for its place b: AES-256-GCM with
// a random nonce (NIST SP 800-38D) under an HKDF-SHA256 subkey (RFC 5869) of
// b.Purpose. The result is len(plaintext)+SealOverhead bytes. The subkey is
// derived once and stays in locked memory until Destroy.
//
// Seal wraps ErrInvalid for an unknown purpose, ErrDestroyed after Destroy and
// ErrExhausted after 2^32 seals or when no memory can be locked. The count is
// per Key value: an owner that outlives the process persists Seals.
func (k *Key) Seal(b Binding, plaintext []byte) ([]byte, error) {
	aad, err := b.Canonical()
	if err != nil {
		return nil, err
	}
	out := make([]byte, 1, SealOverhead+len(plaintext))
	out[0] = sealFormat
	return k.seal(out, b.Purpose, aad, plaintext)
}

// Open returns the plaintext of what Seal made for the same place under the
// same key. It returns ErrAuth and no bytes for everything else, whatever the
// cause; it wraps ErrInvalid only for a binding that no Seal accepts, and
// ErrDestroyed after Destroy.
func (k *Key) Open(b Binding, sealed []byte) ([]byte, error) {
	aad, err := b.Canonical()
	if err != nil {
		return nil, err
	}
	if len(sealed) < SealOverhead || sealed[0] != sealFormat {
		return nil, ErrAuth
	}
	return k.open(b.Purpose, aad, sealed[1:])
}

// Seals returns how many messages this Key has sealed since it was made.
func (k *Key) Seals() uint64 { return k.seals.Load() }

// seal appends nonce, ciphertext and tag to dst.
func (k *Key) seal(dst []byte, p Purpose, aad, plaintext []byte) ([]byte, error) {
	if !k.acquire() {
		return nil, ErrDestroyed
	}
	defer k.release()
	if k.seals.Add(1) > maxSeals {
		k.seals.Store(maxSeals)
		return nil, fmt.Errorf("%w: this key has sealed %d messages; roll it", ErrExhausted, uint64(maxSeals))
	}
	aead, err := k.aead(p)
	if err != nil {
		return nil, err
	}
	return aead.Seal(dst, nil, plaintext, aad), nil
}

// open returns the plaintext of nonce, ciphertext and tag.
func (k *Key) open(p Purpose, aad, sealed []byte) ([]byte, error) {
	if !k.acquire() {
		return nil, ErrDestroyed
	}
	defer k.release()
	aead, err := k.aead(p)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nil, sealed, aad)
	if err != nil {
		return nil, ErrAuth
	}
	return plaintext, nil
}

// aead returns the cipher of purpose p; the key is acquired.
func (k *Key) aead(p Purpose) (cipher.AEAD, error) {
	sub, err := k.subkey(p)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(sub[:])
	if err != nil {
		return nil, fmt.Errorf("seal cipher: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("seal cipher: %w", err)
	}
	return aead, nil
}

// subkeys are the derived keys of one Key, in the arena like itself. Most keys
// never seal and have none.
type subkeys [purposeEnd]atomic.Pointer[slot]

// subkey returns the subkey of purpose p, deriving it once; the key is
// acquired, so that wipe can't run meanwhile.
func (k *Key) subkey(p Purpose) (*slot, error) {
	subs := k.subkeys.Load()
	if subs == nil {
		subs = new(subkeys)
		if k.subkeys.CompareAndSwap(nil, subs) {
			runtime.AddCleanup(k, (*subkeys).wipe, subs) // for a forgotten Destroy
		} else {
			subs = k.subkeys.Load()
		}
	}
	if s := subs[p].Load(); s != nil {
		return s, nil
	}
	derived, err := hkdf.Key(sha256.New, k.slot()[:], nil, sealLabel+p.String(), KeySize)
	if err != nil {
		return nil, fmt.Errorf("derive subkey: %w", err)
	}
	defer clear(derived)
	s, err := keys.get()
	if err != nil {
		return nil, fmt.Errorf("derive subkey: %w", err)
	}
	copy(s[:], derived)
	if !subs[p].CompareAndSwap(nil, s) {
		keys.put(s) // another caller was faster
	}
	return subs[p].Load(), nil
}

// wipe returns the subkeys to the arena, each once; no use is running.
func (subs *subkeys) wipe() {
	for i := range subs {
		if s := subs[i].Swap(nil); s != nil {
			keys.put(s)
		}
	}
}
