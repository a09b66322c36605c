package recovery

import (
	"crypto/hpke"
	"crypto/subtle"
	"fmt"
	"io"
	"log/slog"

	"github.com/keyward/keyward/dek"
)

// errShares is the one answer to shares that do not join, whatever the cause.
var errShares = fmt.Errorf("%w: these shares do not join: too few, one twice, one of another recipient or one changed", dek.ErrAuth)

// A Private is the joined private half of a recipient. It opens copies until
// Destroy and can't be printed or encoded. Methods may be called concurrently.
type Private struct {
	seed *dek.Key
	set  setID
}

// Combine joins m or more different shares of one recipient. It never returns
// a key that is not the recipient's: the result is compared with the
// fingerprint that each share carries. The shares remain the caller's.
//
// It wraps dek.ErrAuth, with one text for every cause, for too few shares, one
// given twice, one of another recipient, one changed or destroyed, and
// dek.ErrExhausted if no memory can be locked.
func Combine(shares []Share) (*Private, error) {
	xs, ys, err := points(shares)
	if err != nil {
		return nil, err
	}
	m := int(shares[0].m)
	seed, err := interpolate(xs[:m], ys[:m], 0)
	if err != nil {
		return nil, fmt.Errorf("join shares: %w", err)
	}
	p := &Private{seed: seed, set: shares[0].set}
	if err := p.check(xs, ys, shares[0]); err != nil {
		p.Destroy()
		return nil, err
	}
	return p, nil
}

// points returns the coordinates of shares that belong together by what they
// say of themselves.
func points(shares []Share) (xs []byte, ys []*dek.Key, err error) {
	if len(shares) == 0 || len(shares) < int(shares[0].m) {
		return nil, nil, errShares
	}
	first := shares[0]
	var seen [256]bool
	for _, s := range shares {
		alive := s.y != nil && s.y.Use(func([]byte) error { return nil }) == nil
		if !alive || s.index == 0 || seen[s.index] || s.m != first.m || s.n != first.n || s.set != first.set {
			return nil, nil, errShares
		}
		seen[s.index] = true
		xs, ys = append(xs, s.index), append(ys, s.y)
	}
	return xs, ys, nil
}

// check compares the joined key with the fingerprint, and the shares beyond
// the first m with the polynomial.
func (p *Private) check(xs []byte, ys []*dek.Key, first Share) error {
	pub, err := publicKey(p.seed)
	if err != nil {
		return fmt.Errorf("join shares: %w", err)
	}
	got := fingerprint(first.m, first.n, pub)
	ok := subtle.ConstantTimeCompare(got[:], first.set[:]) == 1
	m := int(first.m)
	for i := m; i < len(xs); i++ {
		want, err := interpolate(xs[:m], ys[:m], xs[i])
		if err != nil {
			return fmt.Errorf("join shares: %w", err)
		}
		ok = want.Equal(ys[i]) && ok
		want.Destroy()
	}
	if !ok {
		return errShares
	}
	return nil
}

// Open returns the key of a copy that Recipient.Seal made for the same b. It
// returns dek.ErrAuth for everything else, whatever the cause; it wraps
// dek.ErrInvalid only for a binding that no Seal accepts, dek.ErrDestroyed
// after Destroy, and dek.ErrExhausted if no memory can be locked.
func (p *Private) Open(b dek.Binding, sealed []byte) (*dek.Key, error) {
	inf, err := info(b)
	if err != nil {
		return nil, fmt.Errorf("recovery copy: %w", err)
	}
	const head = 1 + setBytes
	if len(sealed) <= head || sealed[0] != sealedFormat || setID(sealed[1:head]) != p.set {
		return nil, dek.ErrAuth
	}
	var plain []byte
	err = privateKey(p.seed, func(priv hpke.PrivateKey) error {
		if plain, err = hpke.Open(priv, kdf(), aead(), inf, sealed[head:]); err != nil || len(plain) != dek.KeySize {
			clear(plain)
			return dek.ErrAuth
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return dek.KeyFrom(plain)
}

// Fingerprint returns that of the Recipient.
func (p *Private) Fingerprint() string { return Share{set: p.set}.Fingerprint() }

// Destroy wipes the private half.
func (p *Private) Destroy() { p.seed.Destroy() }

const privateRedacted = "recovery.Private(redacted)"

// Format prints a fixed text for every verb.
func (*Private) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, privateRedacted) }

// LogValue logs a fixed text.
func (*Private) LogValue() slog.Value { return slog.StringValue(privateRedacted) }

// MarshalText refuses: JSON, XML and other encoders get an error.
func (*Private) MarshalText() ([]byte, error) { return nil, errNotSerialisable }

// GobEncode refuses, as MarshalText does.
func (*Private) GobEncode() ([]byte, error) { return nil, errNotSerialisable }
