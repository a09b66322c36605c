package kms_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// TestUnwrapOrder: intent, token, outcome; and each of them failing.
func TestUnwrapOrder(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	w := h.wraps()[0]
	before := len(h.journal.events)
	h.bytesOf(w)
	got := h.journal.events[before:]
	if len(got) != 2 || got[0].Phase != kms.PhaseIntent || got[1].Phase != kms.PhaseOutcome || got[1].Intent != uint64(before+1) {
		t.Fatalf("records of one unwrap: %+v", got)
	}
	if e := got[1]; e.Result != "ok" || e.Object != "/vaults/v/keyrings/r" || e.Version != 1 || e.Principal != "host/db1" || e.Rule == "" {
		t.Errorf("outcome %+v", e)
	}
	for n := 1; n <= 2; n++ { // the intent, the outcome
		for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
			calls, asked := 0, h.token.Calls(hsmtest.OpDecryptKey)
			h.journal.fail = func(int, kms.Event) storetest.Fault {
				if calls++; calls == n {
					return mode
				}
				return 0
			}
			k, err := h.s.Unwrap(ctx, db1, w)
			h.journal.fail = nil
			if k != nil || !errors.Is(err, dek.ErrUnavailable) {
				t.Errorf("record %d fails: key %v, %v", n, k != nil, err)
			}
			if n == 1 && h.token.Calls(hsmtest.OpDecryptKey) != asked {
				t.Error("the token was asked without an intent on disk")
			}
		}
	}
	for _, mode := range []hsmtest.Mode{hsmtest.NotDone, hsmtest.Done} {
		h.token.Fail(hsmtest.OpDecryptKey, mode, nil)
		if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("token fails: %v", err)
		}
	}
	h.bytesOf(w)
}

// TestMovedWrap: a wrapped DEK works in its own place only, with one answer for
// every other.
func TestMovedWrap(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	_, err := h.s.CreateVault(ctx, officer, "u")
	check(t, err)
	_, err = h.s.CreateKey(ctx, officer, kms.CreateKey{Vault: "u", Name: "k", Bits: 2048})
	check(t, err)
	for _, id := range []dek.KeyringID{{Vault: "v", Keyring: "s"}, {Vault: "u", Keyring: "r"}} {
		_, err = h.s.CreateKeyring(ctx, officer, kms.CreateKeyring{Vault: id.Vault, Name: id.Keyring, MasterKey: "k"})
		check(t, err)
	}
	_, err = h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
	check(t, err)
	check(t, h.s.AddGrant(ctx, admin, kms.Grant{Principal: "host/db1", Role: "service encryption user", Scope: "/"}))
	good := h.wraps()[0]
	edits := map[string]func(*dek.Header){
		"vault":          func(x *dek.Header) { x.Vault, x.Master.Vault = "u", "u" },
		"keyring":        func(x *dek.Header) { x.Keyring = "s" },
		"version":        func(x *dek.Header) { x.Version = 2 },
		"master version": func(x *dek.Header) { x.Master.Version = 9 },
		"seal version":   func(x *dek.Header) { x.SealVersion = 9 },
		"object":         func(x *dek.Header) { x.Object[0] ^= 1 },
	}
	foreign := must(dek.NewKey()) // an attacker can only wrap under a key of their own
	defer foreign.Destroy()
	asked := h.token.Calls(hsmtest.OpDecryptKey)
	var answers []string
	for name, edit := range edits {
		x := good.Header()
		edit(&x)
		forged := must(dek.Wrap(x, foreign, make([]byte, 256)))
		k, err := h.s.Unwrap(ctx, db1, forged)
		if k != nil || !errors.Is(err, dek.ErrAuth) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		answers = append(answers, err.Error())
	}
	for _, at := range []int{0, 40, 200, len(good.Bytes()) - 1} {
		b := good.Bytes()
		b[at] ^= 1
		w, err := dek.ParseWrapped(b)
		if err != nil {
			continue
		}
		if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrAuth) && !errors.Is(err, dek.ErrDenied) {
			t.Errorf("flipped byte %d: %v", at, err)
		}
	}
	for _, a := range answers {
		if a != answers[0] {
			t.Errorf("two answers: %q, %q", a, answers[0])
		}
	}
	if h.token.Calls(hsmtest.OpDecryptKey) != asked {
		t.Error("what the outer layer refuses reached the token")
	}
}

// TestLockout: 50 bad ciphertexts and the keyring is closed to the principal for
// an hour, with a record.
func TestLockout(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	good := h.wraps()[0]
	seal := must(dek.NewKey())
	defer seal.Destroy()
	bad := must(dek.Wrap(good.Header(), seal, make([]byte, 256)))
	for range 50 {
		if _, err := h.s.Unwrap(ctx, db1, bad); !errors.Is(err, dek.ErrAuth) {
			t.Fatal(err)
		}
	}
	for _, w := range []dek.Wrapped{bad, good} {
		if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("locked out: %v", err)
		}
	}
	if len(h.journal.of("keyring.lockout")) != 1 {
		t.Error("no record of the lock-out")
	}
	h.clock.jump(61 * time.Minute)
	h.bytesOf(good)
}

// TestCollapse: 64 callers of one cold DEK cost one token operation, and each
// has its own records.
func TestCollapse(t *testing.T) {
	const callers = 64
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	want := h.bytesOf(w)
	gate := make(chan struct{})
	var joined sync.WaitGroup
	joined.Add(callers)
	slow := &slowToken{token: h.token, gate: gate}
	h.s.Close()
	h.edit = func(c *kms.Config) { c.Token = slow }
	h.open()
	asked, events := h.token.Calls(hsmtest.OpDecryptKey), len(h.journal.of(kms.OpKeyringUnwrap))
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			joined.Done()
			k, err := h.s.Unwrap(t.Context(), db1, w)
			if err != nil {
				t.Error(err)
				return
			}
			defer k.Destroy()
			check(t, k.Use(func(b []byte) error {
				if string(b) != string(want) {
					return errors.New("another key")
				}
				return nil
			}))
		})
	}
	joined.Wait()
	for len(h.journal.of(kms.OpKeyringUnwrap)) < events+callers { // every intent is written
	}
	close(gate)
	all.Wait()
	if got := h.token.Calls(hsmtest.OpDecryptKey) - asked; got != 1 {
		t.Errorf("%d token operations, want 1", got)
	}
	if got := len(h.journal.of(kms.OpKeyringUnwrap)) - events; got != 2*callers {
		t.Errorf("%d records, want %d", got, 2*callers)
	}
}

// A slowToken decrypts once gate is closed.
type slowToken struct {
	token
	gate chan struct{}
}

func (s *slowToken) DecryptKey(ctx context.Context, id dek.ObjectID, hash crypto.Hash, inner []byte) (*dek.Key, error) {
	select {
	case <-s.gate:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", dek.ErrUnavailable, ctx.Err())
	}
	return s.token.DecryptKey(ctx, id, hash, inner)
}

// TestAbandoned: a leader that gives up does not take the others along.
func TestAbandoned(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	slow := &slowToken{token: h.token, gate: make(chan struct{})}
	h.s.Close()
	h.edit = func(c *kms.Config) { c.Token = slow }
	h.open()
	ctx, cancel := context.WithCancel(t.Context())
	events := len(h.journal.of(kms.OpKeyringUnwrap))
	wait := func(n int) {
		for len(h.journal.of(kms.OpKeyringUnwrap)) < events+n {
		}
	}
	var all sync.WaitGroup
	all.Go(func() {
		if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("leader: %v", err)
		}
	})
	wait(1)
	all.Go(func() { h.bytesOf(w) })
	wait(2)
	cancel()
	wait(3) // the leader's outcome
	close(slow.gate)
	all.Wait()
}

// TestBurst: who comes while others of a burst are still being answered shares
// their operation; who comes after a change, or after all have left, does not.
func TestBurst(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	operations := func() int { return h.token.Calls(hsmtest.OpDecryptKey) }
	asked := operations()
	h.bytesOf(w)
	h.bytesOf(w)
	if got := operations() - asked; got != 2 {
		t.Errorf("%d token operations for two unwraps, one after the other", got)
	}
	for _, tc := range []struct {
		name   string
		change func() error
		want   int
	}{
		{"nothing changed", func() error { return nil }, 1},
		{"a grant was added", func() error {
			return h.s.AddGrant(t.Context(), admin, kms.Grant{Principal: "person/x", Role: "auditor", Scope: "/"})
		}, 2},
	} {
		asked, once := operations(), false
		h.journal.before = func(e kms.Event) {
			if e.Phase == kms.PhaseOutcome && e.Operation == kms.OpKeyringUnwrap && !once {
				once = true
				check(t, tc.change())
				h.bytesOf(w)
			}
		}
		h.bytesOf(w)
		h.journal.before = nil
		if got := operations() - asked; got != tc.want {
			t.Errorf("%s before the first one's outcome: %d token operations, want %d", tc.name, got, tc.want)
		}
	}
}

// TestDisableHolds: no unwrap that begins after a disable returned succeeds,
// under load.
func TestDisableHolds(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	w := h.wraps()[0]
	set := func(on bool) {
		_, err := h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Enabled: on})
		check(t, err)
	}
	var load sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if k, err := h.s.Unwrap(ctx, db1, w); err == nil {
					k.Destroy()
				}
			}
		})
	}
	for range 20 {
		set(false)
		for range 5 {
			if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrDenied) {
				t.Fatalf("unwrap after disable: %v", err)
			}
		}
		set(true)
		h.bytesOf(w)
	}
	close(stop)
	load.Wait()
}

// ghost is a wrapped DEK of a keyring that is not there.
func (h *house) ghost() dek.Wrapped {
	absent := h.wraps()[0].Header()
	absent.Keyring = "nothere"
	seal := must(dek.NewKey())
	defer seal.Destroy()
	return must(dek.Wrap(absent, seal, make([]byte, 256)))
}

// calls are one of every kind: to what is there, and to what is not.
func (h *house) calls(ctx context.Context) map[string]func(kms.Caller) error {
	w, ghost := h.wraps()[0], h.ghost()
	return map[string]func(kms.Caller) error{
		"unwrap":  func(c kms.Caller) error { _, err := h.s.Unwrap(ctx, c, w); return err },
		"absent":  func(c kms.Caller) error { _, err := h.s.Unwrap(ctx, c, ghost); return err },
		"vault":   func(c kms.Caller) error { _, err := h.s.CreateVault(ctx, c, "x"); return err },
		"vaults":  func(c kms.Caller) error { _, err := h.s.Vaults(ctx, c); return err },
		"key":     func(c kms.Caller) error { _, err := h.s.Key(ctx, c, "v", "k"); return err },
		"no key":  func(c kms.Caller) error { _, err := h.s.Key(ctx, c, "v", "nothere"); return err },
		"keys":    func(c kms.Caller) error { _, err := h.s.Keys(ctx, c, "v"); return err },
		"no keys": func(c kms.Caller) error { _, err := h.s.Keys(ctx, c, "nothere"); return err },
		"roll": func(c kms.Caller) error {
			_, err := h.s.RollKey(ctx, c, kms.RollKey{Vault: "v", Name: "k"})
			return err
		},
		"ring":  func(c kms.Caller) error { _, err := h.s.Keyring(ctx, c, "v", "r"); return err },
		"rings": func(c kms.Caller) error { _, err := h.s.Keyrings(ctx, c, "v"); return err },
		"rollr": func(c kms.Caller) error {
			_, err := h.s.RollKeyring(ctx, c, kms.RollKeyring{Vault: "v", Name: "r"})
			return err
		},
		"rewrap": func(c kms.Caller) error { _, err := h.s.RewrapKey(ctx, c, "v", "k", nil); return err },
		"off": func(c kms.Caller) error {
			_, err := h.s.SetKeyEnabled(ctx, c, kms.SetEnabled{Vault: "v", Name: "k"})
			return err
		},
		"prepare": func(c kms.Caller) error {
			_, _, err := h.s.PrepareInstance(ctx, c, kms.PrepareInstance{Kind: "mariadb", Name: "x", Vault: "v", Keyrings: []string{"r"}})
			return err
		},
		"instances": func(c kms.Caller) error { _, err := h.s.Instances(ctx, c); return err },
		"open": func(c kms.Caller) error {
			_, err := h.s.OpenInstance(ctx, c, kms.OpenInstance{Instance: "db1"})
			return err
		},
		"open none": func(c kms.Caller) error {
			_, err := h.s.OpenInstance(ctx, c, kms.OpenInstance{Instance: "nothere"})
			return err
		},
		"watch": func(c kms.Caller) error {
			return h.s.WatchInstance(ctx, c, "db1", func(kms.Notice) error { return context.Canceled })
		},
		"report": func(c kms.Caller) error { return h.s.ReportUsage(ctx, c, "db1", nil) },
		"revoke": func(c kms.Caller) error { return h.s.RevokeInstance(ctx, c, "nothere") },
		"grant": func(c kms.Caller) error {
			return h.s.AddGrant(ctx, c, kms.Grant{Principal: "person/x", Role: "auditor", Scope: "/"})
		},
		"ungrant": func(c kms.Caller) error {
			return h.s.RemoveGrant(ctx, c, kms.Grant{Principal: "person/x", Role: "auditor", Scope: "/"})
		},
		"grants": func(c kms.Caller) error { _, err := h.s.Grants(ctx, c, ""); return err },
		"token":  func(c kms.Caller) error { _, err := h.s.NewEnrolmentToken(ctx, c, "person/x", 0); return err },
		"deny":   func(c kms.Caller) error { return h.s.RevokeIdentity(ctx, c, "person/x") },
		"status": func(c kms.Caller) error { _, err := h.s.Status(ctx, c); return err },
		"backup": func(c kms.Caller) error { return h.s.Backup(ctx, c, &strings.Builder{}) },
		"log":    func(c kms.Caller) error { return h.s.AuthorizeAudit(ctx, c, kms.OpAuditRead, "/") },
	}
}

// TestDenials: strangers, absent and forbidden objects all look the same.
func TestDenials(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	change := must(h.s.Status(ctx, admin)).Changes
	for name, call := range h.calls(ctx) {
		t.Run(name, func(t *testing.T) {
			before := len(h.journal.events)
			err := call(db2)
			if !errors.Is(err, dek.ErrDenied) || strings.Contains(err.Error(), "nothere") {
				t.Fatalf("got %v, want %v and no name", err, dek.ErrDenied)
			}
			got := h.journal.events[before:]
			if len(got) != 1 || got[0].Phase != kms.PhaseRefused || got[0].Result != "denied" {
				t.Errorf("records: %+v", got)
			}
		})
	}
	if now := must(h.s.Status(ctx, admin)).Changes; now != change {
		t.Errorf("refused calls changed the state from %d to %d", change, now)
	}
}
