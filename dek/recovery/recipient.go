// Package recovery lets the people who own the data get their keys back
// without the token that held the master keys. A Recipient is a public key to
// which copies of keys are sealed; its private half exists only as shares, of
// which m of n together open the copies and fewer say nothing at all.
//
// The key pair is the HPKE (RFC 9180) hybrid of ML-KEM-1024 and ECDH P-384
// (draft-ietf-hpke-pq), so that copies stored today stay closed if either of
// the two falls. FORMAT.md of package dek describes every byte.
//
// HPKE in base mode proves nothing about the sender: anybody who has the
// public key can make a copy of a key of their own. Copies must be kept in
// records or backups that are authenticated themselves.
package recovery

import (
	"crypto/hpke"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/keyward/keyward/dek"
)

const (
	// MinShares is the smallest m: nobody recovers alone.
	MinShares = 2
	// MaxShares is the largest n.
	MaxShares = 255
	// maxLabel bounds a recipient's label, in bytes.
	maxLabel = 63

	recipientPrefix = "kwrecipient1-"
	kemID           = 0x0051 // MLKEM1024-P384
	publicBytes     = 1568 + 97
	setBytes        = 12 // of the fingerprint that ties shares to their recipient
	sumBytes        = 4  // of the checksum of a text
	maxRecipient    = 4096

	sealedFormat = 1
	infoLabel    = "keyward/recovery/v1"
)

// kem, kdf and aead are the HPKE suite of format 1.
func kem() hpke.KEM   { return hpke.MLKEM1024P384() }
func kdf() hpke.KDF   { return hpke.HKDFSHA384() }
func aead() hpke.AEAD { return hpke.AES256GCM() }

// A setID is the fingerprint of a recipient: public key, m and n.
type setID [setBytes]byte

// A Recipient is the public half: it seals, and may be stored and shown
// anywhere. It is immutable; the zero Recipient seals nothing. Its label is
// for people and not part of the fingerprint, which is what they must compare.
type Recipient struct {
	m, n  byte
	label string
	pub   hpke.PublicKey
}

// Generate makes a key pair and splits the private half into n shares, any m
// of which join again: 2 <= m <= n <= 255. label (1 to 63 bytes, printable)
// tells recipients apart. The caller hands each share to one person and
// destroys them all. Generate is meant for a machine that is offline.
//
// It wraps dek.ErrInvalid for arguments out of range and dek.ErrExhausted if
// no memory can be locked.
func Generate(m, n int, label string) (Recipient, []Share, error) {
	if m < MinShares || n < m || n > MaxShares {
		return Recipient{}, nil, fmt.Errorf("%w: %d of %d shares: need %d <= m <= n <= %d", dek.ErrInvalid, m, n, MinShares, MaxShares)
	}
	if err := checkLabel(label); err != nil {
		return Recipient{}, nil, err
	}
	seed, err := dek.NewKey()
	if err != nil {
		return Recipient{}, nil, fmt.Errorf("generate recipient: %w", err)
	}
	defer seed.Destroy()
	r := Recipient{m: byte(m), n: byte(n), label: label}
	if r.pub, err = publicKey(seed); err != nil {
		return Recipient{}, nil, fmt.Errorf("generate recipient: %w", err)
	}
	ys, err := split(seed, m, n)
	if err != nil {
		return Recipient{}, nil, fmt.Errorf("generate recipient: %w", err)
	}
	set, shares := r.set(), make([]Share, n)
	for i, y := range ys {
		shares[i] = Share{index: byte(i + 1), m: r.m, n: r.n, set: set, y: y}
	}
	// A share that does not join is found now, not in the disaster.
	for _, part := range [][]Share{shares[:m], shares[n-m:], shares} {
		p, err := Combine(part)
		if err != nil {
			destroy(ys)
			return Recipient{}, nil, fmt.Errorf("generate recipient: self-test: %w", err)
		}
		p.Destroy()
	}
	return r, shares, nil
}

// checkLabel wraps dek.ErrInvalid.
func checkLabel(label string) error {
	ok := len(label) >= 1 && len(label) <= maxLabel && utf8.ValidString(label)
	for _, c := range label {
		ok = ok && unicode.IsPrint(c)
	}
	if !ok {
		return fmt.Errorf("%w: recipient label: 1 to %d bytes of printable text", dek.ErrInvalid, maxLabel)
	}
	return nil
}

// privateKey derives the HPKE key pair of seed and passes it to f, which must
// not keep it. Go has no way to wipe the derived halves, which stay on the heap
// until that is reused, but Bytes gives access to its copy of the seed.
func privateKey(seed *dek.Key, f func(hpke.PrivateKey) error) error {
	return seed.Use(func(b []byte) error {
		priv, err := kem().NewPrivateKey(b)
		if err != nil {
			return fmt.Errorf("derive key pair: %w", err)
		}
		defer func() {
			if seed, err := priv.Bytes(); err == nil {
				clear(seed)
			}
		}()
		return f(priv)
	})
}

func publicKey(seed *dek.Key) (pub hpke.PublicKey, err error) {
	err = privateKey(seed, func(p hpke.PrivateKey) error {
		pub = p.PublicKey()
		return nil
	})
	return pub, err
}

// set returns the fingerprint.
func (r Recipient) set() setID { return fingerprint(r.m, r.n, r.pub) }

func fingerprint(m, n byte, pub hpke.PublicKey) setID {
	b := append([]byte(infoLabel), kemID>>8, kemID&0xff, m, n)
	sum := sha256.Sum256(append(b, pub.Bytes()...))
	return setID(sum[:setBytes])
}

// Fingerprint returns 24 hexadecimal digits that name the public key with its
// m and n: what people compare. It is empty for the zero Recipient.
func (r Recipient) Fingerprint() string {
	if r.pub == nil {
		return ""
	}
	set := r.set()
	return hex.EncodeToString(set[:])
}

// Label returns the label given to Generate.
func (r Recipient) Label() string { return r.label }

// Threshold returns m and n: how many of how many shares open.
func (r Recipient) Threshold() (m, n int) { return int(r.m), int(r.n) }

// String returns the recipient as one line of text for ParseRecipient, about
// 2,300 characters; empty for the zero Recipient.
func (r Recipient) String() string {
	if r.pub == nil {
		return ""
	}
	b := []byte{r.m, r.n, byte(len(r.label))}
	b = append(b, r.label...)
	b = binary.BigEndian.AppendUint16(b, kemID)
	b = append(b, r.pub.Bytes()...)
	sum := checksum(recipientPrefix, b)
	return recipientPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:]...))
}

// MarshalText is String, for records and configuration files.
func (r Recipient) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText is ParseRecipient; an empty text is the zero Recipient.
func (r *Recipient) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*r = Recipient{}
		return nil
	}
	parsed, err := ParseRecipient(string(b))
	if err != nil {
		return err
	}
	*r = parsed
	return nil
}

// ParseRecipient reads what String wrote, spaces and line ends around it
// apart. It wraps dek.ErrInvalid for everything else: unknown versions, a
// character lost in copying, a public key that is none.
func ParseRecipient(s string) (Recipient, error) {
	r, err := parseRecipient(strings.TrimSpace(s))
	if err != nil {
		return Recipient{}, fmt.Errorf("recovery recipient: %w", err)
	}
	return r, nil
}

func parseRecipient(s string) (Recipient, error) {
	body, ok := strings.CutPrefix(s, recipientPrefix)
	if !ok || len(s) > maxRecipient {
		return Recipient{}, fmt.Errorf("%w: want one line that begins with %s", dek.ErrInvalid, recipientPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || strings.ContainsAny(body, "\r\n") { // the decoder skips line ends
		return Recipient{}, fmt.Errorf("%w: not base64url: copy the whole line", dek.ErrInvalid)
	}
	const fixed = 3 + 2 + publicBytes + sumBytes
	if len(b) < fixed || len(b) != fixed+int(b[2]) {
		return Recipient{}, fmt.Errorf("%w: %d bytes: copy the whole line", dek.ErrInvalid, len(b))
	}
	b, sum := b[:len(b)-sumBytes], b[len(b)-sumBytes:]
	if want := checksum(recipientPrefix, b); subtle.ConstantTimeCompare(sum, want[:]) != 1 {
		return Recipient{}, fmt.Errorf("%w: checksum: a character was lost or changed", dek.ErrInvalid)
	}
	r := Recipient{m: b[0], n: b[1], label: string(b[3 : 3+b[2]])}
	b = b[3+len(r.label):]
	if r.m < MinShares || r.n < r.m || binary.BigEndian.Uint16(b) != kemID {
		return Recipient{}, fmt.Errorf("%w: made by a program this one does not know", dek.ErrInvalid)
	}
	if err := checkLabel(r.label); err != nil {
		return Recipient{}, err
	}
	if r.pub, err = kem().NewPublicKey(b[2:]); err != nil {
		return Recipient{}, fmt.Errorf("%w: public key: %w", dek.ErrInvalid, err)
	}
	return r, nil
}

// checksum finds typing and copying errors; it is no protection.
func checksum(prefix string, b []byte) [sumBytes]byte {
	h := sha256.New()
	h.Write([]byte(prefix))
	h.Write(b)
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	defer clear(sum[:])
	return [sumBytes]byte(sum[:sumBytes])
}

// info returns the HPKE info of a copy for its place.
func info(b dek.Binding) ([]byte, error) {
	canonical, err := b.Canonical()
	if err != nil {
		return nil, err
	}
	return append([]byte(infoLabel), canonical...), nil
}

// errZero answers uses of the zero Recipient.
var errZero = errors.New("no recovery recipient")

// Seal returns a copy of k, 1,726 bytes, that m shares open for the same b.
// It wraps dek.ErrInvalid for a bad binding or the zero Recipient and
// dek.ErrDestroyed if k is destroyed. It may be called concurrently.
func (r Recipient) Seal(b dek.Binding, k *dek.Key) ([]byte, error) {
	if r.pub == nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, errZero)
	}
	inf, err := info(b)
	if err != nil {
		return nil, fmt.Errorf("recovery copy: %w", err)
	}
	set := r.set()
	out := append([]byte{sealedFormat}, set[:]...)
	err = k.Use(func(key []byte) error {
		sealed, err := hpke.Seal(r.pub, kdf(), aead(), inf, key)
		out = append(out, sealed...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("recovery copy: %w", err)
	}
	return out, nil
}
