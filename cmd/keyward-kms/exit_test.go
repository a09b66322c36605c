package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An exitCase is a command line and how it must end.
type exitCase struct {
	args string
	want int
	says string // on stderr; empty: nothing is there
}

func (c exitCase) run(t *testing.T) {
	var stdout, stderr bytes.Buffer
	got := run(t.Context(), strings.Fields(c.args), strings.NewReader(""), &stdout, &stderr)
	if got != c.want || !strings.Contains(stderr.String(), c.says) || (c.says == "") != (stderr.Len() == 0) {
		t.Errorf("got status %d and %q, want %d and %q", got, &stderr, c.want, c.says)
	}
	if (got == exitDone) != (stdout.Len() > 0) {
		t.Errorf("status %d, stdout %q", got, &stdout)
	}
	if got == exitUsage && !strings.Contains(stderr.String(), "hint: keyward-kms --help") {
		t.Errorf("no hint in %q", &stderr)
	}
}

// TestExitStatus: 0 done, 1 failed, 2 wrong use; results alone on stdout.
func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good.json"), filepath.Join(dir, "bad.json")
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	write(good, `{"state_dir":"`+dir+`/state","listen":["127.0.0.1:1"],"software_token":"`+dir+`/token"}`, 0o600)
	write(bad, `{"state_dir":"s","nonsense":1}`, 0o600)
	open := write(filepath.Join(dir, "open.json"), "{}", 0o600)
	if err := os.Chmod(open, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, c := range []exitCase{
		{"--help", exitDone, ""},
		{"--version", exitDone, ""},
		{"serve --help", exitDone, ""},
		{"check --config " + good, exitDone, ""},
		{"", exitUsage, "name a command"},
		{"nonsense", exitUsage, "nonsense"},
		{"serve", exitUsage, "--config is missing"},
		{"serve --config " + good + " more", exitUsage, "more"},
		{"serve --nonsense", exitUsage, "--nonsense"},
		{"init --config " + good, exitUsage, "--admin-token-file is missing"},
		{"backup", exitUsage, "--output is missing"},
		{"restore --config " + good, exitUsage, "--backup is missing"},
		{"dev --dir " + dir + "/dev --listen nowhere", exitUsage, "listen"},
		{"dev --dir " + dir + "/dev --listen 192.0.2.1:7443", exitUsage, "loopback"},
		{"check --config " + bad, exitFailed, "nonsense"},
		{"check --config " + open, exitFailed, "chmod go-w"},
		{"check --config " + dir + "/absent.json", exitFailed, "absent.json"},
		{"serve --config " + dir + "/absent.json", exitFailed, "absent.json"},
		{"restore --config " + good + " --backup " + dir + "/absent", exitFailed, "absent"},
		{"backup --config " + good + " -o " + dir + "/out", exitFailed, "is keyward-kms serve running"},
		{"init --config " + good + " --admin-token-file " + good, exitFailed, "choose another name"},
		{"init --config " + good + " --admin-token-file " + dir + "/absent/t", exitFailed, "admin-token-file"},
	} {
		t.Run(c.args, func(t *testing.T) {
			c.run(t)
		})
	}
	for _, name := range []string{"state", "token", "dev"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was made on the way to an error", name)
		}
	}
}
