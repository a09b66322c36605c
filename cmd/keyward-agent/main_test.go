package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExitStatus: 0 done, 1 failed, 2 wrong use.
func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	unknown, broken := file("unknown.json", `{"nonsense": 1}`), file("broken.json", `{`)
	for _, c := range []struct {
		args string
		want int
		says string // on stderr; empty: nothing is there
	}{
		{"--help", exitDone, ""},
		{"--version", exitDone, ""},
		{"more", exitUsage, "more"},
		{"--nonsense", exitUsage, "--nonsense"},
		{"--config", exitUsage, "config"},
		{"--config " + dir + "/absent.json", exitFailed, "absent.json"},
		{"--check --config " + unknown, exitFailed, "nonsense"},
		{"--check --config " + broken, exitFailed, "broken.json"},
		{"--config " + unknown, exitFailed, "nonsense"},
	} {
		t.Run(c.args, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			got := run(t.Context(), strings.Fields(c.args), &stdout, &stderr)
			if got != c.want || !strings.Contains(stderr.String(), c.says) || (c.says == "") != (stderr.Len() == 0) {
				t.Errorf("got status %d and %q, want %d and %q", got, &stderr, c.want, c.says)
			}
			if (got == exitDone) != (stdout.Len() > 0) {
				t.Errorf("status %d, stdout %q", got, &stdout)
			}
		})
	}
}
