package dek_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
)

// place is a binding for tests.
func place() dek.Binding {
	return dek.Binding{Purpose: dek.PurposeSecret, Vault: "hr", Object: "smtp-password", Version: 7}
}

func TestSealOpen(t *testing.T) {
	plain := []byte("a plaintext")
	tests := []struct {
		name   string
		change func(b *dek.Binding, sealed []byte) []byte
		want   error
	}{
		{"untouched", func(_ *dek.Binding, s []byte) []byte { return s }, nil},
		{"other purpose", func(b *dek.Binding, s []byte) []byte { b.Purpose = dek.PurposeRecord; return s }, dek.ErrAuth},
		{"other vault", func(b *dek.Binding, s []byte) []byte { b.Vault = "evil"; return s }, dek.ErrAuth},
		{"other object", func(b *dek.Binding, s []byte) []byte { b.Object += "x"; return s }, dek.ErrAuth},
		{"moved boundary", func(b *dek.Binding, s []byte) []byte { b.Vault, b.Object = "hrs", "mtp-password"; return s }, dek.ErrAuth},
		{"other version", func(b *dek.Binding, s []byte) []byte { b.Version++; return s }, dek.ErrAuth},
		{"format", func(_ *dek.Binding, s []byte) []byte { s[0]++; return s }, dek.ErrAuth},
		{"nonce", func(_ *dek.Binding, s []byte) []byte { s[1] ^= 1; return s }, dek.ErrAuth},
		{"ciphertext", func(_ *dek.Binding, s []byte) []byte { s[14] ^= 1; return s }, dek.ErrAuth},
		{"tag", func(_ *dek.Binding, s []byte) []byte { s[len(s)-1] ^= 1; return s }, dek.ErrAuth},
		{"cut", func(_ *dek.Binding, s []byte) []byte { return s[:len(s)-1] }, dek.ErrAuth},
		{"longer", func(_ *dek.Binding, s []byte) []byte { return append(s, 0) }, dek.ErrAuth},
		{"overhead only", func(_ *dek.Binding, s []byte) []byte { return s[:dek.SealOverhead] }, dek.ErrAuth},
		{"empty", func(*dek.Binding, []byte) []byte { return nil }, dek.ErrAuth},
		{"purpose 0", func(b *dek.Binding, s []byte) []byte { b.Purpose = 0; return s }, dek.ErrInvalid},
		{"purpose 200", func(b *dek.Binding, s []byte) []byte { b.Purpose = 200; return s }, dek.ErrInvalid},
	}
	k := newKey(t)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := place()
			sealed, err := k.Seal(b, plain)
			if err != nil {
				t.Fatal(err)
			}
			if len(sealed) != len(plain)+dek.SealOverhead {
				t.Errorf("sealed %d bytes, want %d", len(sealed), len(plain)+dek.SealOverhead)
			}
			sealed = tt.change(&b, sealed)
			got, err := k.Open(b, sealed)
			if !errors.Is(err, tt.want) {
				t.Errorf("Open = %v, want %v", err, tt.want)
			}
			if err == nil && !bytes.Equal(got, plain) {
				t.Errorf("Open = %q, want %q", got, plain)
			}
			if err != nil && got != nil {
				t.Errorf("Open gave %d bytes beside its error", len(got))
			}
		})
	}
}

func TestSealOtherKey(t *testing.T) {
	k := newKey(t)
	sealed, err := k.Seal(place(), []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := newKey(t).Open(place(), sealed); !errors.Is(err, dek.ErrAuth) || got != nil {
		t.Errorf("Open under another key = %q, %v, want ErrAuth", got, err)
	}
	again, err := k.Seal(place(), []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(sealed, again) {
		t.Error("two seals are alike: no random nonce")
	}
}

// TestSealPurposes opens a message of each purpose as every other: subkey and
// binding both forbid it.
func TestSealPurposes(t *testing.T) {
	k := newKey(t)
	for p := dek.PurposeDEK; p <= dek.PurposeToken; p++ {
		b := place()
		b.Purpose = p
		sealed, err := k.Seal(b, []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		for q := dek.PurposeDEK; q <= dek.PurposeToken; q++ {
			b.Purpose = q
			_, err := k.Open(b, sealed)
			if (err == nil) != (p == q) {
				t.Errorf("sealed for %v, opened for %v: %v", p, q, err)
			}
		}
	}
}

func TestSealLimits(t *testing.T) {
	k := newKey(t)
	long := place()
	long.Object = strings.Repeat("x", 1<<16)
	if _, err := k.Seal(long, nil); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("object of 65,536 bytes: %v, want ErrInvalid", err)
	}
	if got := k.Seals(); got != 0 {
		t.Errorf("Seals = %d after a refused seal, want 0", got)
	}
	k.SetSeals(dek.MaxSeals - 1)
	sealed, err := k.Seal(place(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := k.Seal(place(), nil); !errors.Is(err, dek.ErrExhausted) {
			t.Errorf("seal over the limit: %v, want ErrExhausted", err)
		}
	}
	if _, err := k.Open(place(), sealed); err != nil {
		t.Errorf("open at the limit: %v", err)
	}
	if got := k.Seals(); got != dek.MaxSeals {
		t.Errorf("Seals = %d, want %d", got, uint64(dek.MaxSeals))
	}
}

// TestBindingCanonical: different bindings have different encodings.
func TestBindingCanonical(t *testing.T) {
	seen := make(map[string]dek.Binding)
	for _, vault := range []string{"", "a", "ab", "\x00", "\x00\x01a"} {
		for _, object := range []string{"", "a", "b", "ba", "\x00\x01a"} {
			for p := dek.PurposeDEK; p <= dek.PurposeToken; p++ {
				for _, v := range []uint64{0, 1, 1 << 32, 1<<64 - 1} {
					b := dek.Binding{Purpose: p, Vault: vault, Object: object, Version: v}
					enc, err := b.Canonical()
					if err != nil {
						t.Fatal(err)
					}
					if other, ok := seen[string(enc)]; ok {
						t.Fatalf("%v and %v have one encoding", b, other)
					}
					seen[string(enc)] = b
				}
			}
		}
	}
}
