package hsm_test

import (
	"bytes"
	"crypto"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// softwareDir returns the directory of a closed software token with one pair.
func softwareDir(t *testing.T) (dir string, id dek.ObjectID) {
	t.Helper()
	dir, id = filepath.Join(t.TempDir(), "token"), hsmtest.NewID()
	tok, err := hsm.OpenSoftware(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	if _, err := tok.GeneratePair(t.Context(), id, 2048); err != nil {
		t.Fatal(err)
	}
	return dir, id
}

func only(t *testing.T, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) != 1 {
		t.Fatalf("%s: %q, %v", pattern, names, err)
	}
	return names[0]
}

func TestSoftwareFiles(t *testing.T) {
	dir, _ := softwareDir(t)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		st, err := e.Info()
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v (%v)", e.Name(), st.Mode(), err)
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil || bytes.Contains(b, []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01}) {
			t.Errorf("%s shows an RSA key (%v)", e.Name(), err)
		}
	}
}

// A softwareDamage is one way of breaking the directory of a token.
type softwareDamage struct {
	name   string
	damage func(t *testing.T, dir string)
	open   error // of OpenSoftware; nil: FindPair fails with find
	find   error
}

func softwareDamages() []softwareDamage {
	return []softwareDamage{
		{"flipped bit", func(t *testing.T, dir string) {
			p := only(t, filepath.Join(dir, "*.master"))
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			writeFile(t, p, string(b))
		}, nil, dek.ErrCorrupt},
		{"truncated", func(t *testing.T, dir string) {
			if err := os.Truncate(only(t, filepath.Join(dir, "*.master")), 10); err != nil {
				t.Fatal(err)
			}
		}, nil, dek.ErrCorrupt},
		{"passed off as another", func(t *testing.T, dir string) {
			rename(t, only(t, filepath.Join(dir, "*.master")), filepath.Join(dir, "00112233445566778899aabbccddeeff.master"))
		}, nil, dek.ErrNotFound},
		{"no file key", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "token.key")); err != nil {
				t.Fatal(err)
			}
		}, dek.ErrCorrupt, nil},
		{"short file key", func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "token.key"), 20); err != nil {
				t.Fatal(err)
			}
		}, dek.ErrCorrupt, nil},
		{"world-readable file key", func(t *testing.T, dir string) {
			if err := os.Chmod(filepath.Join(dir, "token.key"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, dek.ErrPrecondition, nil},
		{"world-readable directory", func(t *testing.T, dir string) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, dek.ErrPrecondition, nil},
		{"two identities", func(t *testing.T, dir string) {
			b, err := os.ReadFile(only(t, filepath.Join(dir, "*.identity")))
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, "00112233445566778899aabbccddeeff.identity"), string(b))
		}, dek.ErrCorrupt, nil},
	}
}

func TestSoftwareRefuses(t *testing.T) {
	for _, tt := range softwareDamages() {
		t.Run(tt.name, func(t *testing.T) {
			dir, id := softwareDir(t)
			tt.damage(t, dir)
			tok, err := hsm.OpenSoftware(dir)
			if tt.open != nil {
				wantClass(t, "open", err, tt.open)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer tok.Close()
			_, err = tok.FindPair(t.Context(), id)
			wantClass(t, "find", err, tt.find)
			_, err = tok.DecryptKey(t.Context(), id, crypto.SHA256, make([]byte, 256))
			wantClass(t, "decrypt", err, tt.find)
		})
	}
}

// What a crash leaves half-written disappears, what was acknowledged stays.
func TestSoftwareAfterCrash(t *testing.T) {
	dir, id := softwareDir(t)
	half := filepath.Join(dir, "00112233445566778899aabbccddeeff.master.123.tmp")
	writeFile(t, half, "half")
	tok, err := hsm.OpenSoftware(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("half-written file: %v", err)
	}
	if _, err := tok.FindPair(t.Context(), id); err != nil {
		t.Errorf("find: %v", err)
	}
	_, err = hsm.OpenSoftware(dir)
	wantClass(t, "second opener", err, dek.ErrPrecondition)
}

// A full or read-only disk: one clear error, nothing half-made.
func TestSoftwareCannotWrite(t *testing.T) {
	dir, id := softwareDir(t)
	tok, err := hsm.OpenSoftware(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tok.Close()
	rename(t, dir, dir+".away")
	_, err = tok.GeneratePair(t.Context(), hsmtest.NewID(), 2048)
	wantClass(t, "generate", err, dek.ErrUnavailable)
	wantClass(t, "health", tok.Health(t.Context()), dek.ErrUnavailable)
	rename(t, dir+".away", dir)
	ids, err := tok.Objects(t.Context())
	if err != nil || len(ids) != 1 || ids[0] != id {
		t.Errorf("objects: %x, %v", ids, err)
	}
	if err := tok.Health(t.Context()); err != nil {
		t.Errorf("health: %v", err)
	}
}
