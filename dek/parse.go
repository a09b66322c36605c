package dek

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"fmt"
)

// ParseWrapped reads what Wrapped.Bytes wrote and copies it. Every byte has one
// meaning: a parsed DEK encodes to the same bytes. It wraps ErrInvalid for
// anything else, unknown format versions included. That a DEK parses proves
// nothing about where it comes from: see Inner.
func ParseWrapped(b []byte) (Wrapped, error) {
	w, err := parseWrapped(b)
	if err != nil {
		return Wrapped{}, fmt.Errorf("wrapped DEK: %w", err)
	}
	return w, nil
}

func parseWrapped(b []byte) (Wrapped, error) {
	if len(b) > MaxWrapped {
		return Wrapped{}, fmt.Errorf("%w: over %d bytes", ErrInvalid, MaxWrapped)
	}
	r := reader{b: b}
	if string(r.take(len(wrappedMagic))) != wrappedMagic {
		return Wrapped{}, fmt.Errorf("%w: not a wrapped DEK", ErrInvalid)
	}
	if v := r.u8(); !r.short && v != wrappedFormat {
		return Wrapped{}, fmt.Errorf("%w: format version %d is not known to this program", ErrInvalid, v)
	}
	body := reader{b: r.take(int(r.u16()))}
	var h Header
	code := body.u8()
	h.Version, h.Master.Version, h.SealVersion = Version(body.u32()), Version(body.u32()), Version(body.u32())
	copy(h.Object[:], body.take(len(h.Object)))
	for _, s := range []*string{&h.Vault, &h.Keyring, &h.Master.Vault, &h.Master.Key} {
		*s = string(body.take(int(body.u8())))
	}
	h.SealedSealKey = bytes.Clone(body.take(int(body.u16())))
	sealed := r.take(int(r.u16()))
	if r.short || body.short || len(r.b) != 0 || len(body.b) != 0 {
		return Wrapped{}, fmt.Errorf("%w: lengths do not add up", ErrInvalid)
	}
	switch code {
	case hashSHA1:
		h.Hash = crypto.SHA1
	case hashSHA256:
		h.Hash = crypto.SHA256
	default:
		return Wrapped{}, fmt.Errorf("%w: unknown hash code %d", ErrInvalid, code)
	}
	if n := len(sealed) - gcmOverhead; n < 1 || n > maxInner {
		return Wrapped{}, fmt.Errorf("%w: inner layer of %d bytes", ErrInvalid, n)
	}
	if err := h.check(); err != nil {
		return Wrapped{}, err
	}
	return Wrapped{raw: bytes.Clone(b), header: h, outer: len(b) - len(sealed)}, nil
}

// A reader takes fields off the front of b; past the end it returns zeros and
// sets short.
type reader struct {
	b     []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.short, r.b = true, nil
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) u8() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}
