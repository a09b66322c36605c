package hsm_test

import (
	"crypto"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// Close may come at any moment of another call, which then fails cleanly.
func TestSoftwareCloseUnderway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "token")
	for range 20 {
		tok, err := hsm.OpenSoftware(dir)
		if err != nil {
			t.Fatal(err)
		}
		id := hsmtest.NewID()
		if _, err := tok.GenerateSigner(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		begun := make(chan struct{}, 12)
		for range 4 {
			wg.Go(func() {
				for first := true; ; first = false {
					err := tok.GenerateRoot(t.Context(), hsmtest.NewID())
					if err != nil && !errors.Is(err, dek.ErrUnavailable) {
						t.Errorf("generate: %v", err)
					}
					if first {
						begun <- struct{}{}
					}
					if err != nil {
						return
					}
				}
			})
		}
		for range 4 {
			<-begun
		}
		tok.Close()
		wg.Wait()
		_, err = tok.Sign(t.Context(), id, make([]byte, 32))
		wantClass(t, "sign after close", err, dek.ErrUnavailable)
	}
}

// A key that is destroyed while it is being used for the first time is gone.
func TestSoftwareDestroyUnderway(t *testing.T) {
	dir, id := softwareDir(t)
	tok, err := hsm.OpenSoftware(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	pub, err := tok.FindPair(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	inner := hsmtest.Encrypt(t, pub, crypto.SHA256, make([]byte, 32))
	for range 50 {
		id := hsmtest.NewID()
		if err := tok.GenerateRoot(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if _, err := tok.GenerateSigner(t.Context(), hsmtest.NewID()); err != nil {
			t.Fatal(err)
		}
	}
	tok.Close()
	if tok, err = hsm.OpenSoftware(dir); err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	ids, err := tok.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range ids {
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				k, _ := tok.DecryptKey(t.Context(), other, crypto.SHA256, inner)
				k.Destroy()
				_, _ = tok.Sign(t.Context(), other, make([]byte, 32))
			})
		}
		wg.Go(func() {
			if err := tok.DestroyPair(t.Context(), other); err != nil {
				t.Errorf("destroy: %v", err)
			}
		})
		wg.Wait()
		_, err := tok.Sign(t.Context(), other, make([]byte, 32))
		wantClass(t, "sign after destruction", err, dek.ErrNotFound)
		_, err = tok.DecryptKey(t.Context(), other, crypto.SHA256, inner)
		wantClass(t, "decrypt after destruction", err, dek.ErrNotFound)
	}
}
