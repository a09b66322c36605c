package kms_test

import (
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

func TestLife(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	first := h.wraps()
	if len(first) != 1 {
		t.Fatalf("got %d wraps, want 1", len(first))
	}
	want := h.bytesOf(first[0])

	ring, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: "r2", Vault: "v", Name: "r"})
	check(t, err)
	if ring.Current != 2 || ring.Versions[0].ServerVersion != 1 || ring.Versions[1].ServerVersion != 3 {
		t.Errorf("after a roll: %+v", ring)
	}
	key, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "k2", Vault: "v", Name: "k"})
	check(t, err)
	if key.Current != 2 {
		t.Errorf("current master version %d, want 2", key.Current)
	}
	moved, err := h.s.RewrapKey(ctx, officer, "v", "k", nil)
	check(t, err)
	if moved != 2 {
		t.Errorf("rewrap moved %d, want 2", moved)
	}
	if moved, err := h.s.RewrapKey(ctx, officer, "v", "k", nil); moved != 0 || err != nil {
		t.Errorf("second rewrap moved %d, %v", moved, err)
	}
	if got := h.bytesOf(first[0]); string(got) != string(want) {
		t.Error("the wrap for the old master version gives another key")
	}
	now := h.wraps()
	if got := h.bytesOf(now[0]); string(got) != string(want) {
		t.Error("the new wrap gives another key")
	}
	// Old master off: the old wrap is refused, the new one works.
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Version: 1})
	check(t, err)
	if _, err := h.s.Unwrap(ctx, db1, first[0]); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("unwrap under a disabled master: %v", err)
	}
	h.bytesOf(now[0])
	h.reopen()
	if got := h.bytesOf(now[0]); string(got) != string(want) {
		t.Error("after a restart another key")
	}
	st, err := h.s.Status(ctx, admin)
	check(t, err)
	if !st.TokenHealthy || len(st.Quarantined) != 0 {
		t.Errorf("status: %+v", st)
	}
}
