package hsmtest

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/hsm"
)

// Words of the shim's control file; the order is that of testdata/shim.c.
const (
	DecryptRV    = iota // what C_Decrypt answers instead of working ...
	DecryptCount        // ... so many times
	DecryptNth          // if set, only each n-th call
	HangCount           // so many C_Decrypt never return
	DieCount            // so many C_Decrypt end the child by SIGSEGV
	LoseCount           // so many C_Decrypt close all sessions first
	Hide                // bit 0: no AES-GCM, bit 1: no EC
	SignRV
	SignCount
	Logins // counters
	Decrypts
	Searches
	Inits
	HangGenerate
	HangLogin
	SlowGenerate // C_GenerateKeyPair and ...
	SlowDecrypt  // ... C_Decrypt take so many milliseconds longer
	shimWords
)

// A Shim orders a misbehaving module about.
type Shim struct {
	t testing.TB
	f *os.File
}

// Misbehave puts the shim before the module of cfg. All words are zero: until
// ordered otherwise it only counts.
func Misbehave(t testing.TB, cfg hsm.Config) (hsm.Config, *Shim) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.OpenFile(filepath.Join(dir, "control"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(4 * shimWords); err != nil {
		t.Fatal(err)
	}
	cfg.Env = append([]string{"KW_SHIM_MODULE=" + cfg.Module, "KW_SHIM_CONTROL=" + f.Name()}, cfg.Env...)
	cfg.Module = buildShim(t, dir)
	return cfg, &Shim{t, f}
}

// Set writes a word; the child sees it at once.
func (s *Shim) Set(word int, v uint32) {
	s.t.Helper()
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], v)
	if _, err := s.f.WriteAt(b[:], int64(4*word)); err != nil {
		s.t.Fatal(err)
	}
}

// Get reads a word.
func (s *Shim) Get(word int) uint32 {
	s.t.Helper()
	var b [4]byte
	if _, err := s.f.ReadAt(b[:], int64(4*word)); err != nil {
		s.t.Fatal(err)
	}
	return binary.NativeEndian.Uint32(b[:])
}

// buildShim compiles the shim with the C compiler that cgo uses.
func buildShim(t testing.TB, dir string) string {
	t.Helper()
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	_, err := exec.LookPath(cc)
	Require(t, err == nil, "a C compiler")
	for name, text := range map[string][]byte{"shim.c": shimSource, "cryptoki.h": cryptokiHeader} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "shim.so")
	cmd := exec.Command(cc, "-shared", "-fPIC", "-O1", "-Wall", "-o", out, filepath.Join(dir, "shim.c"), "-ldl")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, msg)
	}
	if err := os.Chmod(out, 0o755); err != nil {
		t.Fatal(err)
	}
	return out
}
