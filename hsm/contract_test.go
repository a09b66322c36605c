package hsm_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// Tests here mostly wait: for deadlines, back-off and other processes.
const parallel = "4"

func TestMain(m *testing.M) {
	flag.Parse()
	if !hsmtest.IsChild() {
		chosen := false
		flag.Visit(func(f *flag.Flag) { chosen = chosen || f.Name == "test.parallel" })
		if !chosen {
			if err := flag.Set("test.parallel", parallel); err != nil {
				panic(err)
			}
		}
	}
	hsmtest.Main(m)
}

var update = flag.Bool("update", false, "rewrite golden files")

// opened is a token for the contract whose missing abilities are compared with
// the golden file of its kind.
func opened(t *testing.T, name string, tok hsmtest.Token) hsmtest.Token {
	t.Helper()
	got := strings.Join(append(tok.Capabilities().Missing(), ""), "\n")
	path := filepath.Join("testdata", name+".missing")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		t.Errorf("%s can't do:\n%s\nwant, %v:\n%s", name, got, err, want)
	}
	return tok
}

func TestSoftwareContract(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "token")
	hsmtest.Run(t, func(t *testing.T) hsmtest.Token {
		tok, err := hsm.OpenSoftware(dir)
		if err != nil {
			t.Fatal(err)
		}
		return opened(t, "software", tok)
	})
}

func TestFakeContract(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "token")
	hsmtest.Run(t, func(t *testing.T) hsmtest.Token { return hsmtest.OpenFake(t, dir) })
}

func TestSoftHSMContract(t *testing.T) {
	t.Parallel()
	cfg := hsmtest.SoftHSM(t, "contract")
	hsmtest.Run(t, func(t *testing.T) hsmtest.Token { return opened(t, "softhsm2", hsmtest.Open(t, cfg)) })
}

func TestNSSContract(t *testing.T) {
	t.Parallel()
	cfg := hsmtest.NSS(t)
	hsmtest.Run(t, func(t *testing.T) hsmtest.Token { return opened(t, "nss", hsmtest.Open(t, cfg)) })
}

// A token without AES-GCM and EC: RSA roots, signed; RSA signers.
func TestPoorTokenContract(t *testing.T) {
	t.Parallel()
	cfg, shim := hsmtest.Misbehave(t, hsmtest.SoftHSM(t, "poor"))
	shim.Set(hsmtest.Hide, 3)
	hsmtest.Run(t, func(t *testing.T) hsmtest.Token { return opened(t, "poor", hsmtest.Open(t, cfg)) })
}

// The sizes of master keys that the contract leaves out, because they take long,
// are made, found and used.
func TestMasterKeySizes(t *testing.T) {
	t.Parallel()
	soft, err := hsm.OpenSoftware(filepath.Join(t.TempDir(), "token"))
	if err != nil {
		t.Fatal(err)
	}
	defer soft.Close()
	for _, tt := range []struct {
		name string
		tok  hsmtest.Token
		bits int
	}{
		{"software", soft, 3072},
		{"softhsm2", hsmtest.Open(t, hsmtest.SoftHSM(t, "sizes")), 4096},
	} {
		id := hsmtest.NewID()
		pub, err := tt.tok.GeneratePair(t.Context(), id, tt.bits)
		if err != nil || pub.N.BitLen() != tt.bits {
			t.Fatalf("%s RSA-%d: %v", tt.name, tt.bits, err)
		}
		found, err := tt.tok.FindPair(t.Context(), id)
		if err != nil || !found.Equal(pub) {
			t.Errorf("%s RSA-%d: find: %v", tt.name, tt.bits, err)
		}
		h := tt.tok.Capabilities().PreferredOAEP()
		k, err := tt.tok.DecryptKey(t.Context(), id, h, hsmtest.Encrypt(t, pub, h, make([]byte, 32)))
		if err != nil {
			t.Errorf("%s RSA-%d: decrypt: %v", tt.name, tt.bits, err)
		}
		k.Destroy()
	}
}

// The shim is built from a copy of the header, because embedding can't reach
// another package.
func TestHeaderCopies(t *testing.T) {
	a, err := os.ReadFile("cryptoki.h")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("hsmtest/testdata/cryptoki.h")
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("hsmtest/testdata/cryptoki.h differs from cryptoki.h (%v): copy it", err)
	}
}
