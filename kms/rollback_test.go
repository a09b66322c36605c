package kms_test

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// rollBack restores b to the same token and log and opens it.
func (h *house) rollBack(b []byte) (*house, kms.RestoreReport) {
	h.t.Helper()
	h.s.Close()
	n := h.elsewhere(false)
	rep, err := n.restore(b, kms.RestoreOptions{AcceptRollback: true})
	check(h.t, err)
	n.open()
	return n, rep
}

// noNumberAgain rolls keyring r and key k of n and fails if a number that old
// has goes to another key.
func (n *house) noNumberAgain(old dek.Wrapped, server uint32, master dek.Version) {
	n.t.Helper()
	ctx := n.t.Context()
	ring, err := n.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
	check(n.t, err)
	made := ring.Versions[len(ring.Versions)-1]
	if made.Version <= old.ID().Version || made.ServerVersion <= server {
		n.t.Errorf("version %d (server version %d) was given out before the restore", made.Version, made.ServerVersion)
	}
	if lost := ring.Versions[old.ID().Version-1]; lost.State != kms.Failed || lost.ServerVersion != server {
		n.t.Errorf("the lost version is %+v, want a failed one with server version %d", lost, server)
	}
	k, err := n.s.Unwrap(ctx, db1, old)
	k.Destroy()
	if !errors.Is(err, dek.ErrDenied) {
		n.t.Errorf("a wrap that is lost: %v", err)
	}
	key, err := n.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
	check(n.t, err)
	if got := key.Current; got <= master {
		n.t.Errorf("master key version %d was given out before the restore", got)
	}
}

// TestRollbackKeepsNumbers: version numbers are in the headers of pages and of
// wrapped DEKs that agents hold; an accepted rollback never gives one again.
func TestRollbackKeepsNumbers(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	b := h.backup()
	ctx := t.Context()
	for range 2 {
		_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
		check(t, err)
	}
	_, err := h.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
	check(t, err)
	old := h.wraps()[2]
	n, rep := h.rollBack(b)
	if s := fmt.Sprint(rep.Reserved); !strings.Contains(s, "/vaults/v/keyrings/r versions 3 to 3") || !strings.Contains(s, "/vaults/v/keys/k versions 2 to 2") {
		t.Errorf("reserved: %v", rep.Reserved)
	}
	n.noNumberAgain(old, 5, 2)
}

// TestRollbackKeepsNames: what was made after the backup leaves its name and
// numbers behind.
func TestRollbackKeepsNames(t *testing.T) {
	text, private := people(t)
	for _, fresh := range []bool{false, true} {
		t.Run(fmt.Sprint("fresh token ", fresh), func(t *testing.T) {
			h := newHouse(t, text)
			h.furnish()
			b := h.backup()
			ctx := t.Context()
			for _, vault := range []string{"v", "w"} {
				if vault == "w" {
					_, err := h.s.CreateVault(ctx, officer, vault)
					check(t, err)
				}
				_, err := h.s.CreateKey(ctx, officer, kms.CreateKey{Vault: vault, Name: "k2", Bits: 2048})
				check(t, err)
				_, err = h.s.CreateKeyring(ctx, officer, kms.CreateKeyring{Vault: vault, Name: "r2", MasterKey: "k2", ServerKey: 7})
				check(t, err)
			}
			h.s.Close()
			n := h.elsewhere(fresh)
			opt := kms.RestoreOptions{AcceptRollback: true}
			if fresh { // as the rest of the log before would be, were it joined
				opt.Private, n.journal = private, h.journal
			}
			_, err := n.restore(b, opt)
			check(t, err)
			n.open()
			if _, err := n.s.CreateVault(ctx, officer, "w"); !errors.Is(err, dek.ErrExists) {
				t.Errorf("a vault of a name that was used: %v", err)
			}
			for _, vault := range []string{"v", "w"} {
				k, err := n.s.CreateKey(ctx, officer, kms.CreateKey{Vault: vault, Name: "k2", Bits: 2048})
				check(t, err)
				if k.Current != 2 || k.Versions[0].State != kms.Failed {
					t.Errorf("key of a name that was used: %+v", k)
				}
				r, err := n.s.CreateKeyring(ctx, officer, kms.CreateKeyring{Vault: vault, Name: "r2", MasterKey: "k2", ServerKey: 7})
				check(t, err)
				if r.Current != 2 || r.Versions[1].ServerVersion != 3 || r.ServerKey != 7 {
					t.Errorf("keyring of a name that was used: %+v", r)
				}
			}
		})
	}
}

// TestRollbackAfterCrash: the outcome of a roll is missing from the log. A start
// that found the change says what it was; without one, the open intent counts.
func TestRollbackAfterCrash(t *testing.T) {
	for _, started := range []bool{true, false} {
		t.Run(fmt.Sprint("started again ", started), func(t *testing.T) {
			h := newHouse(t, "")
			h.furnish()
			b := h.backup()
			ctx := t.Context()
			h.journal.fail = func(_ int, e kms.Event) storetest.Fault {
				if e.Phase == kms.PhaseOutcome && (e.Operation == kms.OpKeyringRoll || e.Operation == kms.OpKeyRoll || e.Operation == kms.OpIdentityRevoke) {
					return storetest.FailedNotDone
				}
				return 0
			}
			if _, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"}); !errors.Is(err, dek.ErrUnavailable) {
				t.Fatal(err)
			}
			_, _ = h.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
			_ = h.s.RevokeIdentity(ctx, admin, "person/mallory")
			old := h.wraps()[1]
			h.journal.fail = nil
			if started {
				h.reopen()
			} else {
				h.journal.closeIntents()
			}
			n, _ := h.rollBack(b)
			n.noNumberAgain(old, 3, 2)
			if started && !n.s.Revoked("person/mallory", "") {
				t.Error("an identity whose revocation a start found is back")
			}
		})
	}
}

// TestNewTokenReadsLogBefore: a new token and a new log are no way around what
// the log before knows.
func TestNewTokenReadsLogBefore(t *testing.T) {
	text, private := people(t)
	h := newHouse(t, text)
	h.furnish()
	ctx := t.Context()
	b := h.backup()
	_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
	check(t, err)
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k"})
	check(t, err)
	h.s.Close()
	n := h.elsewhere(true)
	opt := kms.RestoreOptions{Private: private,
		Before: func(_ context.Context, previous kms.PreviousLog) (kms.AuditTail, error) {
			if previous.Key == nil || !strings.HasPrefix(string(previous.Checkpoint), "test/log\n") {
				t.Errorf("the log before is asked for as %+v", previous)
			}
			return h.journal, nil
		},
		OpenAudit: func(context.Context, crypto.Signer, *kms.PreviousLog) (kms.Auditor, error) { return n.journal, nil },
	}
	if _, err := n.restore(b, opt); !errors.Is(err, dek.ErrCorrupt) {
		t.Fatalf("restore of an older backup to a new token: %v", err)
	}
	if objects := must(n.token.Objects(ctx)); len(objects) != 0 || len(snapshot(t, n.store)) != 0 {
		t.Errorf("a refused restore left %d objects and %d records", len(objects), len(snapshot(t, n.store)))
	}
	opt.AcceptRollback = true
	rep, err := n.restore(b, opt)
	check(t, err)
	if len(rep.Missing) != 2 || len(rep.KeptDisabled) == 0 || len(rep.Reserved) != 1 || rep.Uncompared {
		t.Errorf("report %+v", rep)
	}
	n.open()
	if k := must(n.s.Key(ctx, officer, "v", "k")); k.Current != 0 {
		t.Errorf("a disabled key is enabled after a restore to a new token: %+v", k)
	}
	// Without the log before the report says so.
	n = h.elsewhere(true)
	opt.AcceptRollback, opt.Before = false, func(context.Context, kms.PreviousLog) (kms.AuditTail, error) { return nil, nil }
	if rep, err = n.restore(b, opt); err != nil || !rep.Uncompared {
		t.Errorf("without the log before: %v, report %+v", err, rep)
	}
}
