package kms_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// TestBatch: each item has its own answer, and the log names every version of
// every keyring where it is looked for.
func TestBatch(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	for i := range 5 {
		_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: fmt.Sprint(i), Vault: "v", Name: "r"})
		check(t, err)
	}
	ws := h.wraps()
	seal := must(dek.NewKey())
	defer seal.Destroy()
	bad := must(dek.Wrap(ws[0].Header(), seal, make([]byte, 256)))
	elsewhere := ws[0].Header()
	elsewhere.Keyring = "nothere"
	foreign := must(dek.Wrap(elsewhere, seal, make([]byte, 256)))
	_, err := h.s.SetKeyringEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "r", Version: 3})
	check(t, err)
	before := len(h.journal.events)
	keys, errs, err := h.s.UnwrapBatch(ctx, db1, append(slices.Clone(ws), bad, foreign))
	check(t, err)
	for i, k := range keys {
		want := error(nil)
		switch i {
		case 2, len(ws) + 1:
			want = dek.ErrDenied
		case len(ws):
			want = dek.ErrAuth
		}
		if !errors.Is(errs[i], want) || (k != nil) != (want == nil) {
			t.Errorf("item %d: key %v, %v; want %v", i, k != nil, errs[i], want)
		}
		k.Destroy()
	}
	var got []string
	for _, e := range h.journal.events[before:] {
		got = append(got, fmt.Sprintf("%d %s version %d count %d %q %q", e.Phase, e.Object, e.Version, e.Count, e.Result, e.Note))
	}
	slices.Sort(got)
	want := []string{
		`1 /vaults/v/keyrings/r version 0 count 7 "" "asked: 1-2,4-6; denied: 3; auth: 1"`,
		`2 /vaults/v/keyrings/r version 0 count 7 "ok" "ok: 1-2,4-6; denied: 3; auth: 1"`,
		`3 /vaults/v/keyrings/nothere version 1 count 1 "denied" "denied: 1"`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("records of a batch:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, _, err := h.s.UnwrapBatch(ctx, db2, ws); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("batch of a stranger: %v", err)
	}
	if _, _, err := h.s.UnwrapBatch(ctx, db1, nil); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("empty batch: %v", err)
	}
}

// TestBatchFaults: without a record no key goes out and, without an intent, the
// token is not asked; what the token can't answer is an item's own error.
func TestBatchFaults(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	ws := h.wraps()
	ws = append(ws, ws[0])
	for n := 1; n <= 2; n++ { // the intent, the outcome
		for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
			calls, asked := 0, h.token.Calls(hsmtest.OpDecryptKey)
			h.journal.fail = func(int, kms.Event) storetest.Fault {
				if calls++; calls == n {
					return mode
				}
				return 0
			}
			keys, _, err := h.s.UnwrapBatch(ctx, db1, ws)
			h.journal.fail = nil
			if keys != nil || !errors.Is(err, dek.ErrUnavailable) {
				t.Errorf("record %d fails: keys %v, %v", n, keys != nil, err)
			}
			if n == 1 && h.token.Calls(hsmtest.OpDecryptKey) != asked {
				t.Error("the token was asked without an intent on disk")
			}
		}
	}
	h.token.Fail(hsmtest.OpDecryptKey, hsmtest.NotDone, nil)
	keys, errs, err := h.s.UnwrapBatch(ctx, db1, ws)
	check(t, err)
	failed := 0
	for i, k := range keys {
		if (k == nil) != errors.Is(errs[i], dek.ErrUnavailable) {
			t.Errorf("item %d: key %v, %v", i, k != nil, errs[i])
		}
		if k == nil {
			failed++
		}
		k.Destroy()
	}
	if failed != 1 {
		t.Errorf("%d items failed, want 1", failed)
	}
}
