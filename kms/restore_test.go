package kms_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// people makes a recovery recipient and joins three of its five shares.
func people(t testing.TB) (string, *recovery.Private) {
	t.Helper()
	r, shares, err := recovery.Generate(3, 5, "test")
	check(t, err)
	p, err := recovery.Combine(shares[1:4])
	check(t, err)
	t.Cleanup(p.Destroy)
	return r.String(), p
}

// backup takes one as the root of the host.
func (h *house) backup() []byte {
	h.t.Helper()
	var b bytes.Buffer
	check(h.t, h.s.Backup(h.t.Context(), root, &b))
	return b.Bytes()
}

// elsewhere is a new empty house; same token unless fresh.
func (h *house) elsewhere(fresh bool) *house {
	n := *h
	n.store, n.s = storetest.NewMemory(), nil
	if fresh {
		n.tokenIn = h.t.TempDir() + "/token"
		n.token = token{hsmtest.OpenFake(h.t, n.tokenIn)}
		n.journal = &journal{}
	}
	return &n
}

func (h *house) restore(b []byte, opt kms.RestoreOptions) (kms.RestoreReport, error) {
	return kms.Restore(h.t.Context(), h.config(), bytes.NewReader(b), opt)
}

func TestRestoreSameToken(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	want := h.bytesOf(w)
	b := h.backup()
	h.s.Close()

	if _, err := h.restore(b, kms.RestoreOptions{}); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("restore over a store in use: %v", err)
	}
	n := h.elsewhere(false)
	rep, err := n.restore(b, kms.RestoreOptions{})
	check(t, err)
	if rep.NewKeys != 0 || len(rep.Lost) != 0 || rep.Installation == "" {
		t.Errorf("report %+v", rep)
	}
	n.open()
	if got := n.bytesOf(w); string(got) != string(want) {
		t.Error("another key after the restore")
	}
	if _, err := n.restore(b, kms.RestoreOptions{}); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("second restore: %v", err)
	}
	// Another token without shares.
	other := h.elsewhere(true)
	if _, err := other.restore(b, kms.RestoreOptions{}); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("restore to another token without shares: %v", err)
	}
}

// A lost is what is left of a house that had a disabled key, two versions of a
// keyring, a blob and an enrolment token that nobody had used; its token died.
type lost struct {
	house  *house
	wraps  []dek.Wrapped // what db1 has
	keys   [][]byte      // and what they open to
	token  *kms.EnrolmentToken
	backup []byte
	seen   []byte // the checkpoint that an agent has
}

func loseHouse(t *testing.T, recipient string) *lost {
	t.Helper()
	h := newHouse(t, recipient)
	h.furnish()
	ctx := t.Context()
	_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
	check(t, err)
	_, err = h.s.RollKey(ctx, officer, kms.RollKey{Vault: "v", Name: "k"})
	check(t, err)
	_, err = h.s.CreateKey(ctx, officer, kms.CreateKey{Vault: "v", Name: "off", Bits: 2048})
	check(t, err)
	_, err = h.s.CreateKeyring(ctx, officer, kms.CreateKeyring{Vault: "v", Name: "o", MasterKey: "off"})
	check(t, err)
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "off"})
	check(t, err)
	check(t, h.s.PutBlob(ctx, "tls/ca", []byte("certificates")))
	l := &lost{house: h, wraps: h.wraps()}
	l.keys = [][]byte{h.bytesOf(l.wraps[0]), h.bytesOf(l.wraps[1])}
	_, l.token, err = h.s.PrepareInstance(ctx, officer, kms.PrepareInstance{Kind: "mariadb", Name: "db2", Vault: "v", Keyrings: []string{"r"}})
	check(t, err)
	l.backup = h.backup()
	l.seen, err = h.journal.Head(ctx)
	check(t, err)
	h.s.Close()
	return l
}

func TestRestoreNewToken(t *testing.T) {
	text, private := people(t)
	l := loseHouse(t, text)
	n := l.house.elsewhere(true)
	_, wrong := people(t)
	if _, err := n.restore(l.backup, kms.RestoreOptions{Private: wrong}); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("restore with another recovery key: %v", err)
	}
	text2, private2 := people(t)
	n.restoreLinked(t, l.backup, kms.RestoreOptions{Private: private, Recipient: text2})
	n.open()
	n.wantRestored(t, l)
	n.wantAgentsOf(t, l)

	// And the whole way once more with the new people.
	n.reopen()
	b2 := n.backup()
	n.s.Close()
	third := n.elsewhere(true)
	if _, err := third.restore(b2, kms.RestoreOptions{Private: private}); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("the old people open the new backup: %v", err)
	}
	_, err := third.restore(b2, kms.RestoreOptions{Private: private2})
	check(t, err)
	third.open()
	if got := third.bytesOf(third.wraps()[0]); string(got) != string(l.keys[0]) {
		t.Error("another key after the second restore")
	}
}

// restoreLinked restores the backup of a lost house, with a new log that is
// linked to the one before.
func (h *house) restoreLinked(t *testing.T, backup []byte, opt kms.RestoreOptions) {
	t.Helper()
	var linked *kms.PreviousLog
	opt.OpenAudit = func(_ context.Context, signer crypto.Signer, previous *kms.PreviousLog) (kms.Auditor, error) {
		if signer.Public() == nil {
			t.Error("no audit key")
		}
		linked = previous
		return h.journal, nil
	}
	rep, err := h.restore(backup, opt)
	check(t, err)
	if _, err := x509.ParsePKIXPublicKey(rep.AuditKey); err != nil || !bytes.HasPrefix(rep.Checkpoint, []byte("test/log\n")) {
		t.Errorf("nothing to compare the backup by: key %v, checkpoint %q", err, rep.Checkpoint)
	}
	if rep.NewKeys != 2 || rep.Rewrapped != 3 || len(rep.Lost) != 0 || len(rep.KeptDisabled) != 1 {
		t.Errorf("report %+v", rep)
	}
	if linked == nil || linked.Key == nil || !bytes.HasPrefix(linked.Checkpoint, []byte("test/log\n")) {
		t.Errorf("the new log is not linked: %+v", linked)
	}
	if e := h.journal.events[0]; e.Operation != kms.OpRestore || !strings.Contains(e.Note, "test/log") {
		t.Errorf("first record of the new log: %+v", e)
	}
}

// wantRestored checks that the lost house is here, under a new token.
func (h *house) wantRestored(t *testing.T, l *lost) {
	t.Helper()
	ctx := t.Context()
	now := h.wraps()
	if len(now) != 2 {
		t.Fatalf("%d wraps, want 2", len(now))
	}
	for i, w := range now {
		if got := h.bytesOf(w); string(got) != string(l.keys[i]) {
			t.Errorf("version %d: another key", i+1)
		}
		if _, err := h.s.Unwrap(ctx, db1, l.wraps[i]); !errors.Is(err, dek.ErrConflict) {
			t.Errorf("old wrap %d: %v", i, err)
		}
	}
	ring := must(h.s.Keyring(ctx, officer, "v", "r"))
	if ring.Current != 2 || ring.Versions[1].ServerVersion != 3 {
		t.Errorf("keyring after the restore: %+v", ring)
	}
	if k := must(h.s.Key(ctx, officer, "v", "off")); k.Current != 0 || k.Versions[1].State != kms.Disabled {
		t.Errorf("disabled key after the restore: %+v", k)
	}
	if c, ok := h.s.Blob("tls/ca"); !ok || string(c) != "certificates" {
		t.Error("blob lost")
	}
	// A token from before may have been used meanwhile.
	err := h.s.Redeem(ctx, kms.Caller{Remote: "1.2.3.4:5"}, l.token.Text, func(string) error { return nil })
	if !errors.Is(err, dek.ErrDenied) {
		t.Errorf("old enrolment token: %v", err)
	}
}

// wantAgentsOf checks what agents of the lost house meet here.
func (h *house) wantAgentsOf(t *testing.T, l *lost) {
	t.Helper()
	ctx, w := t.Context(), h.wraps()[0]
	// An agent with a checkpoint of the log before is served.
	h.journal.stale = l.seen
	if _, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true, Checkpoint: l.seen}); err != nil {
		t.Errorf("agent with an old checkpoint: %v", err)
	}
	// One that has seen changes the backup has not stops everything.
	h.journal.stale = []byte("test/log\n999\nchange 99999 -\n")
	if _, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Checkpoint: h.journal.stale}); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("agent that has seen more: %v", err)
	}
	if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("unwrap on a service that is behind: %v", err)
	}
}

// TestRestoreRollback: an older backup is refused while the log knows more, and
// accepting it keeps off what was switched off.
func TestRestoreRollback(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ctx := t.Context()
	w := h.wraps()[0]
	_, _, err := h.s.PrepareInstance(ctx, officer, kms.PrepareInstance{Kind: "mariadb", Name: "db2", Vault: "v", Keyrings: []string{"r"}})
	check(t, err)
	b := h.backup()
	_, err = h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Version: 1})
	check(t, err)
	check(t, h.s.RevokeInstance(ctx, officer, "db2"))
	check(t, h.s.RevokeIdentity(ctx, admin, "person/mallory"))
	check(t, h.s.RemoveGrant(ctx, admin, kms.Grant{Principal: auditor.Principal, Role: "auditor", Scope: "/"}))
	_, err = h.s.CreateVault(ctx, officer, "lost")
	check(t, err)
	h.s.Close()

	n := h.elsewhere(false)
	if _, err := n.restore(b, kms.RestoreOptions{}); !errors.Is(err, dek.ErrCorrupt) {
		t.Fatalf("restore of an older backup: %v", err)
	}
	rep, err := n.restore(b, kms.RestoreOptions{AcceptRollback: true})
	check(t, err)
	if !strings.Contains(fmt.Sprint(rep.Missing), "/vaults/lost") || len(rep.KeptDisabled) != 4 {
		t.Errorf("report %+v", rep)
	}
	n.open()
	if _, err := n.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("the disabled key is back: %v", err)
	}
	for _, p := range []string{"host/db2", "person/mallory"} {
		if !n.s.Revoked(p, "") {
			t.Errorf("%s is no longer revoked", p)
		}
	}
	if g := must(n.s.Grants(ctx, admin, auditor.Principal)); len(g) != 0 {
		t.Errorf("grants that were taken back: %v", g)
	}
}

// TestRestoreInterrupted stops a restore at each commit; it can only be run
// again, and then all is there.
func TestRestoreInterrupted(t *testing.T) {
	text, private := people(t)
	h := newHouse(t, text)
	h.furnish()
	want := h.bytesOf(h.wraps()[0])
	b := h.backup()
	h.s.Close()
	for at := 1; at <= 3; at++ {
		for _, mode := range []storetest.Fault{storetest.FailedNotDone, storetest.FailedButDone} {
			t.Run(fmt.Sprintf("%d/mode%d", at, mode), func(t *testing.T) {
				n := h.elsewhere(true)
				n.t = t
				n.store.Inject(storetest.FailNth("commit", at, mode), nil)
				_, err := n.restore(b, kms.RestoreOptions{Private: private})
				n.store.Inject(nil, nil)
				if err != nil {
					if err := n.tryOpen(); !errors.Is(err, dek.ErrPrecondition) {
						t.Errorf("open after an interrupted restore: %v", err)
					}
					_, err = n.restore(b, kms.RestoreOptions{Private: private})
					check(t, err)
				}
				n.open()
				if got := n.bytesOf(n.wraps()[0]); string(got) != string(want) {
					t.Error("another key")
				}
				if st := must(n.s.Status(t.Context(), admin)); len(st.Quarantined) != 0 {
					t.Errorf("a second set of objects was made: %x", st.Quarantined)
				}
			})
		}
	}
}

// TestBackupDamage: every prefix and flips all over are refused; two backups of
// one state have nothing in common behind the header.
func TestBackupDamage(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	check(t, h.s.PutBlob(t.Context(), "big", make([]byte, 150<<10))) // several chunks
	b, b2 := h.backup(), h.backup()
	h.s.Close()
	n := h.elsewhere(false)
	refused := func(what string, b []byte) {
		t.Helper()
		if _, err := n.restore(b, kms.RestoreOptions{AcceptRollback: true}); err == nil || errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("%s: %v", what, err)
		}
	}
	step := 1 + len(b)/200
	for i := 0; i < len(b); i += step {
		refused(fmt.Sprint("prefix ", i), b[:i])
		c := bytes.Clone(b)
		c[i] ^= 1 << (i % 8)
		refused(fmt.Sprint("flip ", i), c)
	}
	refused("extended", append(bytes.Clone(b), 0))
	refused("joined", append(bytes.Clone(b[:len(b)/2]), b2[len(b)/2:]...))
	if len(snapshot(t, n.store)) != 0 {
		t.Error("a refused backup left records in the store")
	}
	same := 0
	for i := 2000; i+16 < min(len(b), len(b2)); i++ {
		if bytes.Equal(b[i:i+16], b2[i:i+16]) {
			same++
		}
	}
	if same > 0 {
		t.Errorf("%d equal blocks in two backups", same)
	}
	if err := h.tryOpen(); err != nil {
		t.Fatal(err)
	}
	defer h.s.Close()
	if err := h.s.Backup(t.Context(), root, failingWriter{}); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("backup to a full disk: %v", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }
