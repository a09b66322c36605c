package kms_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/storetest"
)

// TestInitFaults: an Init that fails anywhere can be run again and makes no
// second set of objects.
func TestInitFaults(t *testing.T) {
	fresh := func(t *testing.T) *house {
		h := &house{t: t, store: storetest.NewMemory(), journal: &journal{}, clock: &clock{}}
		h.token = token{hsmtest.OpenFake(t, t.TempDir()+"/token")}
		h.policy = must(access.New(kms.Operations()...))
		return h
	}
	again := func(t *testing.T, h *house, err error) {
		t.Helper()
		h.store.Inject(nil, nil)
		h.journal.fail = nil
		if err != nil {
			h.init("")
		}
		h.open()
		if st := must(h.s.Status(t.Context(), admin)); len(st.Quarantined) != 0 {
			t.Errorf("left behind: %x", st.Quarantined)
		}
	}
	try := func(t *testing.T, h *house) (err error) {
		h.first, err = kms.Init(t.Context(), h.config(), kms.InitRequest{FirstAdministrator: admin.Principal})
		return err
	}
	for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
		for n := 1; n <= 2; n++ {
			t.Run(fmt.Sprintf("store/%d/mode%d", n, mode), func(t *testing.T) {
				h := fresh(t)
				h.store.Inject(storetest.FailNth("commit", n, mode), nil)
				again(t, h, try(t, h))
			})
			t.Run(fmt.Sprintf("audit/%d/mode%d", n, mode), func(t *testing.T) {
				h := fresh(t)
				h.journal.fail = func(i int, _ kms.Event) storetest.Fault {
					if i == n {
						return mode
					}
					return 0
				}
				again(t, h, try(t, h))
			})
		}
		for name, op := range map[string]hsmtest.Op{"root": hsmtest.OpGenerateRoot, "signer": hsmtest.OpGenerateSigner, "seal": hsmtest.OpSealKey, "open": hsmtest.OpOpenKey} {
			t.Run(fmt.Sprintf("token/%s/mode%d", name, mode), func(t *testing.T) {
				h := fresh(t)
				h.token.Fail(op, hsmtest.Mode(mode), nil)
				again(t, h, try(t, h))
			})
		}
	}
}

// TestRewrapStops: a rewrap that is stopped, or meets a fault, goes on where it
// was.
func TestRewrapStops(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	const versions = 80
	for i := range versions - 1 {
		_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: fmt.Sprint(i), Vault: "v", Name: "r"})
		check(t, err)
	}
	var want [][]byte
	for _, w := range h.wraps() {
		want = append(want, h.bytesOf(w))
	}
	_, err := h.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
	check(t, err)
	stopped, stop := context.WithCancel(ctx)
	moved, err := h.s.RewrapKey(stopped, officer, "v", "k", func(done, total int) {
		if total != versions {
			t.Errorf("total %d, want %d", total, versions)
		}
		if done > 0 {
			stop()
		}
	})
	if !errors.Is(err, dek.ErrUnavailable) || moved == 0 || moved == versions {
		t.Fatalf("stopped: moved %d, %v", moved, err)
	}
	for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
		h.store.Inject(storetest.FailNth("commit", 1, mode), nil)
		n, err := h.s.RewrapKey(ctx, officer, "v", "k", nil)
		h.store.Inject(nil, nil)
		moved += n
		if mode == storetest.FailedNotDone && !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("store fails: %v", err)
		}
	}
	n, err := h.s.RewrapKey(ctx, officer, "v", "k", nil)
	check(t, err)
	if moved+n != versions {
		t.Errorf("moved %d in all, want %d", moved+n, versions)
	}
	h.reopen()
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Version: 1})
	check(t, err)
	for i, w := range h.wraps() {
		if got := h.bytesOf(w); !bytes.Equal(got, want[i]) {
			t.Fatalf("version %d: another key", i+1)
		}
	}
	// What is wrapped for a disabled version is not moved behind its back.
	_, err = h.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
	check(t, err)
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Version: 2})
	check(t, err)
	if _, err := h.s.RewrapKey(ctx, officer, "v", "k", nil); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("rewrap from a disabled version: %v", err)
	}
}

// TestRestoreNewLog: the log is lost, the token is not.
func TestRestoreNewLog(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	b := h.backup()
	h.s.Close()
	old := h.s.AuditObject()
	n := h.elsewhere(false)
	n.journal = &journal{}
	_, err := n.restore(b, kms.RestoreOptions{NewLog: true})
	check(t, err)
	n.open()
	n.bytesOf(w)
	if n.s.AuditObject() == old {
		t.Error("the new log is signed by the old key")
	}
	if n.s.Installation() != h.s.Installation() || n.s.CASigner().Public() == nil {
		t.Error("another installation")
	}
}

// TestMissingObject: a token put back in time is named at start, the rest is
// served.
func TestMissingObject(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	_, err := h.s.CreateKey(ctx, officer, kms.CreateKey{Vault: "v", Name: "gone", Bits: 2048})
	check(t, err)
	check(t, h.token.DestroyPair(ctx, must(h.s.Key(ctx, officer, "v", "gone")).Versions[0].Object))
	h.reopen()
	st := must(h.s.Status(ctx, admin))
	if st.Problems[0].Severity != "red" || !bytes.Contains(fmt.Append(nil, st.Problems), []byte("key v/gone version 1")) {
		t.Errorf("problems: %v", st.Problems)
	}
	h.bytesOf(h.wraps()[0])
}

func TestRenewAndRevoke(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	got := ""
	issue := func(p string) error { got = p; return nil }
	if err := h.s.Renew(ctx, db1, issue); err != nil || got != "host/db1" {
		t.Errorf("renew: %q, %v", got, err)
	}
	w := h.wraps()[0]
	check(t, h.s.RevokeIdentity(ctx, admin, "host/db1"))
	got = ""
	if err := h.s.Renew(ctx, db1, issue); !errors.Is(err, dek.ErrDenied) || got != "" {
		t.Errorf("renew after a revocation: %q, %v", got, err)
	}
	if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("unwrap after a revocation: %v", err)
	}
	if !h.s.Revoked("host/db1", "any") || h.s.Revoked("host/db2", "") {
		t.Error("deny list")
	}
	if _, err := h.s.NewEnrolmentToken(ctx, admin, "host/db1", 0); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("token for a revoked name: %v", err)
	}
}

// TestAllAtOnce is for the race detector: changes, unwraps, reads, backups and
// streams together, and a restart that finds all of it.
func TestAllAtOnce(t *testing.T) {
	h := newHouse(t, "")
	h.s.Close()
	h.target = &target{}
	h.edit = func(c *kms.Config) { *c = c.WithLimits(200, 8, 0, time.Millisecond, time.Millisecond) }
	h.open()
	h.furnish()
	w := h.wraps()[0]
	want := h.bytesOf(w)
	ctx, cancel := context.WithCancel(t.Context())
	var streams, work sync.WaitGroup
	for range 3 {
		streams.Go(func() { _ = h.s.WatchInstance(ctx, db1, "db1", func(kms.Notice) error { return nil }) })
	}
	for i := range 4 {
		work.Go(func() {
			for j := range 10 {
				id := fmt.Sprintf("%d-%d", i, j)
				if _, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{RequestID: id, Vault: "v", Name: "r"}); err != nil {
					t.Errorf("roll %s: %v", id, err)
				}
				k, err := h.s.Unwrap(ctx, db1, w)
				if err != nil {
					t.Errorf("unwrap: %v", err)
				}
				k.Destroy()
				_ = h.s.AddGrant(ctx, admin, kms.Grant{Principal: fmt.Sprintf("person/p%d", i), Role: "crypto user", Scope: "/vaults/v"})
				_, _ = h.s.Status(ctx, admin)
				_, _ = h.s.Instances(ctx, admin)
				_ = h.s.ReportUsage(ctx, db1, "db1", []kms.Usage{{Keyring: "r", Version: dek.Version(j + 1), Last: h.clock.Now()}})
			}
		})
	}
	work.Go(func() {
		for range 5 {
			if err := h.s.Backup(ctx, root, &bytes.Buffer{}); err != nil && !errors.Is(err, dek.ErrConflict) {
				t.Errorf("backup: %v", err)
			}
		}
	})
	work.Wait()
	cancel()
	streams.Wait()
	h.reopen()
	if r := must(h.s.Keyring(t.Context(), officer, "v", "r")); len(r.Versions) != 41 || r.Current != 41 {
		t.Errorf("%d versions, current %d, want 41", len(r.Versions), r.Current)
	}
	if got := h.bytesOf(w); !bytes.Equal(got, want) {
		t.Error("another key after all that")
	}
}
