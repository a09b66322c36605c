package dek_test

import (
	"bytes"
	"crypto"
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
