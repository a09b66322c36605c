package kms_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/etcdstore"
)

// A realToken is the software token as the service program uses it.
type realToken struct{ *hsm.Software }

func (r realToken) OAEPHash() crypto.Hash  { return r.Capabilities().PreferredOAEP() }
func (realToken) RestsOnRSA(b []byte) bool { return hsm.RestsOnRSA(b) }
func (r realToken) Describe() string       { return r.Identity().Label }

// realConfig opens the real store, log and token in one directory.
func realConfig(t *testing.T, dir, tokenDir string, link *audit.Link) kms.Config {
	t.Helper()
	soft, err := hsm.OpenSoftware(tokenDir)
	check(t, err)
	t.Cleanup(func() { soft.Close() })
	store, err := etcdstore.Open(t.Context(), etcdstore.Config{Dir: dir + "/etcd"})
	check(t, err)
	t.Cleanup(func() { store.Close() })
	return kms.Config{
		Token: realToken{soft}, Store: store, Clock: &clock{}, Authorizer: must(access.New(kms.Operations()...)), Strict: true,
		OpenAudit: func(ctx context.Context, signer crypto.Signer) (kms.Auditor, error) {
			return audit.Open(ctx, audit.Config{Dir: dir + "/audit", Signer: signer, Link: link})
		},
	}
}

// TestRealParts runs a life, a restart and a disaster on the real embedded
// store, the real log and the software token.
func TestRealParts(t *testing.T) {
	if testing.Short() {
		t.Skip("starts etcd")
	}
	ctx := t.Context()
	text, private := people(t)
	dir, tokenDir := t.TempDir(), t.TempDir()+"/token"
	cfg := realConfig(t, dir, tokenDir, nil)
	_, err := kms.Init(ctx, cfg, kms.InitRequest{Recipient: text, FirstAdministrator: admin.Principal})
	check(t, err)
	if _, err := kms.Init(ctx, cfg, kms.InitRequest{FirstAdministrator: admin.Principal}); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("second init: %v", err)
	}
	h := &house{t: t}
	h.s, err = kms.Open(ctx, cfg)
	check(t, err)
	h.furnish()
	w := h.wraps()[0]
	want := h.bytesOf(w)
	view, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true})
	check(t, err)
	check(t, h.s.Close())
	h.s, err = kms.Open(ctx, cfg)
	check(t, err)
	if got := h.bytesOf(w); !bytes.Equal(got, want) {
		t.Error("another key after a restart")
	}
	view, err = h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true, Checkpoint: view.Checkpoint})
	check(t, err)
	backup := h.backup()
	for range 20 {
		h.bytesOf(w) // the log goes on after the backup
	}
	view, err = h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Checkpoint: view.Checkpoint})
	check(t, err)
	check(t, h.s.Close())

	// Token, store and log are gone.
	checkpoint := h.openElsewhere(t, backup, private)
	// The agent comes back with the newest checkpoint of the old log, which is
	// newer than the backup.
	back, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true, Checkpoint: view.Checkpoint})
	check(t, err)
	_, err = h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true, Checkpoint: back.Checkpoint})
	check(t, err)
	if got := h.bytesOf(h.wraps()[0]); !bytes.Equal(got, want) {
		t.Error("another key after the disaster")
	}
	if len(checkpoint) == 0 || bytes.Equal(checkpoint, back.Checkpoint) {
		t.Error("the new log is the old one")
	}
}

// openElsewhere restores a backup with real parts that are all new, opens them
// and returns the checkpoint that the restore ended with.
func (h *house) openElsewhere(t *testing.T, backup []byte, private *recovery.Private) []byte {
	t.Helper()
	ctx, dir := t.Context(), t.TempDir()
	cfg := realConfig(t, dir, t.TempDir()+"/token", nil)
	rep, err := kms.Restore(ctx, cfg, bytes.NewReader(backup), kms.RestoreOptions{
		Private: private,
		OpenAudit: func(ctx context.Context, signer crypto.Signer, previous *kms.PreviousLog) (kms.Auditor, error) {
			link := &audit.Link{Checkpoint: previous.Checkpoint, Key: previous.Key}
			return audit.Open(ctx, audit.Config{Dir: dir + "/audit", Signer: signer, Link: link})
		},
	})
	check(t, err)
	if rep.NewKeys != 1 || rep.Rewrapped != 1 {
		t.Errorf("report %+v", rep)
	}
	s, err := kms.Open(ctx, cfg)
	check(t, err)
	h.s = s
	t.Cleanup(func() { s.Close() })
	return rep.Checkpoint
}
