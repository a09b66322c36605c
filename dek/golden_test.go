package dek_test

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/fips140"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"

	"github.com/keyward/keyward/dek"
)

var update = flag.Bool("update", false, "write new golden files (only with a new format version)")

const goldenFile = "testdata/dek-v1.json"

// A golden holds sealed messages and wrapped DEKs of format 1 with everything
// secret about them. It was made once and must open for ever.
type golden struct {
	SealKey hexBytes // of every Sealed and Wrapped
	Master  hexBytes // PKCS#8, RSA-2048: opens every inner layer
	Sealed  []goldenSealed
	Wrapped []goldenWrapped
}

type goldenSealed struct {
	Purpose           dek.Purpose
	Vault, Object     string
	Version           uint64
	Binding           hexBytes // canonical encoding
	Plaintext, Sealed hexBytes
}

func (g goldenSealed) binding() dek.Binding {
	return dek.Binding{Purpose: g.Purpose, Vault: g.Vault, Object: g.Object, Version: g.Version}
}

type goldenWrapped struct {
	Header  dek.Header
	DEK     hexBytes
	Wrapped hexBytes
}

type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

func readGolden(t testing.TB) golden {
	t.Helper()
	b, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(b, &g); err != nil {
		t.Fatal(err)
	}
	if len(g.Sealed) < 8 || len(g.Wrapped) < 3 {
		t.Fatalf("%d sealed and %d wrapped in %s", len(g.Sealed), len(g.Wrapped), goldenFile)
	}
	return g
}

func keyOf(t testing.TB, b []byte) *dek.Key {
	t.Helper()
	k, err := dek.KeyFrom(bytes.Clone(b))
	check(t, err)
	t.Cleanup(k.Destroy)
	return k
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestGolden(t *testing.T) {
	if *update {
		writeGolden(t)
	}
	g := readGolden(t)
	seal := keyOf(t, g.SealKey)
	for _, s := range g.Sealed {
		if enc, err := s.binding().Canonical(); err != nil || !bytes.Equal(enc, s.Binding) {
			t.Errorf("%v: canonical %x, %v, want %x", s.binding(), enc, err, s.Binding)
		}
		if got, err := seal.Open(s.binding(), s.Sealed); err != nil || !bytes.Equal(got, s.Plaintext) {
			t.Errorf("%v: opened %x, %v, want %x", s.binding(), got, err, s.Plaintext)
		}
	}
	for _, gw := range g.Wrapped {
		w, err := dek.ParseWrapped(gw.Wrapped)
		check(t, err)
		if !bytes.Equal(w.Bytes(), gw.Wrapped) {
			t.Errorf("%v: parse and encode changed the bytes", gw.Header)
		}
		got, want := w.Header(), gw.Header
		if !bytes.Equal(got.SealedSealKey, want.SealedSealKey) {
			t.Errorf("%v: sealed seal key %x, want %x", want, got.SealedSealKey, want.SealedSealKey)
		}
		if got.KeyID != want.KeyID || got.Master != want.Master || got.Object != want.Object || got.Hash != want.Hash || got.SealVersion != want.SealVersion {
			t.Errorf("header %+v, want %+v", got, want)
		}
		if _, err := w.Inner(seal); err != nil {
			t.Errorf("%v: %v", want, err)
		}
	}
}

// TestIndependentDecoder opens the golden messages by FORMAT.md alone, with
// HKDF written out and a parser of its own.
func TestIndependentDecoder(t *testing.T) {
	// Plain AES-GCM and SHA-1 are what a stranger has; strict FIPS mode bars them.
	fips140.WithoutEnforcement(func() { independentDecoder(t) })
}

func independentDecoder(t *testing.T) {
	t.Helper()
	g := readGolden(t)
	parsed, err := x509.ParsePKCS8PrivateKey(g.Master)
	check(t, err)
	master := parsed.(*rsa.PrivateKey)
	names := []string{"", "dek", "record", "secret", "private-key", "seal-key", "backup", "identity", "token"}
	for _, s := range g.Sealed {
		if s.Sealed[0] != 1 {
			t.Fatalf("sealed message begins %x", s.Sealed[0])
		}
		aad := []byte{1, byte(s.Purpose)}
		for _, name := range []string{s.Vault, s.Object} {
			aad = append(binary.BigEndian.AppendUint16(aad, uint16(len(name))), name...)
		}
		aad = binary.BigEndian.AppendUint64(aad, s.Version)
		got := openGCM(t, hkdfOneBlock(g.SealKey, "keyward/seal/v1/"+names[s.Purpose]), aad, s.Sealed[1:])
		if !bytes.Equal(got, s.Plaintext) {
			t.Errorf("%v: plaintext %x, want %x", s.binding(), got, s.Plaintext)
		}
	}
	for _, w := range g.Wrapped {
		b := []byte(w.Wrapped)
		if string(b[:4]) != "KWDK" || b[4] != 1 {
			t.Fatalf("wrapped DEK begins % x", b[:5])
		}
		end := 7 + int(binary.BigEndian.Uint16(b[5:]))
		outer := b[end+2:]
		if len(outer) != int(binary.BigEndian.Uint16(b[end:])) {
			t.Fatalf("outer layer has %d bytes", len(outer))
		}
		inner := openGCM(t, hkdfOneBlock(g.SealKey, "keyward/seal/v1/dek"), b[:end], outer)
		h := sha256.New()
		if b[7] == 1 {
			h = sha1.New()
		}
		got, err := rsa.DecryptOAEP(h, nil, master, inner, nil)
		check(t, err)
		if !bytes.Equal(got, w.DEK) {
			t.Errorf("%v: DEK %x, want %x", w.Header, got, w.DEK)
		}
	}
}

// hkdfOneBlock is RFC 5869 with SHA-256, no salt, 32 bytes of output.
func hkdfOneBlock(secret []byte, info string) []byte {
	extract := hmac.New(sha256.New, make([]byte, 32))
	extract.Write(secret)
	expand := hmac.New(sha256.New, extract.Sum(nil))
	expand.Write(append([]byte(info), 1))
	return expand.Sum(nil)
}

// openGCM opens nonce, ciphertext and tag.
func openGCM(t *testing.T, key, aad, sealed []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	check(t, err)
	gcm, err := cipher.NewGCM(block)
	check(t, err)
	plain, err := gcm.Open(nil, sealed[:12], sealed[12:], aad)
	check(t, err)
	return plain
}

func writeGolden(t *testing.T) {
	t.Helper()
	master, err := rsa.GenerateKey(nil, 2048)
	check(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(master)
	check(t, err)
	sealKey := sha256.Sum256([]byte("golden seal key"))
	g := golden{SealKey: sealKey[:], Master: der}
	seal := keyOf(t, sealKey[:])
	for p := dek.PurposeDEK; p <= dek.PurposeToken; p++ {
		s := goldenSealed{Purpose: p, Vault: "hr", Object: "payroll", Version: uint64(p), Plaintext: bytes.Repeat([]byte{byte(p)}, int(p)-1)}
		if p == dek.PurposeBackup {
			s.Vault, s.Object, s.Version = "", "büro/\x00", 1<<64-1
		}
		s.Binding, err = s.binding().Canonical()
		check(t, err)
		s.Sealed, err = seal.Seal(s.binding(), s.Plaintext)
		check(t, err)
		g.Sealed = append(g.Sealed, s)
	}
	small := dek.Header{
		KeyID: dek.KeyID{KeyringID: dek.KeyringID{Vault: "a", Keyring: "b"}, Version: 1}, Master: dek.MasterID{Vault: "c", Key: "d", Version: 1},
		Hash: crypto.SHA256, SealVersion: 1, SealedSealKey: []byte{0},
	}
	sha1Header := goodHeader()
	sha1Header.Hash, sha1Header.Version, sha1Header.SealVersion = crypto.SHA1, 1<<32-1, 1<<31
	for i, h := range []dek.Header{goodHeader(), small, sha1Header} {
		sum := sha256.Sum256([]byte{byte(i)})
		k := keyOf(t, sum[:])
		inner, err := dek.EncryptToMaster(&master.PublicKey, h.Hash, k)
		check(t, err)
		w, err := dek.Wrap(h, seal, inner)
		check(t, err)
		g.Wrapped = append(g.Wrapped, goldenWrapped{h, sum[:], w.Bytes()})
	}
	out, err := json.MarshalIndent(g, "", "\t")
	check(t, err)
	check(t, os.MkdirAll("testdata", 0o755))
	check(t, os.WriteFile(goldenFile, append(out, '\n'), 0o644))
}
