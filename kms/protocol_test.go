package kms_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// An outcome is what a caller saw of a roll that went wrong somewhere.
type outcome struct {
	acked bool
	n     dek.Version
}

// rollBoth rolls keyring and key with fixed request ids.
func rollBoth(h *house) (ring, key outcome) {
	ctx := h.t.Context()
	r, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: "roll-r", Vault: "v", Name: "r"})
	ring = outcome{err == nil, r.Current}
	k, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "roll-k", Vault: "v", Name: "k"})
	return ring, outcome{err == nil, k.Current}
}

// audited checks what must be true after any fault: what was acknowledged is
// there, nothing half made is usable, retrying gives the same version, and no
// object outside our ids is gone.
func (h *house) audited(ring, key outcome) {
	h.t.Helper()
	ctx := h.t.Context()
	r, err := h.s.Keyring(ctx, officer, "v", "r")
	check(h.t, err)
	k, err := h.s.Key(ctx, officer, "v", "k")
	check(h.t, err)
	if ring.acked && r.Current != ring.n || key.acked && k.Current != key.n {
		h.t.Errorf("acknowledged %d and %d, there are %d and %d", ring.n, key.n, r.Current, k.Current)
	}
	for _, m := range k.Versions {
		if m.State == kms.Enabled {
			if _, err := h.token.FindPair(ctx, m.Object); err != nil {
				h.t.Errorf("enabled master version %d: %v", m.Version, err)
			}
		}
	}
	for _, w := range h.wraps() {
		h.bytesOf(w)
	}
	// A retry of the same request makes no second version.
	before := len(r.Versions)
	again, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: "roll-r", Vault: "v", Name: "r"})
	if err != nil && !errors.Is(err, dek.ErrPrecondition) {
		h.t.Errorf("retry of the keyring roll: %v", err)
	}
	if err == nil && (len(again.Versions) > 2 || ring.acked && len(again.Versions) != before) {
		h.t.Errorf("retry made another version: %d after %d", len(again.Versions), before)
	}
	_, err = h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "roll-k", Vault: "v", Name: "k"})
	if err != nil && !errors.Is(err, dek.ErrPrecondition) {
		h.t.Errorf("retry of the key roll: %v", err)
	}
	st, err := h.s.Status(ctx, admin)
	check(h.t, err)
	if len(st.Quarantined) != 0 {
		h.t.Errorf("%d objects quarantined", len(st.Quarantined))
	}
}

// TestFaults lets the n-th call of store, log and token go wrong, once not done
// and once done, until a run meets no fault.
func TestFaults(t *testing.T) {
	tokenOps := map[string]hsmtest.Op{
		"GeneratePair": hsmtest.OpGeneratePair, "FindPair": hsmtest.OpFindPair, "DecryptKey": hsmtest.OpDecryptKey,
	}
	for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
		for n := 1; n <= 6; n++ {
			t.Run(fmt.Sprintf("store/%d/mode%d", n, mode), func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				h.store.Inject(storetest.FailNth("commit", n, mode), nil)
				ring, key := rollBoth(h)
				h.store.Inject(nil, nil)
				h.audited(ring, key)
				h.reopen()
				h.audited(ring, key)
			})
			t.Run(fmt.Sprintf("audit/%d/mode%d", n, mode), func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				var calls atomic.Int64
				h.journal.fail = func(int, kms.Event) storetest.Fault {
					if calls.Add(1) == int64(n) {
						return mode
					}
					return 0
				}
				ring, key := rollBoth(h)
				h.journal.fail = nil
				h.audited(ring, key)
				h.reopen()
				h.audited(ring, key)
			})
		}
		for name, op := range tokenOps {
			for n := 1; n <= 2; n++ {
				t.Run(fmt.Sprintf("token/%s/%d/mode%d", name, n, mode), func(t *testing.T) {
					h := newHouse(t, "")
					h.furnish()
					for range n - 1 {
						h.token.Fail(op, 0, nil)
					}
					h.token.Fail(op, hsmtest.Mode(mode), nil)
					ring, key := rollBoth(h)
					h.reopen()
					h.audited(ring, key)
				})
			}
		}
	}
}

// TestCrash abandons the service at each store commit and each log record of a
// roll (before and after it is done) and starts it again on what is there.
func TestCrash(t *testing.T) {
	type crash struct{ store, audit int }
	var cases []crash
	for n := 1; n <= 6; n++ {
		cases = append(cases, crash{store: n}, crash{audit: n})
	}
	for _, c := range cases {
		for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
			t.Run(fmt.Sprintf("%+v/mode%d", c, mode), func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				// From the crash on nothing gets through any more.
				var dead atomic.Bool
				h.store.Inject(func(op string, n int, _ []kms.Change) storetest.Fault {
					switch {
					case dead.Load() && op != "watch":
						return storetest.FailedNotDone
					case op == "commit" && n == c.store:
						dead.Store(true)
						return mode
					}
					return 0
				}, nil)
				start := len(h.journal.events)
				h.journal.fail = func(n int, _ kms.Event) storetest.Fault {
					switch {
					case dead.Load():
						return storetest.FailedNotDone
					case c.audit > 0 && n == start+c.audit:
						dead.Store(true)
						return mode
					}
					return 0
				}
				ring, key := rollBoth(h)
				h.store.Inject(nil, nil)
				h.journal.fail = nil
				h.reopen()
				h.audited(ring, key)
			})
		}
	}
}

// TestHalfPair: what a crash in the token left behind is cleaned up for the ids
// we recorded, and for no others.
func TestHalfPair(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	stranger := hsmtest.NewID()
	must(h.token.GeneratePair(ctx, stranger, 2048))
	// The token finds halves: the version is given up, its object destroyed.
	h.token.Fail(hsmtest.OpFindPair, hsmtest.NotDone, fmt.Errorf("%w: halves", dek.ErrCorrupt))
	_, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "x", Vault: "v", Name: "k"})
	if !errors.Is(err, dek.ErrPrecondition) {
		t.Fatalf("roll with half a pair: %v", err)
	}
	k, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "y", Vault: "v", Name: "k"})
	check(t, err)
	if k.Current != 3 || k.Versions[1].State != kms.Failed {
		t.Errorf("after a failed version: %+v", k)
	}
	h.reopen()
	st, err := h.s.Status(ctx, admin)
	check(t, err)
	if len(st.Quarantined) != 1 || st.Quarantined[0] != stranger {
		t.Errorf("quarantined %x, want the stranger", st.Quarantined)
	}
	if _, err := h.token.FindPair(ctx, stranger); err != nil {
		t.Errorf("the unknown object is gone: %v", err)
	}
}

// TestReconcile: a PENDING version whose maker vanished is finished by the
// reconciler, not before it is old.
func TestReconcile(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	h.s.Close()
	h.edit = func(c *kms.Config) { *c = c.WithLimits(0, 0, time.Minute, time.Millisecond, 0) }
	h.open()
	ctx := t.Context()
	h.token.Fail(hsmtest.OpGeneratePair, hsmtest.Done, nil)
	// The pair is made but the caller hears nothing: finding fails too.
	h.token.Fail(hsmtest.OpFindPair, 0, nil)
	h.token.Fail(hsmtest.OpFindPair, hsmtest.NotDone, nil)
	_, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "x", Vault: "v", Name: "k"})
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Fatalf("roll: %v", err)
	}
	state := func() kms.State { return must(h.s.Key(ctx, officer, "v", "k")).Versions[1].State }
	if got := state(); got != kms.Pending {
		t.Fatalf("state %d, want pending", got)
	}
	h.clock.jump(2 * time.Minute)
	for state() != kms.Enabled {
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
	}
	k, err := h.s.RollKey(ctx, officer, kms.RollKey{RequestID: "x", Vault: "v", Name: "k"})
	check(t, err)
	if len(k.Versions) != 2 || k.Current != 2 {
		t.Errorf("the retried request: %+v", k)
	}
}

// TestSameRequestAtOnce: callers with one request id get one version.
func TestSameRequestAtOnce(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			r, err := h.s.RollKeyring(t.Context(), officer, kms.RollKeyring{RequestID: "same", Vault: "v", Name: "r"})
			if err != nil || r.Current != 2 {
				t.Errorf("got version %d, %v", r.Current, err)
			}
			k, err := h.s.RollKey(t.Context(), officer, kms.RollKey{RequestID: "same", Vault: "v", Name: "k"})
			if err != nil || k.Current != 2 {
				t.Errorf("got version %d, %v", k.Current, err)
			}
		})
	}
	wg.Wait()
}

// TestBackupFirst: no version is enabled before the target holds it.
func TestBackupFirst(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	h.s.Close()
	h.target = &target{err: fmt.Errorf("%w: full", dek.ErrUnavailable)}
	h.open()
	ctx := t.Context()
	_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: "x", Vault: "v", Name: "r"})
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Fatalf("roll without a target: %v", err)
	}
	if r := must(h.s.Keyring(ctx, officer, "v", "r")); r.Current != 1 || r.Versions[1].State != kms.Pending {
		t.Errorf("enabled without a backup: %+v", r)
	}
	h.target.mu.Lock()
	h.target.err = nil
	h.target.mu.Unlock()
	r, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: "x", Vault: "v", Name: "r"})
	check(t, err)
	if r.Current != 2 || h.target.puts == 0 {
		t.Errorf("after the target is back: %+v, %d puts", r, h.target.puts)
	}
	if st := must(h.s.Status(ctx, admin)); st.LastBackup.IsZero() || st.BackupTarget != "memory" {
		t.Errorf("status: %v %q", st.LastBackup, st.BackupTarget)
	}
}
