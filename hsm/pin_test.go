package hsm_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A wrong PIN is tried exactly once, however often the service is started.
func TestWrongPINTriedOnce(t *testing.T) {
	t.Parallel()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "wrongpin"))
	cfg.PINState = filepath.Join(t.TempDir(), "pin.refused")
	writeFile(t, cfg.PINFile, "wrong-pin")
	for range 3 {
		_, err := hsm.Open(t.Context(), cfg)
		wantClass(t, "wrong PIN", err, dek.ErrPrecondition)
	}
	// systemd makes a new file with the same content at every start.
	if err := os.Remove(cfg.PINFile); err != nil {
		t.Fatal(err)
	}
	writeFile(t, cfg.PINFile, "wrong-pin\n")
	_, err := hsm.Open(t.Context(), cfg)
	wantClass(t, "wrong PIN in a new file", err, dek.ErrPrecondition)
	if n := shim.Get(hsmtest.Logins); n != 1 {
		t.Errorf("%d logins with a wrong PIN, want 1", n)
	}
	writeFile(t, cfg.PINFile, hsmtest.PIN)
	hsmtest.Open(t, cfg)
	if _, err := os.Stat(cfg.PINState); !os.IsNotExist(err) {
		t.Errorf("state after a good login: %v", err)
	}
}

// Where a refusal can't be remembered, the PIN is not even tried: else each
// restart would cost the token one attempt.
func TestNoLoginWithoutState(t *testing.T) {
	t.Parallel()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "nostate"))
	cfg.PINState = filepath.Join(t.TempDir(), "absent", "pin.refused")
	writeFile(t, cfg.PINFile, "wrong-pin")
	for range 2 {
		_, err := hsm.Open(t.Context(), cfg)
		wantClass(t, "no place for the state", err, dek.ErrPrecondition)
	}
	if n := shim.Get(hsmtest.Logins); n != 0 {
		t.Errorf("%d logins, want 0", n)
	}
}

// The PIN is changed under a running service: one attempt, then the file is
// watched, and a good PIN brings the token back without a restart.
func TestPINChangesUnderway(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, nil)
	writeFile(t, f.cfg.PINFile, "wrong-pin")
	logins := f.shim.Get(hsmtest.Logins)
	f.shim.Set(hsmtest.DieCount, 1)
	wantClass(t, "crash", f.decrypt(t), dek.ErrUnavailable)
	begin := time.Now()
	for time.Since(begin) < 1500*time.Millisecond {
		wantClass(t, "wrong PIN", f.decrypt(t), dek.ErrPrecondition)
	}
	if n := f.shim.Get(hsmtest.Logins) - logins; n != 1 {
		t.Errorf("%d logins with a wrong PIN, want 1", n)
	}
	writeFile(t, f.cfg.PINFile, hsmtest.PIN+"\n")
	f.recovers(t, 10*time.Second)
}

// A badConfig is one mistake in a configuration.
type badConfig struct {
	name string
	edit func(*hsm.Config)
	want error
}

func badConfigs(t *testing.T) []badConfig {
	t.Helper()
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		writeFile(t, path, text)
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	writable := filepath.Join(open, "module.so")
	writeFile(t, writable, "")
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	return []badConfig{
		{"world-readable PIN", func(c *hsm.Config) { c.PINFile = file("world", hsmtest.PIN, 0o604) }, dek.ErrPrecondition},
		{"group-readable PIN", func(c *hsm.Config) { c.PINFile = file("group", hsmtest.PIN, 0o640) }, dek.ErrPrecondition},
		{"FIFO as PIN", func(c *hsm.Config) { c.PINFile = fifo }, dek.ErrPrecondition},
		{"directory as PIN", func(c *hsm.Config) { c.PINFile = dir }, dek.ErrPrecondition},
		{"no PIN file", func(c *hsm.Config) { c.PINFile = filepath.Join(dir, "absent") }, dek.ErrPrecondition},
		{"empty PIN", func(c *hsm.Config) { c.PINFile = file("empty", "\n", 0o600) }, dek.ErrPrecondition},
		{"huge PIN", func(c *hsm.Config) { c.PINFile = file("huge", string(make([]byte, 300)), 0o600) }, dek.ErrPrecondition},
		{"relative PIN", func(c *hsm.Config) { c.PINFile = "pin" }, dek.ErrInvalid},
		{"relative module", func(c *hsm.Config) { c.Module = "libsofthsm2.so" }, dek.ErrInvalid},
		{"no module", func(c *hsm.Config) { c.Module = "/nonexistent.so" }, dek.ErrPrecondition},
		{"module others write", func(c *hsm.Config) { c.Module = file("w.so", "", 0o602) }, dek.ErrPrecondition},
		{"module in an open directory", func(c *hsm.Config) { c.Module = writable }, dek.ErrPrecondition},
		{"module is no module", func(c *hsm.Config) { c.Module = file("n.so", "text", 0o600) }, dek.ErrUnavailable},
		{"PIN in the URI", func(c *hsm.Config) { c.TokenURI += "?pin-value=1234" }, dek.ErrInvalid},
		{"no token named", func(c *hsm.Config) { c.TokenURI = "pkcs11:" }, dek.ErrInvalid},
		{"no child", func(c *hsm.Config) { c.Child = nil }, dek.ErrInvalid},
		{"child is absent", func(c *hsm.Config) { c.Child = []string{"/nonexistent"} }, dek.ErrPrecondition},
		{"child is something else", func(c *hsm.Config) { c.Child = []string{"/bin/true"} }, dek.ErrUnavailable},
		{"child talks nonsense", func(c *hsm.Config) {
			c.Child = []string{"/bin/sh", "-c", "head -c 64 /dev/zero >&3; cat <&3 >/dev/null"}
		}, dek.ErrUnavailable},
		{"negative deadline", func(c *hsm.Config) { c.Deadline = -1 }, dek.ErrInvalid},
		{"too many workers", func(c *hsm.Config) { c.Workers = 1000 }, dek.ErrInvalid},
	}
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	good, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "config"))
	for _, tt := range badConfigs(t) {
		cfg := good
		tt.edit(&cfg)
		tok, err := hsm.Open(t.Context(), cfg)
		wantClass(t, tt.name, err, tt.want)
		if tok != nil {
			tok.Close()
		}
	}
	if n := shim.Get(hsmtest.Logins); n != 0 {
		t.Errorf("%d logins, want 0", n)
	}
	var all hsm.Config
	err := all.Check()
	wantClass(t, "zero config", err, dek.ErrInvalid)
}

// The owner of a library can change it, whatever its mode: it must be root or
// the service. A link is followed once, by the check.
func TestModuleOfAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to give a file away")
	}
	const nobody = 65534
	dir := t.TempDir()
	foreign := filepath.Join(dir, "foreign")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	file, inside := filepath.Join(dir, "file.so"), filepath.Join(foreign, "inside.so")
	writeFile(t, file, "")
	writeFile(t, inside, "")
	for _, p := range []string{file, foreign} {
		if err := os.Chown(p, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, "link.so")
	if err := os.Symlink(inside, link); err != nil {
		t.Fatal(err)
	}
	cfg := hsmtest.SoftHSM(t, "owner")
	for _, path := range []string{file, inside, link} {
		cfg.Module = path
		wantClass(t, path, cfg.Check(), dek.ErrPrecondition)
	}
}

// systemd shows the access list's mask of a credential as group-readable.
func TestSystemdCredential(t *testing.T) {
	cfg := hsmtest.SoftHSM(t, "credential")
	if err := os.Chmod(cfg.PINFile, 0o440); err != nil {
		t.Fatal(err)
	}
	_, err := hsm.Open(t.Context(), cfg)
	wantClass(t, "not a credential", err, dek.ErrPrecondition)
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Dir(cfg.PINFile))
	hsmtest.Open(t, cfg)
	if err := os.Chmod(cfg.PINFile, 0o444); err != nil {
		t.Fatal(err)
	}
	_, err = hsm.Open(t.Context(), cfg)
	wantClass(t, "world-readable credential", err, dek.ErrPrecondition)
}
