package recovery_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/fips140"
	"crypto/hkdf"
	"crypto/mlkem"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/sha512"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

var update = flag.Bool("update", false, "write a new golden file (only with a new format version)")

const goldenFile = "testdata/recovery-v1.json"

// A golden is a recipient of format 1 with everything secret about it. It was
// made once and must open for ever.
type golden struct {
	Recipient   string
	Fingerprint string
	Shares      []string
	Copies      []goldenCopy
}

type goldenCopy struct {
	Purpose       dek.Purpose
	Vault, Object string
	Version       uint64
	Key, Sealed   hexBytes
}

func (c goldenCopy) binding() dek.Binding {
	return dek.Binding{Purpose: c.Purpose, Vault: c.Vault, Object: c.Object, Version: c.Version}
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
	if len(g.Shares) != 5 || len(g.Copies) < 2 {
		t.Fatalf("%d shares and %d copies in %s", len(g.Shares), len(g.Copies), goldenFile)
	}
	return g
}

func goldenShares(t testing.TB) []string  { return readGolden(t).Shares }
func goldenRecipient(t testing.TB) string { return readGolden(t).Recipient }

// private joins shares 5, 2 and 3.
func (g golden) private(t testing.TB) *recovery.Private {
	t.Helper()
	var shares []recovery.Share
	for _, i := range []int{4, 1, 2} {
		s, err := recovery.ParseShare([]byte(g.Shares[i]))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Destroy()
		shares = append(shares, s)
	}
	p, err := recovery.Combine(shares)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Destroy)
	return p
}

func TestGolden(t *testing.T) {
	if *update {
		writeGolden(t)
	}
	g := readGolden(t)
	r, err := recovery.ParseRecipient(g.Recipient)
	if err != nil {
		t.Fatal(err)
	}
	if r.Fingerprint() != g.Fingerprint || r.String() != g.Recipient {
		t.Errorf("recipient came back as %s", r.Fingerprint())
	}
	for i, s := range g.Shares {
		share, err := recovery.ParseShare([]byte(s))
		if err != nil {
			t.Fatal(err)
		}
		if share.Index() != i+1 || text(t, share) != s {
			t.Errorf("share %d came back as %d", i+1, share.Index())
		}
		share.Destroy()
	}
	p := g.private(t)
	for _, c := range g.Copies {
		k, err := p.Open(c.binding(), c.Sealed)
		if err != nil {
			t.Fatal(err)
		}
		_ = k.Use(func(b []byte) error {
			if !bytes.Equal(b, c.Key) {
				t.Errorf("%v: key %x, want %x", c.binding(), b, c.Key)
			}
			return nil
		})
		k.Destroy()
	}
}

// TestIndependentDecoder recovers the golden keys by FORMAT.md alone: another
// base32, another Shamir (logarithms), HPKE from its primitives.
func TestIndependentDecoder(t *testing.T) {
	// Plain AES-GCM is what a stranger has; strict FIPS mode bars it.
	fips140.WithoutEnforcement(func() { independentDecoder(t) })
}

func independentDecoder(t *testing.T) {
	t.Helper()
	g := readGolden(t)
	points := make(map[byte][]byte)
	var set []byte
	for _, i := range []int{0, 3, 4} {
		x, payload := decodeShare(t, g.Shares[i])
		if payload[0] != 3 || payload[1] != 5 {
			t.Fatalf("share %d says %d of %d", x, payload[0], payload[1])
		}
		set, points[x] = payload[2:14], payload[14:46]
	}
	seed := joinByLogarithms(points)
	for _, c := range g.Copies {
		sealed := []byte(c.Sealed)
		if sealed[0] != 1 || !bytes.Equal(sealed[1:13], set) {
			t.Fatalf("copy begins % x", sealed[:13])
		}
		got := hpkeOpen(t, seed, append([]byte("keyward/recovery/v1"), canonical(c)...), sealed[13:])
		if !bytes.Equal(got, c.Key) {
			t.Errorf("key %x, want %x", got, []byte(c.Key))
		}
	}
}

func canonical(c goldenCopy) []byte {
	b := []byte{1, byte(c.Purpose)}
	for _, s := range []string{c.Vault, c.Object} {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(s))), s...)
	}
	return binary.BigEndian.AppendUint64(b, c.Version)
}

func decodeShare(t *testing.T, s string) (x byte, payload []byte) {
	t.Helper()
	fields := strings.Split(s, "-")
	n, err := strconv.Atoi(fields[1])
	if err != nil || fields[0] != "kwshare1" {
		t.Fatal("not a share")
	}
	enc := base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)
	payload, err = enc.DecodeString(strings.Join(fields[2:], ""))
	if err != nil || len(payload) != 50 {
		t.Fatalf("%d bytes: %v", len(payload), err)
	}
	sum := sha256.Sum256(append([]byte("kwshare1-"+fields[1]+"-"), payload[:46]...))
	if !bytes.Equal(sum[:4], payload[46:]) {
		t.Fatal("checksum")
	}
	return byte(n), payload
}

func joinByLogarithms(points map[byte][]byte) []byte {
	var exp, log [512]int
	for v, i := 1, 0; i < 255; i++ { // powers of 3, a generator
		exp[i], exp[i+255], log[v] = v, v, i
		v ^= v << 1
		if v >= 256 {
			v ^= 0x11b
		}
	}
	secret := make([]byte, 32)
	for j := range secret {
		for xi, yi := range points {
			if yi[j] == 0 {
				continue
			}
			e := log[yi[j]]
			for xk := range points {
				if xk != xi {
					e += log[xk] - log[xi^xk] + 255
				}
			}
			secret[j] ^= byte(exp[e%255])
		}
	}
	return secret
}

// hpkeOpen is RFC 9180 §5.1 base mode, single-shot, with KEM 0x0051
// (draft-ietf-hpke-pq), KDF 0x0002 and AEAD 0x0002.
func hpkeOpen(t *testing.T, seed, info, msg []byte) []byte {
	t.Helper()
	shake := sha3.NewSHAKE256()
	shake.Write(seed)
	seedPQ, seedT := make([]byte, 64), make([]byte, 48)
	shake.Read(seedPQ)
	shake.Read(seedT)
	dk, err := mlkem.NewDecapsulationKey1024(seedPQ)
	check(t, err)
	sk, err := ecdh.P384().NewPrivateKey(seedT)
	check(t, err)
	ctPQ, ctT, ct := msg[:1568], msg[1568:1568+97], msg[1568+97:]
	ssPQ, err := dk.Decapsulate(ctPQ)
	check(t, err)
	peer, err := ecdh.P384().NewPublicKey(ctT)
	check(t, err)
	ssT, err := sk.ECDH(peer)
	check(t, err)
	shared := sha3.Sum256(bytes.Join([][]byte{ssPQ, ssT, ctT, sk.PublicKey().Bytes(), []byte("MLKEM1024-P384")}, nil))

	suite := []byte("HPKE\x00\x51\x00\x02\x00\x02")
	extract := func(salt []byte, label string, ikm []byte) []byte {
		b, err := hkdf.Extract(sha512.New384, bytes.Join([][]byte{[]byte("HPKE-v1"), suite, []byte(label), ikm}, nil), salt)
		check(t, err)
		return b
	}
	expand := func(prk []byte, label string, ctx []byte, n int) []byte {
		b, err := hkdf.Expand(sha512.New384, prk, string(bytes.Join([][]byte{{0, byte(n)}, []byte("HPKE-v1"), suite, []byte(label), ctx}, nil)), n)
		check(t, err)
		return b
	}
	ctx := bytes.Join([][]byte{{0}, extract(nil, "psk_id_hash", nil), extract(nil, "info_hash", info)}, nil)
	secret := extract(shared[:], "secret", nil)
	block, err := aes.NewCipher(expand(secret, "key", ctx, 32))
	check(t, err)
	gcm, err := cipher.NewGCM(block)
	check(t, err)
	plain, err := gcm.Open(nil, expand(secret, "base_nonce", ctx, 12), ct, nil)
	check(t, err)
	return plain
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func writeGolden(t *testing.T) {
	t.Helper()
	r, shares := generate(t, 3, 5)
	g := golden{Recipient: r.String(), Fingerprint: r.Fingerprint()}
	for _, s := range shares {
		g.Shares = append(g.Shares, text(t, s))
	}
	for i, b := range []dek.Binding{
		place(), {Purpose: dek.PurposeSealKey, Vault: "hr", Version: 1}, {Purpose: dek.PurposeBackup, Object: "büro/\x00", Version: 1<<64 - 1},
	} {
		key := sha256.Sum256([]byte{byte(i)})
		want := bytes.Clone(key[:])
		k, err := dek.KeyFrom(key[:])
		check(t, err)
		sealed, err := r.Seal(b, k)
		check(t, err)
		k.Destroy()
		g.Copies = append(g.Copies, goldenCopy{b.Purpose, b.Vault, b.Object, b.Version, want, sealed})
	}
	out, err := json.MarshalIndent(g, "", "\t")
	check(t, err)
	check(t, os.MkdirAll("testdata", 0o755))
	check(t, os.WriteFile(goldenFile, append(out, '\n'), 0o644))
}
