package kms_test

import (
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
)

// TestAbsentTokenKeepsPair: a token that is not reached, not logged in to or
// another one for a moment has said nothing about a pair. A PENDING version
// with a whole pair stays, at start and for the caller, and is finished later.
func TestAbsentTokenKeepsPair(t *testing.T) {
	for _, op := range []hsmtest.Op{hsmtest.OpFindPair, hsmtest.OpDecryptKey} {
		for _, class := range []error{dek.ErrPrecondition, dek.ErrExhausted, dek.ErrUnavailable, errors.New("no class")} {
			t.Run(class.Error(), func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				ctx := t.Context()
				roll := kms.RollKey{RequestID: "x", Vault: "v", Name: "k"}
				// The pair is made; testing it fails.
				h.token.Fail(hsmtest.OpDecryptKey, hsmtest.NotDone, class)
				if _, err := h.s.RollKey(ctx, officer, roll); err == nil {
					t.Fatal("a pair that could not be tested is enabled")
				}
				object := must(h.s.Key(ctx, officer, "v", "k")).Versions[1].Object
				h.s.Close()
				h.token.Fail(op, hsmtest.NotDone, class)
				h.open()
				if _, err := h.token.FindPair(ctx, object); err != nil {
					t.Fatalf("the pair is gone: %v", err)
				}
				k, err := h.s.RollKey(ctx, officer, roll)
				if err != nil || k.Current != 2 || k.Versions[1].Object != object {
					t.Errorf("the same request later: %+v, %v", k, err)
				}
			})
		}
	}
}

// TestAbsentTokenKeepsRing is the same for a keyring version.
func TestAbsentTokenKeepsRing(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	roll := kms.RollKeyring{RequestID: "x", Vault: "v", Name: "r"}
	h.token.Fail(hsmtest.OpDecryptKey, hsmtest.NotDone, dek.ErrPrecondition)
	if _, err := h.s.RollKeyring(t.Context(), officer, roll); !errors.Is(err, dek.ErrPrecondition) {
		t.Fatal(err)
	}
	r, err := h.s.RollKeyring(t.Context(), officer, roll)
	if err != nil || r.Current != 2 {
		t.Errorf("the same request later: %+v, %v", r, err)
	}
}
