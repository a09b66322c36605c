// Package hsmtest makes tokens for tests: private SoftHSM2 and NSS tokens, a
// module that misbehaves on order, a fake with faults, and [Run], the contract
// that every token keeps.
//
// The child of a PKCS#11 token is the test binary itself: a package that uses
// [SoftHSM] or [NSS] has
//
//	func TestMain(m *testing.M) { hsmtest.Main(m) }
package hsmtest

import (
	"context"
	_ "embed"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyward/keyward/hsm"
)

// childArg makes the test binary a token child.
const childArg = "keyward-hsmtest-token-child"

// PIN is the user PIN of the tokens made here.
const PIN = "kw-test-493170"

//go:embed testdata/shim.c
var shimSource []byte

// cryptokiHeader is a copy of hsm/cryptoki.h; a test keeps them equal.
//
//go:embed testdata/cryptoki.h
var cryptokiHeader []byte

// Main runs the tests of a package, or the token child if that is what this
// process was started as. It does not return.
func Main(m *testing.M) {
	if IsChild() {
		os.Exit(hsm.RunChild(context.Background()))
	}
	os.Exit(m.Run())
}

// IsChild reports whether this process was started as a token child, for
// packages whose TestMain has more to do than Main does.
func IsChild() bool { return len(os.Args) == 2 && os.Args[1] == childArg }

// ChildCommand is the command for [hsm.Config.Child] in tests.
func ChildCommand(t testing.TB) []string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatalf("test binary: %v", err)
	}
	return []string{exe, childArg}
}

// Require skips the test, or fails it where KEYWARD_REQUIRE_INTEGRATION=1.
func Require(t testing.TB, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
		t.Fatalf("%s is required", what)
	}
	t.Skipf("%s is not installed", what)
}

// softHSMModules are where Debian, Fedora and others put the library.
var softHSMModules = []string{
	"/usr/lib/softhsm/libsofthsm2.so",
	"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
	"/usr/lib64/pkcs11/libsofthsm2.so",
	"/usr/local/lib/softhsm/libsofthsm2.so",
}

var nssModules = []string{
	"/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
	"/usr/lib/x86_64-linux-gnu/nss/libsoftokn3.so",
	"/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
	"/usr/lib64/libsoftokn3.so",
}

func firstFile(paths []string) string {
	for _, p := range paths {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// SoftHSM makes a private SoftHSM2 token called label in the test's own
// directory and returns a configuration that opens it. The token directory is
// TokenDir of it.
func SoftHSM(t testing.TB, label string) hsm.Config {
	t.Helper()
	module := firstFile(softHSMModules)
	_, err := exec.LookPath("softhsm2-util")
	Require(t, module != "" && err == nil, "softhsm2")
	dir := t.TempDir()
	write(t, filepath.Join(dir, "softhsm2.conf"), fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", TokenDir(dir)))
	if err := os.Mkdir(TokenDir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	InitSoftHSM(t, dir, label)
	return hsm.Config{
		Module:   module,
		TokenURI: "pkcs11:token=" + url.PathEscape(label),
		PINFile:  write(t, filepath.Join(dir, "pin"), PIN+"\n"),
		Child:    ChildCommand(t),
		Env:      []string{"SOFTHSM2_CONF=" + filepath.Join(dir, "softhsm2.conf")},
	}
}

// TokenDir is the directory of SoftHSM's tokens below that of the PIN file.
func TokenDir(dir string) string { return filepath.Join(dir, "tokens") }

// InitSoftHSM adds a token called label to the SoftHSM configuration in dir.
func InitSoftHSM(t testing.TB, dir, label string) {
	t.Helper()
	cmd := exec.Command("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "kw-test-so-2718")
	cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+filepath.Join(dir, "softhsm2.conf"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
}

// NSS makes a private NSS softokn token and returns a configuration that opens
// it through the shim, which gives it the init string it needs.
func NSS(t testing.TB) hsm.Config {
	t.Helper()
	module := firstFile(nssModules)
	_, err := exec.LookPath("certutil")
	Require(t, module != "" && err == nil, "libnss3 and libnss3-tools")
	dir := t.TempDir()
	db := filepath.Join(dir, "nssdb")
	if err := os.Mkdir(db, 0o700); err != nil {
		t.Fatal(err)
	}
	pin := write(t, filepath.Join(dir, "pin"), PIN+"\n")
	if out, err := exec.Command("certutil", "-N", "-d", "sql:"+db, "-f", pin).CombinedOutput(); err != nil {
		t.Fatalf("certutil: %v\n%s", err, out)
	}
	return hsm.Config{
		Module:   buildShim(t, dir),
		TokenURI: "pkcs11:token=NSS%20Certificate%20DB",
		PINFile:  pin,
		Child:    ChildCommand(t),
		Env: []string{
			"KW_SHIM_MODULE=" + module,
			"KW_SHIM_INIT=configdir='sql:" + db + "' certPrefix='' keyPrefix='' secmod='secmod.db' flags=",
		},
	}
}

// Open opens the token and closes it at the end of the test.
func Open(t testing.TB, cfg hsm.Config) *hsm.Token {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tok, err := hsm.Open(ctx, cfg)
	if err != nil {
		t.Fatalf("open token: %v", err)
	}
	t.Cleanup(func() { _ = tok.Close() })
	return tok
}

func write(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
