package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek/recovery"
)

// A wreck is an installation whose token and store are lost, after an older
// backup and a keyring that was switched off.
type wreck struct {
	*installation
	audit string   // its audit_dir
	args  []string // of restore, with enough shares
}

func newWreck(t *testing.T) *wreck {
	t.Helper()
	dir := t.TempDir()
	recipient, parts, err := recovery.Generate(2, 3, "test")
	if err != nil {
		t.Fatal(err)
	}
	save := func(name string, b []byte) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	w := &wreck{audit: filepath.Join(dir, "audit")}
	w.installation = newInstallation(t, nil, map[string]any{"audit_dir": w.audit, "recovery_recipient_file": save("recipient", []byte(recipient.String()))})
	w.args = []string{"restore", "--config", w.config(), "--backup", w.path("old.backup")}
	for i, p := range parts[:2] {
		text, err := p.Text()
		if err != nil {
			t.Fatal(err)
		}
		w.args = append(w.args, "--share-file", save(fmt.Sprint("share", i), text))
	}
	w.run(exitDone, "backup", "--config", w.config(), "-o", w.path("old.backup"))
	if _, err := w.officer.SetKeyringEnabled(w.ctx(), connector.Switch{Vault: "v", Name: "ring"}); err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.lose(w.path("state"), w.path("token"))
	return w
}

func (w *wreck) lose(names ...string) {
	w.t.Helper()
	for _, name := range names {
		if err := os.RemoveAll(name); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *wreck) run(status int, args ...string) string {
	w.t.Helper()
	out, got := w.try(args...)
	if got != status {
		w.t.Fatalf("%v: status %d, want %d:\n%s", args, got, status, out)
	}
	return out
}

func (w *wreck) aside() []string {
	aside, _ := filepath.Glob(w.audit + asideMark + "*")
	return aside
}

// TestRestoreComparesLogBefore: token and store are lost, the audit log is not.
// An older backup is refused although the token is new; accepted, it keeps off
// what was off; the log before is moved aside whole.
func TestRestoreComparesLogBefore(t *testing.T) {
	w := newWreck(t)
	if out := w.run(exitFailed, w.args...); !strings.Contains(out, "--accept-rollback") {
		t.Errorf("an older backup:\n%s", out)
	}
	if aside := w.aside(); len(aside) != 0 {
		t.Errorf("a refused restore moved the log aside: %v", aside)
	}
	out := w.run(exitDone, append(w.args, "--accept-rollback")...)
	aside := w.aside()
	if len(aside) != 1 || !strings.Contains(out, aside[0]) || !strings.Contains(out, "kept disabled: keyring v/ring") || strings.Contains(out, "NOT COMPARED") {
		t.Fatalf("moved aside: %v\n%s", aside, out)
	}
	newest, err := filepath.Glob(filepath.Join(aside[0], "*.checkpoints"))
	if err != nil || len(newest) != 1 {
		t.Fatal(newest, err)
	}
	text, err := os.ReadFile(newest[0])
	if err != nil {
		t.Fatal(err)
	}
	log, _, _ := strings.Cut(string(text), "\n")
	if !strings.Contains(out, "audit checkpoint of the backup: "+log+" ") || !regexp.MustCompile(`(?m)^audit key of the backup: [0-9a-f]{64}$`).MatchString(out) {
		t.Errorf("the report names no key and checkpoint of log %s:\n%s", log, out)
	}
	w.start()
	if ring, err := w.officer.Keyring(w.ctx(), "v", "ring"); err != nil || ring.Current != 0 {
		t.Errorf("the keyring that was off: %+v, %v", ring, err)
	}
	w.stop()
}

// TestRestoreFindsLogBefore: where the log before may be, and where it is not.
func TestRestoreFindsLogBefore(t *testing.T) {
	w := newWreck(t)
	accept := append(w.args, "--accept-rollback")
	w.run(exitDone, accept...)
	aside := w.aside()
	// An audit_dir that holds the log of a later restore.
	w.lose(w.path("state"), w.path("token"))
	if out := w.run(exitFailed, accept...); !strings.Contains(out, "move it away") {
		t.Errorf("over a later log:\n%s", out)
	}
	w.lose(w.audit)
	if out := w.run(exitDone, append(accept, "--old-audit-dir", aside[0])...); !strings.Contains(out, "kept disabled: keyring v/ring") {
		t.Errorf("with --old-audit-dir:\n%s", out)
	}
	w.lose(append(aside, w.audit, w.path("state"), w.path("token"))...)
	if out := w.run(exitDone, w.args...); !strings.Contains(out, "NOT COMPARED") {
		t.Errorf("without any log before:\n%s", out)
	}
}
