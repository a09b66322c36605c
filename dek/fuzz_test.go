package dek_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
)

// FuzzParseWrapped: a wrapped DEK is refused with ErrInvalid or encodes to the
// same bytes, and none but the golden ones open.
func FuzzParseWrapped(f *testing.F) {
	g := readGolden(f)
	seal := keyOf(f, g.SealKey)
	known := make(map[string]bool)
	for _, w := range g.Wrapped {
		f.Add([]byte(w.Wrapped))
		f.Add([]byte(w.Wrapped[:len(w.Wrapped)-1]))
		known[string(w.Wrapped)] = true
	}
	if len(known) < 3 {
		f.Fatalf("%d seeds", len(known))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := dek.ParseWrapped(b)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) || w.Bytes() != nil {
				t.Fatalf("result and error: %v", err)
			}
			return
		}
		if !bytes.Equal(w.Bytes(), b) {
			t.Fatal("parse and encode changed the bytes")
		}
		h := w.Header()
		if again, err := dek.Wrap(h, seal, []byte{1}); err != nil || again.ID() != w.ID() {
			t.Fatalf("parsed header can't be wrapped again: %v", err)
		}
		inner, err := w.Inner(seal)
		if (err == nil) != known[string(b)] || (inner == nil) != (err != nil) {
			t.Fatalf("Inner = %d bytes, %v", len(inner), err)
		}
	})
}

// FuzzOpen: nothing opens that was not sealed for the place.
func FuzzOpen(f *testing.F) {
	g := readGolden(f)
	seal := keyOf(f, g.SealKey)
	for _, s := range g.Sealed {
		f.Add(uint8(s.Purpose), s.Vault, s.Object, s.Version, []byte(s.Sealed))
	}
	f.Fuzz(func(t *testing.T, p uint8, vault, object string, version uint64, sealed []byte) {
		b := dek.Binding{Purpose: dek.Purpose(p), Vault: vault, Object: object, Version: version}
		want := false
		for _, s := range g.Sealed {
			want = want || s.binding() == b && bytes.Equal(s.Sealed, sealed)
		}
		got, err := seal.Open(b, sealed)
		if (err == nil) != want || err != nil && got != nil {
			t.Fatalf("Open = %x, %v", got, err)
		}
		if err != nil && !errors.Is(err, dek.ErrAuth) && !errors.Is(err, dek.ErrInvalid) {
			t.Fatalf("Open: %v", err)
		}
	})
}
