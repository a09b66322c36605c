package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

var update = flag.Bool("update", false, "write the golden files anew")

// shape lists the paths and kinds of a JSON value.
func shape(prefix string, v any, out map[string]bool) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			shape(prefix+"."+k, x, out)
		}
	case []any:
		out[prefix+"[]"] = true
		for _, x := range v {
			shape(prefix+"[]", x, out)
		}
	default:
		out[fmt.Sprintf("%s %T", prefix, v)] = true
	}
}

// TestJSONNames: the names that --json prints are a promise.
func TestJSONNames(t *testing.T) {
	dir := t.TempDir()
	s := startService(t)
	token := filepath.Join(dir, "admin.token")
	if err := s.admin.Save(token); err != nil {
		t.Fatal(err)
	}
	admin, olga := filepath.Join(dir, "admin"), filepath.Join(dir, "olga")
	in := func(id string, args ...string) []string { return append([]string{"--json", "--identity", id}, args...) }
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range []struct {
		name string
		args []string
	}{
		{"enrol", in(admin, "enrol", "--token-file", token)},
		{"token-create", in(admin, "token", "create", "person/olga", "-o", file("olga.token"))},
		{"role-grant", in(admin, "role", "grant", "crypto-officer", "person/olga", "--scope", "/")},
		{"role-list", in(admin, "role", "list")},
		{"role-show", in(admin, "role", "show")},
		{"whoami", in(admin, "whoami")},
		{"", in(olga, "enrol", "--token-file", file("olga.token"))},
		{"vault-create", in(olga, "vault", "create", "shop")},
		{"vault-list", in(olga, "vault", "list")},
		{"key-create", in(olga, "key", "create", "shop/master", "--bits", "2048")},
		{"key-roll", in(olga, "key", "roll", "shop/master")},
		{"key-list", in(olga, "key", "list", "shop")},
		{"key-show", in(olga, "key", "show", "shop/master")},
		{"keyring-create", in(olga, "keyring", "create", "shop/system", "--server-key", "1")},
		{"keyring-roll", in(olga, "keyring", "roll", "shop/system")},
		{"keyring-list", in(olga, "keyring", "list", "shop")},
		{"keyring-show", in(olga, "keyring", "show", "shop/system")},
		{"key-rewrap", in(olga, "key", "rewrap", "shop/master")},
		{"plugin-prepare", in(olga, "plugin", "prepare", "mariadb", "shop", "-o", file("shop.token"))},
		{"plugin-list", in(olga, "plugin", "list")},
		{"keyring-status", in(olga, "keyring", "status", "shop/system")},
		{"key-disable", in(olga, "key", "disable", "shop/master")},
		{"key-enable", in(olga, "key", "enable", "shop/master", "--version", "1")},
		{"status", in(olga, "status")},
		{"plugin-revoke", in(olga, "plugin", "revoke", "shop")},
		{"token-revoke", in(admin, "token", "revoke", "person/olga")},
		{"recovery-generate", in(admin, "recovery", "generate", "--out", file("shares"))},
		{"version", in(admin, "version")},
	} {
		status, out, errs := command(t, c.args...)
		if status != 0 {
			t.Fatalf("%v: exit status %d: %s", c.args, status, errs)
		}
		if c.name != "" {
			compareShape(t, c.name, out)
		}
	}
}

func compareShape(t *testing.T, name, out string) {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	paths := map[string]bool{}
	shape("", v, paths)
	got := strings.Join(slices.Sorted(maps.Keys(paths)), "\n") + "\n"
	golden := filepath.Join("testdata", "json", name+".golden")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

// TestEveryCommandIsExplained: each command has a summary and an example, and
// its help can be printed.
func TestEveryCommandIsExplained(t *testing.T) {
	a := &app{}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" || c.Example == "" {
			t.Errorf("%s: no summary or no example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(a.root())
}

// TestCompletion offers names that are there.
func TestCompletion(t *testing.T) {
	dir := t.TempDir()
	s := startService(t)
	if err := s.admin.Save(filepath.Join(dir, "t")); err != nil {
		t.Fatal(err)
	}
	id := filepath.Join(dir, "id")
	for _, args := range [][]string{{"enrol", "--token-file", filepath.Join(dir, "t")}, {"vault", "create", "shop"}} {
		if status, _, errs := command(t, append([]string{"--identity", id}, args...)...); status != 0 {
			t.Fatalf("%v: %s", args, errs)
		}
	}
	_, out, _ := command(t, "--identity", id, "__complete", "--identity", id, "key", "list", "")
	if !strings.HasPrefix(out, "shop\n") {
		t.Errorf("got %q, want the vault shop first", out)
	}
}

func TestMeter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out strings.Builder
	m := &meter{w: &out, what: "rewrap shop/master", now: func() time.Time { return now }, base: -1}
	m.at(connector.Progress{Done: 100, Total: 1000}) // done by an earlier run
	now = now.Add(100 * time.Millisecond)
	m.at(connector.Progress{Done: 110, Total: 1000}) // too soon to be drawn
	now = now.Add(900 * time.Millisecond)
	m.at(connector.Progress{Done: 200, Total: 1000})
	now = now.Add(8 * time.Second)
	m.at(connector.Progress{Done: 1000, Total: 1000})
	m.end()
	want := "\r\x1b[Krewrap shop/master: 100 of 1000" +
		"\r\x1b[Krewrap shop/master: 200 of 1000, 100/s, 8s left" +
		"\r\x1b[Krewrap shop/master: 1000 of 1000, 100/s\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
}

func TestHints(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want bool
	}{
		{"unavailable", fmt.Errorf("x: %w", dek.ErrUnavailable), true},
		{"denied", dek.ErrDenied, true},
		{"its own", withHint(errors.New("x"), "do y"), true},
		{"cancelled by the person", errors.Join(dek.ErrUnavailable, context.Canceled), false},
		{"no class", errors.New("x"), false},
	} {
		if got := hintFor(c.err); (got != "") != c.want {
			t.Errorf("%s: got hint %q", c.name, got)
		}
	}
}

// TestPrepareGoesOn: a preparation that stops half way says what it made.
func TestPrepareGoesOn(t *testing.T) {
	p := preparePlan{kind: "mariadb", instance: "shop", key: "master", bits: 2048, out: filepath.Join(t.TempDir(), "t"), lifetime: time.Hour}
	if err := p.check(defaultRings); err != nil {
		t.Fatal(err)
	}
	for stop := range 5 {
		v, err := p.carryOut(t.Context(), &failing{at: stop})
		if !errors.Is(err, dek.ErrUnavailable) || len(v.Steps) != stop {
			t.Errorf("stop at %d: got %d steps, %v", stop, len(v.Steps), err)
		}
		if stop > 0 && !strings.Contains(hintFor(err), "run the same command again") {
			t.Errorf("stop at %d: hint %q", stop, hintFor(err))
		}
	}
}

// A failing preparer stops at one of its calls.
type failing struct{ at, calls int }

func (f *failing) next() (bool, error) {
	f.calls++
	if f.calls > f.at {
		return false, fmt.Errorf("%w: as ordered", dek.ErrUnavailable)
	}
	return true, nil
}

func (f *failing) ensureVault(context.Context, string) (bool, error)                 { return f.next() }
func (f *failing) ensureKey(context.Context, connector.NewKey) (bool, error)         { return f.next() }
func (f *failing) ensureKeyring(context.Context, connector.NewKeyring) (bool, error) { return f.next() }
func (f *failing) prepareInstance(context.Context, connector.NewInstance) (connector.Instance, connector.TokenFile, error) {
	_, err := f.next()
	return connector.Instance{}, connector.TokenFile{}, err
}
