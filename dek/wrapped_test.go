package dek_test

import (
	"bytes"
	"crypto"
	"crypto/fips140"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
)

func newKey(t testing.TB) *dek.Key {
	t.Helper()
	k, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Destroy)
	return k
}

func goodHeader() dek.Header {
	return dek.Header{
		KeyID:         dek.KeyID{KeyringID: dek.KeyringID{Vault: "hr", Keyring: "payroll"}, Version: 3},
		Master:        dek.MasterID{Vault: "hr", Key: "main", Version: 2},
		Object:        dek.ObjectID{1, 2, 3, 15: 16},
		Hash:          crypto.SHA256,
		SealVersion:   1,
		SealedSealKey: []byte("sealed seal key"),
	}
}

func goodWrapped(t testing.TB, seal *dek.Key) dek.Wrapped {
	t.Helper()
	w, err := dek.Wrap(goodHeader(), seal, bytes.Repeat([]byte{7}, 256))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWrapRoundTrip(t *testing.T) {
	seal := newKey(t)
	w := goodWrapped(t, seal)
	got, err := dek.ParseWrapped(w.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), w.Bytes()) {
		t.Error("parse and encode changed the bytes")
	}
	if got.ID() != goodHeader().KeyID {
		t.Errorf("ID = %v, want %v", got.ID(), goodHeader().KeyID)
	}
	inner, err := got.Inner(seal)
	if err != nil || !bytes.Equal(inner, bytes.Repeat([]byte{7}, 256)) {
		t.Errorf("Inner = %x, %v", inner, err)
	}
	if inner, err := got.Inner(newKey(t)); !errors.Is(err, dek.ErrAuth) || inner != nil {
		t.Errorf("Inner under a foreign seal key = %x, %v, want ErrAuth", inner, err)
	}
}

// TestWrappedEveryBit flips each bit of a wrapped DEK in turn: none may pass
// both the parser and the outer layer.
func TestWrappedEveryBit(t *testing.T) {
	seal := newKey(t)
	good := goodWrapped(t, seal).Bytes()
	for i := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[i/8] ^= 1 << (i % 8)
		w, err := dek.ParseWrapped(bad)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) {
				t.Fatalf("bit %d: ParseWrapped: %v, want ErrInvalid", i, err)
			}
			continue
		}
		if inner, err := w.Inner(seal); !errors.Is(err, dek.ErrAuth) || inner != nil {
			t.Fatalf("bit %d: Inner = %x, %v, want ErrAuth", i, inner, err)
		}
	}
	for n := range good {
		if _, err := dek.ParseWrapped(good[:n]); !errors.Is(err, dek.ErrInvalid) {
			t.Fatalf("first %d bytes: %v, want ErrInvalid", n, err)
		}
	}
	if _, err := dek.ParseWrapped(append(good, 0)); !errors.Is(err, dek.ErrInvalid) {
		t.Fatalf("trailing byte: %v, want ErrInvalid", err)
	}
}

func TestEncryptToMaster(t *testing.T) {
	master, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	k := newKey(t)
	for _, h := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		inner, err := dek.EncryptToMaster(&master.PublicKey, h, k)
		if h == crypto.SHA1 && fips140.Enforced() {
			if !errors.Is(err, dek.ErrPrecondition) {
				t.Errorf("SHA-1 in strict FIPS mode: %v, want ErrPrecondition", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		plain, err := rsa.DecryptOAEP(h.New(), nil, master, inner, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := dek.KeyFrom(plain)
		if err != nil {
			t.Fatal(err)
		}
		defer got.Destroy()
		if !got.Equal(k) {
			t.Errorf("%v: another key came back", h)
		}
	}
	if _, err := dek.EncryptToMaster(&master.PublicKey, crypto.SHA512, k); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("SHA-512: %v, want ErrInvalid", err)
	}
	if _, err := dek.EncryptToMaster(nil, crypto.SHA256, k); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("no key: %v, want ErrInvalid", err)
	}
}

func TestWrapRefuses(t *testing.T) {
	seal := newKey(t)
	inner := []byte("inner")
	tests := []struct {
		name   string
		change func(h *dek.Header)
	}{
		{"no vault", func(h *dek.Header) { h.Vault = "" }},
		{"bad keyring", func(h *dek.Header) { h.Keyring = "Payroll/x" }},
		{"long master vault", func(h *dek.Header) { h.Master.Vault = string(bytes.Repeat([]byte{'a'}, 64)) }},
		{"bad master key", func(h *dek.Header) { h.Master.Key = "-" }},
		{"DEK version 0", func(h *dek.Header) { h.Version = 0 }},
		{"master version 0", func(h *dek.Header) { h.Master.Version = 0 }},
		{"seal version 0", func(h *dek.Header) { h.SealVersion = 0 }},
		{"hash 0", func(h *dek.Header) { h.Hash = 0 }},
		{"SHA-512", func(h *dek.Header) { h.Hash = crypto.SHA512 }},
		{"no seal key", func(h *dek.Header) { h.SealedSealKey = nil }},
		{"long seal key", func(h *dek.Header) { h.SealedSealKey = make([]byte, 2049) }},
	}
	for _, tt := range tests {
		h := goodHeader()
		tt.change(&h)
		if w, err := dek.Wrap(h, seal, inner); !errors.Is(err, dek.ErrInvalid) || w.Bytes() != nil {
			t.Errorf("%s: %v, want ErrInvalid", tt.name, err)
		}
	}
	for _, n := range []int{0, 1025} {
		if _, err := dek.Wrap(goodHeader(), seal, make([]byte, n)); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("inner layer of %d bytes: %v, want ErrInvalid", n, err)
		}
	}
	if got := seal.Seals(); got != 0 {
		t.Errorf("%d seals counted for refused wraps", got)
	}
	if inner, err := (dek.Wrapped{}).Inner(seal); !errors.Is(err, dek.ErrAuth) || inner != nil {
		t.Errorf("zero Wrapped opened: %v", err)
	}
}

// TestWrappedLargest: the largest header and inner layer fit the limit.
func TestWrappedLargest(t *testing.T) {
	seal, name := newKey(t), string(bytes.Repeat([]byte{'a'}, 63))
	h := goodHeader()
	h.Vault, h.Keyring, h.Master.Vault, h.Master.Key = name, name, name, name
	h.SealedSealKey = make([]byte, 2048)
	w, err := dek.Wrap(h, seal, make([]byte, 1024))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(w.Bytes()); n > dek.MaxWrapped {
		t.Errorf("%d bytes, over the limit", n)
	}
	if _, err := dek.ParseWrapped(w.Bytes()); err != nil {
		t.Error(err)
	}
}

// TestWrappedImmutable: what callers hold is theirs.
func TestWrappedImmutable(t *testing.T) {
	seal, h := newKey(t), goodHeader()
	w, err := dek.Wrap(h, seal, []byte("inner"))
	if err != nil {
		t.Fatal(err)
	}
	raw := w.Bytes()
	parsed, err := dek.ParseWrapped(raw)
	if err != nil {
		t.Fatal(err)
	}
	clear(h.SealedSealKey)
	clear(w.Header().SealedSealKey)
	clear(w.Bytes())
	clear(raw)
	for _, w := range []dek.Wrapped{w, parsed} {
		if _, err := w.Inner(seal); err != nil || string(w.Header().SealedSealKey) != "sealed seal key" {
			t.Errorf("changed from outside: %v", err)
		}
	}
}

// TestWrappedSwap puts the outer layer of one wrapped DEK under the header of
// another: same service, same seal key, other place.
func TestWrappedSwap(t *testing.T) {
	seal := newKey(t)
	good := goodWrapped(t, seal).Bytes()
	for _, change := range []func(h *dek.Header){
		func(h *dek.Header) { h.Vault = "it" },
		func(h *dek.Header) { h.Keyring = "payrolx" },
		func(h *dek.Header) { h.Version++ },
		func(h *dek.Header) { h.Master.Version++ },
		func(h *dek.Header) { h.SealVersion++ },
		func(h *dek.Header) { h.Object[0]++ },
		func(h *dek.Header) { h.Hash = crypto.SHA1 },
	} {
		h := goodHeader()
		change(&h)
		other, err := dek.Wrap(h, seal, bytes.Repeat([]byte{7}, 256))
		if err != nil {
			t.Fatal(err)
		}
		b := other.Bytes()
		moved := append(b[:len(b)-284:len(b)-284], good[len(good)-284:]...)
		w, err := dek.ParseWrapped(moved)
		if err != nil {
			t.Fatal(err)
		}
		if inner, err := w.Inner(seal); !errors.Is(err, dek.ErrAuth) || inner != nil {
			t.Errorf("moved to %+v: %v, want ErrAuth", h, err)
		}
	}
}
