package main

import (
	"encoding/json"
	"path/filepath"
	"testing"
)

// TestJSONOnly: with --json nothing but JSON is on standard output, also of the
// commands that no golden file fixes.
func TestJSONOnly(t *testing.T) {
	dir := t.TempDir()
	s := startService(t)
	file := func(name string) string { return filepath.Join(dir, name) }
	if err := s.admin.Save(file("admin.token")); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{"admin", "enrol", "--token-file", file("admin.token")},
		{"admin", "token", "create", "person/olga", "-o", file("olga.token")},
		{"admin", "token", "create", "person/ada", "-o", file("ada.token")},
		{"admin", "role", "grant", "crypto-officer", "person/olga", "--scope", "/"},
		{"admin", "role", "grant", "auditor", "person/ada", "--scope", "/"},
		{"olga", "enrol", "--token-file", file("olga.token")},
		{"ada", "enrol", "--token-file", file("ada.token")},
		{"olga", "vault", "create", "one"},
		{"olga", "key", "create", "one/master", "--bits", "2048"},
		{"olga", "keyring", "create", "one/system"},
		{"olga", "keyring", "disable", "one/system"},
		{"olga", "keyring", "enable", "one/system"},
		{"ada", "audit", "export", "-o", file("audit.tar")},
		{"ada", "audit", "verify", file("audit.tar")},
		{"admin", "role", "revoke", "auditor", "person/ada", "--scope", "/"},
	} {
		status, out, errs := command(t, append([]string{"--json", "--identity", file(c[0])}, c[1:]...)...)
		if status != 0 {
			t.Fatalf("%v: exit status %d: %s", c[1:], status, errs)
		}
		if !json.Valid([]byte(out)) {
			t.Errorf("%v --json prints %q", c[1:], out)
		}
	}
}
