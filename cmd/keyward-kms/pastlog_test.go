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

// TestRestoreComparesLogBefore: token and store are lost, the audit log is not.
// An older backup is refused although the token is new; accepted, it keeps off
// what was off; the log before is moved aside whole.
func TestRestoreComparesLogBefore(t *testing.T) {
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
	audit := filepath.Join(dir, "audit")
	in := newInstallation(t, nil, map[string]any{"audit_dir": audit, "recovery_recipient_file": save("recipient", []byte(recipient.String()))})
	args := []string{"restore", "--config", in.config(), "--backup", in.path("old.backup")}
	for i, p := range parts[:2] {
		text, err := p.Text()
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "--share-file", save(fmt.Sprint("share", i), text))
	}
	run := func(status int, args ...string) string {
		t.Helper()
		out, got := in.try(args...)
		if got != status {
			t.Fatalf("%v: status %d, want %d:\n%s", args, got, status, out)
		}
		return out
	}
	run(exitDone, "backup", "--config", in.config(), "-o", in.path("old.backup"))
	if _, err := in.officer.SetKeyringEnabled(in.ctx(), connector.Switch{Vault: "v", Name: "ring"}); err != nil {
		t.Fatal(err)
	}
	in.stop()
	for _, lost := range []string{"state", "token"} {
		if err := os.RemoveAll(in.path(lost)); err != nil {
			t.Fatal(err)
		}
	}
	if out := run(exitFailed, args...); !strings.Contains(out, "--accept-rollback") {
		t.Errorf("an older backup:\n%s", out)
	}
	if aside, _ := filepath.Glob(audit + asideMark + "*"); len(aside) != 0 {
		t.Errorf("a refused restore moved the log aside: %v", aside)
	}
	out := run(exitDone, append(args, "--accept-rollback")...)
	aside, _ := filepath.Glob(audit + asideMark + "*")
	if len(aside) != 1 || !strings.Contains(out, aside[0]) || !strings.Contains(out, "kept disabled: keyring v/ring") || strings.Contains(out, "NOT COMPARED") {
		t.Errorf("moved aside: %v\n%s", aside, out)
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
	in.start()
	if ring, err := in.officer.Keyring(in.ctx(), "v", "ring"); err != nil || ring.Current != 0 {
		t.Errorf("the keyring that was off: %+v, %v", ring, err)
	}
	in.stop()
	// Once more, with an audit_dir that holds a log of a later restore.
	for _, lost := range []string{"state", "token"} {
		if err := os.RemoveAll(in.path(lost)); err != nil {
			t.Fatal(err)
		}
	}
	if out := run(exitFailed, append(args, "--accept-rollback")...); !strings.Contains(out, "move it away") {
		t.Errorf("over a later log:\n%s", out)
	}
	if err := os.RemoveAll(audit); err != nil {
		t.Fatal(err)
	}
	out = run(exitDone, append(args, "--accept-rollback", "--old-audit-dir", aside[0])...)
	if !strings.Contains(out, "kept disabled: keyring v/ring") {
		t.Errorf("with --old-audit-dir:\n%s", out)
	}
	for _, lost := range append(aside, audit, in.path("state"), in.path("token")) {
		if err := os.RemoveAll(lost); err != nil {
			t.Fatal(err)
		}
	}
	if out := run(exitDone, args...); !strings.Contains(out, "NOT COMPARED") {
		t.Errorf("without any log before:\n%s", out)
	}
}
