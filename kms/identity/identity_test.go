package identity_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/identity"
)

// A shelf keeps blobs in memory, by copy, and can be told to fail.
type shelf struct {
	mu   sync.Mutex
	kept map[string][]byte
	fail error // returned by PutBlob
	done bool  // and yet it was kept
}

func (s *shelf) Blob(name string) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.kept[name]
	return slices.Clone(b), ok
}

func (s *shelf) PutBlob(_ context.Context, name string, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil || s.done {
		if s.kept == nil {
			s.kept = make(map[string][]byte)
		}
		s.kept[name] = slices.Clone(b)
	}
	return s.fail
}

// A device signs like the token does: SHA-256 only, and it may be gone.
type device struct {
	*ecdsa.PrivateKey
	gone atomic.Bool
}

func (d *device) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	if d.gone.Load() {
		return nil, dek.ErrUnavailable
	}
	if o.HashFunc() != crypto.SHA256 || len(digest) != 32 {
		return nil, fmt.Errorf("%w: device asked for %v", dek.ErrInvalid, o.HashFunc())
	}
	return d.PrivateKey.Sign(r, digest, o)
}

func newDevice(t testing.TB) *device {
	t.Helper()
	return &device{PrivateKey: newKey(t, elliptic.P256())}
}

func newKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// A world is an authority with a clock and a device that the test owns.
type world struct {
	now    time.Time
	device *device
	shelf  *shelf
}

func newWorld(t testing.TB) *world {
	return &world{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), device: newDevice(t), shelf: new(shelf)}
}

func (w *world) config() identity.Config {
	return identity.Config{
		Signer: w.device, Blobs: w.shelf, Names: []string{"kms.example", "127.0.0.1"},
		Installation: "test", Now: func() time.Time { return w.now },
	}
}

func (w *world) open(t testing.TB) *identity.Authority {
	t.Helper()
	a, err := identity.Open(t.Context(), w.config())
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newRequest(t testing.TB, key crypto.Signer, edit func(*x509.CertificateRequest)) []byte {
	t.Helper()
	r := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "anything"}}
	if edit != nil {
		edit(r)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func issue(t testing.TB, a *identity.Authority, principal string) *x509.Certificate {
	t.Helper()
	got, err := a.IssueClient(principal, newRequest(t, newKey(t, elliptic.P256()), nil))
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(got.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func TestRoot(t *testing.T) {
	w := newWorld(t)
	c := w.open(t).Root()
	if !c.IsCA || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign {
		t.Errorf("root: got CA %v, path length %d, usage %v", c.IsCA, c.MaxPathLen, c.KeyUsage)
	}
	if got, want := c.NotAfter.Sub(w.now), 10*365*24*time.Hour; got != want {
		t.Errorf("root lives: got %v, want %v", got, want)
	}
	again := w.open(t)
	if !again.Root().Equal(c) {
		t.Error("a second start made another root")
	}
	if got, want := again.Fingerprint(), sha256.Sum256(c.Raw); got != want {
		t.Errorf("fingerprint: got %x, want %x", got, want)
	}
}

func TestIssueClientTakesTheKeyOnly(t *testing.T) {
	w := newWorld(t)
	a, key := w.open(t), newKey(t, elliptic.P384())
	csr := newRequest(t, key, func(r *x509.CertificateRequest) {
		u, _ := url.Parse("keyward://person/admin")
		r.URIs, r.DNSNames, r.Subject.CommonName = []*url.URL{u}, []string{"kms.example"}, "person admin"
	})
	got, err := a.IssueClient("host/db1", csr)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(got.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "keyward://host/db1" || len(leaf.DNSNames) > 0 || leaf.Subject.CommonName != "host db1" {
		t.Errorf("subject: got %v, %v, %v", leaf.URIs, leaf.DNSNames, leaf.Subject)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the certificate is for another key")
	}
	if got, want := leaf.NotAfter.Sub(w.now), 7*24*time.Hour; got != want {
		t.Errorf("life: got %v, want %v", got, want)
	}
	if got, want := w.now.Sub(leaf.NotBefore), 5*time.Minute; got != want {
		t.Errorf("backdated: got %v, want %v", got, want)
	}
	if leaf.IsCA || len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth {
		t.Errorf("usage: got CA %v, %v", leaf.IsCA, leaf.ExtKeyUsage)
	}
	if n := leaf.SerialNumber.BitLen(); n < 100 || n > 128 {
		t.Errorf("serial: got %d bits, want 128", n)
	}
	peer, err := a.Verify(leaf)
	if err != nil || peer.Principal != "host/db1" || peer.Serial != got.Serial || len(peer.Serial) != 32 {
		t.Errorf("Verify: got %+v, %v", peer, err)
	}
	if other := issue(t, a, "host/db1"); other.SerialNumber.Cmp(leaf.SerialNumber) == 0 {
		t.Error("two certificates with one serial")
	}
}

func TestCheckRequest(t *testing.T) {
	a := newWorld(t).open(t)
	t.Setenv("GODEBUG", "rsa1024min=0") // or Go itself makes no weak key
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := newRequest(t, newKey(t, elliptic.P256()), nil)
	forged := slices.Clone(good)
	forged[len(forged)-1] ^= 1
	big := newRequest(t, newKey(t, elliptic.P256()), func(r *x509.CertificateRequest) {
		r.DNSNames = []string{strings.Repeat("a.", 5000)}
	})
	tests := []struct {
		name string
		csr  []byte
		want error
	}{
		{"P-256", good, nil},
		{"P-384", newRequest(t, newKey(t, elliptic.P384()), nil), nil},
		{"RSA 2048", newRequest(t, rsa2048, nil), nil},
		{"RSA 1024", newRequest(t, weak, nil), dek.ErrInvalid},
		{"P-521", newRequest(t, newKey(t, elliptic.P521()), nil), dek.ErrInvalid},
		{"Ed25519", newRequest(t, ed, nil), dek.ErrInvalid},
		{"flipped signature", forged, dek.ErrInvalid},
		{"truncated", good[:len(good)-1], dek.ErrInvalid},
		{"extended", append(slices.Clone(good), 0), dek.ErrInvalid},
		{"empty", nil, dek.ErrInvalid},
		{"oversized", big, dek.ErrInvalid},
		{"a certificate", a.Root().Raw, dek.ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := a.CheckRequest(tt.csr); !errors.Is(err, tt.want) {
				t.Errorf("CheckRequest: got %v, want %v", err, tt.want)
			}
			if got, err := a.IssueClient("host/db1", tt.csr); !errors.Is(err, tt.want) || (err == nil) != (got != nil) {
				t.Errorf("IssueClient: got %v, %v, want %v", got, err, tt.want)
			}
		})
	}
	for _, p := range []string{"", "host/", "system/kms", "local/root", "host/a/b", "host/A", "person/a\x00"} {
		if _, err := a.IssueClient(p, good); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("IssueClient(%q): got %v, want dek.ErrInvalid", p, err)
		}
	}
}

// signLeaf has the device sign a leaf of the test's making, as an attacker
// with another kind of certificate of ours would hold.
func signLeaf(t *testing.T, w *world, a *identity.Authority, edit func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	u, _ := url.Parse("keyward://host/db1")
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: w.now.Add(-time.Minute), NotAfter: w.now.Add(time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(c)
	der, err := x509.CreateCertificate(rand.Reader, c, a.Root(), newKey(t, elliptic.P256()).Public(), w.device)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

func uris(list ...string) []*url.URL {
	var us []*url.URL
	for _, s := range list {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		us = append(us, u)
	}
	return us
}

func TestVerify(t *testing.T) {
	tests := []struct {
		name string
		edit func(*x509.Certificate)
		want error
	}{
		{"untouched", func(*x509.Certificate) {}, nil},
		{"for servers", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, dek.ErrDenied},
		{"for both", func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) }, dek.ErrDenied},
		{"for anything", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }, dek.ErrDenied},
		{"for nothing", func(c *x509.Certificate) { c.ExtKeyUsage = nil }, dek.ErrDenied},
		{"no subject", func(c *x509.Certificate) { c.URIs = nil }, dek.ErrDenied},
		{"two subjects", func(c *x509.Certificate) { c.URIs = uris("keyward://host/db1", "keyward://host/db2") }, dek.ErrDenied},
		{"other scheme", func(c *x509.Certificate) { c.URIs = uris("spiffe://host/db1") }, dek.ErrDenied},
		{"system", func(c *x509.Certificate) { c.URIs = uris("keyward://system/kms") }, dek.ErrDenied},
		{"local root", func(c *x509.Certificate) { c.URIs = uris("keyward://local/root") }, dek.ErrDenied},
		{"escaped", func(c *x509.Certificate) { c.URIs = uris("keyward://host/%64b1") }, dek.ErrDenied},
		{"port", func(c *x509.Certificate) { c.URIs = uris("keyward://host:1/db1") }, dek.ErrDenied},
		{"user", func(c *x509.Certificate) { c.URIs = uris("keyward://a@host/db1") }, dek.ErrDenied},
		{"query", func(c *x509.Certificate) { c.URIs = uris("keyward://host/db1?x=1") }, dek.ErrDenied},
		{"fragment", func(c *x509.Certificate) { c.URIs = uris("keyward://host/db1#x") }, dek.ErrDenied},
		{"DNS name too", func(c *x509.Certificate) { c.DNSNames = []string{"kms.example"} }, dek.ErrDenied},
		{"mail too", func(c *x509.Certificate) { c.EmailAddresses = []string{"a@example"} }, dek.ErrDenied},
		{"CA", func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage = x509.KeyUsageCertSign }, dek.ErrDenied},
		{"begins in 4 minutes", func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(5 * time.Minute) }, nil},
		{"begins in 10 minutes", func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(11 * time.Minute) }, dek.ErrDenied},
		{"ended 29 days ago", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = c.NotBefore.AddDate(0, 0, -36), c.NotAfter.AddDate(0, 0, -29)
		}, nil},
		{"ended 31 days ago", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = c.NotBefore.AddDate(0, 0, -38), c.NotAfter.AddDate(0, 0, -31)
		}, dek.ErrDenied},
	}
	w := newWorld(t)
	early := w.now
	w.now = early.AddDate(0, 0, -60) // the root is older than every leaf
	a := w.open(t)
	w.now = early
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			peer, err := a.Verify(signLeaf(t, w, a, tt.edit))
			if !errors.Is(err, tt.want) || (err != nil) != (peer == identity.Peer{}) {
				t.Errorf("got %+v, %v, want %v", peer, err, tt.want)
			}
		})
	}
}

// TestVerifyCertificatesOfAuthorities: neither those of another authority nor
// the authority's own are a client's.
func TestVerifyCertificatesOfAuthorities(t *testing.T) {
	a := newWorld(t).open(t)
	t.Run("foreign CA of the same name", func(t *testing.T) {
		other := newWorld(t)
		if _, err := a.Verify(issue(t, other.open(t), "host/db1")); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("got %v, want dek.ErrDenied", err)
		}
	})
	t.Run("our root itself", func(t *testing.T) {
		if _, err := a.Verify(a.Root()); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("got %v, want dek.ErrDenied", err)
		}
	})
	t.Run("our server", func(t *testing.T) {
		c, err := a.ServerCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Verify(c.Leaf); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("got %v, want dek.ErrDenied", err)
		}
	})
}

func TestStanding(t *testing.T) {
	end := time.Date(2026, 3, 8, 0, 0, 0, 0, time.UTC)
	tests := []struct {
		after time.Duration
		want  identity.Standing
	}{
		{-time.Hour, identity.Full},
		{5 * time.Minute, identity.Full},
		{5*time.Minute + time.Second, identity.RenewOnly},
		{30 * 24 * time.Hour, identity.RenewOnly},
		{30*24*time.Hour + time.Second, identity.Ended},
		{365 * 24 * time.Hour, identity.Ended},
	}
	for _, tt := range tests {
		if got := (identity.Peer{NotAfter: end}).Standing(end.Add(tt.after)); got != tt.want {
			t.Errorf("%v after the end: got %v, want %v", tt.after, got, tt.want)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	tests := []struct {
		name string
		edit func(*identity.Config)
	}{
		{"no signer", func(c *identity.Config) { c.Signer = nil }},
		{"no shelf", func(c *identity.Config) { c.Blobs = nil }},
		{"no name", func(c *identity.Config) { c.Names = nil }},
		{"wildcard", func(c *identity.Config) { c.Names = []string{"*.example"} }},
		{"URL", func(c *identity.Config) { c.Names = []string{"https://kms.example"} }},
		{"port", func(c *identity.Config) { c.Names = []string{"kms.example:443"} }},
		{"short life", func(c *identity.Config) { c.ClientLifetime = time.Second }},
		{"long life", func(c *identity.Config) { c.ServerLifetime = 366 * 24 * time.Hour }},
		{"Ed25519 signer", func(c *identity.Config) { _, c.Signer, _ = ed25519.GenerateKey(rand.Reader) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			c := w.config()
			tt.edit(&c)
			if _, err := identity.Open(t.Context(), c); !errors.Is(err, dek.ErrInvalid) {
				t.Errorf("got %v, want dek.ErrInvalid", err)
			}
			if len(w.shelf.kept) > 0 {
				t.Errorf("a refused start kept %v", slices.Collect(maps.Keys(w.shelf.kept)))
			}
		})
	}
}

func TestAuthorityPrintsNothing(t *testing.T) {
	a := newWorld(t).open(t)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
		if got, want := fmt.Sprintf(verb, a), "identity.Authority(redacted)"; got != want {
			t.Errorf("%s: got %q, want %q", verb, got, want)
		}
	}
}

func FuzzCheckRequest(f *testing.F) {
	key := newKey(f, elliptic.P256())
	f.Add(newRequest(f, key, nil))
	f.Add([]byte{0x30, 0x82})
	f.Add([]byte{})
	a := newWorld(f).open(f)
	f.Fuzz(func(t *testing.T, csr []byte) {
		err := a.CheckRequest(csr)
		if err != nil && !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("class: got %v, want dek.ErrInvalid", err)
		}
	})
}

func FuzzPrincipalURI(f *testing.F) {
	for _, s := range []string{"keyward://host/db1", "keyward://person/a", "keyward:host/db1", "keyward://host/db1?", "keyward:///host/db1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		p, err := identity.PrincipalOf(u)
		if (err == nil) == (p == "") {
			t.Fatalf("%q: result and error: %q, %v", s, p, err)
		}
		if err == nil && identity.PrincipalURI(p).String() != u.String() {
			t.Errorf("%q names %q, which is written %q", s, p, identity.PrincipalURI(p))
		}
	})
}
