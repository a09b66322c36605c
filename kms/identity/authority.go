package identity

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/keyward/keyward/dek"
)

// Names of the sealed records that an Authority keeps.
const (
	blobRoots  = "tls/ca"
	blobServer = "tls/server"
)

// Blobs keeps small sealed records. PutBlob returns once the record is
// durable; Blob returns what the last PutBlob of the name kept.
type Blobs interface {
	Blob(name string) ([]byte, bool)
	PutBlob(ctx context.Context, name string, b []byte) error
}

// Config says what an Authority works with.
type Config struct {
	// Signer is the CA key, in the token. Required. It is asked to sign
	// SHA-256 digests only.
	Signer crypto.Signer
	// Blobs keeps the roots and the server's certificate and key. Required.
	Blobs Blobs
	// Names are the DNS names and IP addresses that clients use for this
	// server. At least one.
	Names []string
	// Installation is shown in the subject of the CA, for people. May be empty.
	Installation string
	// ClientLifetime and ServerLifetime bound certificates from now on;
	// 0: 7 and 90 days. At least a minute, at most a year.
	ClientLifetime time.Duration
	ServerLifetime time.Duration
	// Now tells the time; nil: time.Now.
	Now func() time.Time
	// Logger gets renewals and their failures; nil: none.
	Logger *slog.Logger
}

func (c *Config) check() error {
	if c.Signer == nil || c.Blobs == nil {
		return fmt.Errorf("%w: identity: Signer and Blobs are required", dek.ErrInvalid)
	}
	if c.ClientLifetime == 0 {
		c.ClientLifetime = clientLifetime
	}
	if c.ServerLifetime == 0 {
		c.ServerLifetime = serverLifetime
	}
	for _, d := range []time.Duration{c.ClientLifetime, c.ServerLifetime} {
		if d < time.Minute || d > 365*24*time.Hour {
			return fmt.Errorf("%w: identity: certificate lifetime %v: use 1m to 8760h", dek.ErrInvalid, d)
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return CheckNames(c.Names)
}

// An Authority issues and verifies certificates. It may be used concurrently.
type Authority struct {
	config Config
	roots  []root // newest first; the first is of Config.Signer; fixed by Open
	server atomic.Pointer[served]
}

// Format prints the type alone: the server's private key hangs below it.
func (*Authority) Format(s fmt.State, _ rune) {
	_, _ = io.WriteString(s, "identity.Authority(redacted)")
}

// Open loads the roots or makes the first, and has a server certificate ready
// that is good for at least two thirds of its life: it renews before anyone
// listens. When the signer is a new one (a restore to a new token), a new root
// is made and the old ones stay trusted for as long as certificates they
// issued can live. Errors wrap dek.ErrInvalid (configuration), dek.ErrCorrupt
// (records), or dek.ErrUnavailable (token or store; try again).
func Open(ctx context.Context, c Config) (*Authority, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	a := &Authority{config: c}
	if err := a.loadRoots(ctx); err != nil {
		return nil, err
	}
	if err := a.loadServer(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *Authority) loadRoots(ctx context.Context) error {
	now := a.config.Now()
	if b, ok := a.config.Blobs.Blob(blobRoots); ok {
		var err error
		if a.roots, err = parseRoots(b); err != nil {
			return err
		}
	}
	if len(a.roots) > 0 && samePublic(a.roots[0].cert.PublicKey, a.config.Signer.Public()) &&
		a.roots[0].cert.NotAfter.Sub(now) > rootRenewal {
		return nil
	}
	cert, err := makeRoot(a.config.Signer, a.config.Installation, now)
	if err != nil {
		return err
	}
	for i := range a.roots {
		// A root that was merely issued anew has its key still: not retired.
		if a.roots[i].retired.IsZero() && !samePublic(a.roots[i].cert.PublicKey, cert.PublicKey) {
			a.roots[i].retired = now
		}
	}
	a.roots = append([]root{{cert: cert}}, a.roots...)
	b, err := encodeRoots(a.roots)
	if err != nil {
		return err
	}
	if err := a.config.Blobs.PutBlob(ctx, blobRoots, b); err != nil {
		return fmt.Errorf("keep CA certificate: %w", err)
	}
	a.config.Logger.Info("made a CA certificate", "subject", cert.Subject.String(), "until", cert.NotAfter)
	return nil
}

// pool returns the roots that count at now.
func (a *Authority) pool(now time.Time) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, r := range a.roots {
		if r.trusted(now, a.config.ClientLifetime) {
			pool.AddCert(r.cert)
		}
	}
	return pool
}

// Roots returns the DER of every CA certificate that clients shall trust, the
// issuer of the certificate that the server shows now first.
func (a *Authority) Roots() [][]byte {
	shown, now := a.server.Load().issuer, a.config.Now()
	ders := [][]byte{shown.Raw}
	for _, r := range a.roots {
		if !bytes.Equal(r.cert.Raw, shown.Raw) && r.trusted(now, a.config.ClientLifetime) {
			ders = append(ders, r.cert.Raw)
		}
	}
	return ders
}

// Fingerprint returns the SHA-256 of the CA certificate that ends the chain
// the server shows now: what an enrolment token carries.
func (a *Authority) Fingerprint() [sha256.Size]byte {
	return sha256.Sum256(a.server.Load().issuer.Raw)
}

// An Issued is a certificate with what its owner needs beside it.
type Issued struct {
	Chain     [][]byte // DER, leaf first, then its root
	Roots     [][]byte // DER of every root to trust
	Principal string
	Serial    string // as Peer.Serial
	NotAfter  time.Time
}

// maxRequestBytes bounds a PKCS #10 request: RSA-4096 needs less than 1 KiB.
const maxRequestBytes = 8 << 10

// CheckRequest reports whether csr (PKCS #10 DER) can be certified: its key is
// EC P-256 or P-384 or RSA 2048 to 4096, and signed it. Errors wrap
// dek.ErrInvalid. Nothing else in the request counts.
func (*Authority) CheckRequest(csr []byte) error {
	_, err := requestKey(csr)
	return err
}

func requestKey(csr []byte) (crypto.PublicKey, error) {
	if len(csr) == 0 || len(csr) > maxRequestBytes {
		return nil, fmt.Errorf("%w: certificate request: %d bytes, want 1 to %d", dek.ErrInvalid, len(csr), maxRequestBytes)
	}
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("%w: certificate request: not PKCS #10 DER", dek.ErrInvalid)
	}
	switch k := r.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return nil, fmt.Errorf("%w: certificate request: EC key not on P-256 or P-384", dek.ErrInvalid)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 || k.E < 65537 {
			return nil, fmt.Errorf("%w: certificate request: RSA key of %d bits, want 2048 to 4096", dek.ErrInvalid, n)
		}
	default:
		return nil, fmt.Errorf("%w: certificate request: key is neither EC nor RSA", dek.ErrInvalid)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: certificate request: its key did not sign it", dek.ErrInvalid)
	}
	return r.PublicKey, nil
}

// IssueClient certifies the key of csr for principal, which the caller has
// authenticated. Errors wrap dek.ErrInvalid, or dek.ErrUnavailable when the
// token can't sign.
func (a *Authority) IssueClient(principal string, csr []byte) (*Issued, error) {
	if err := CheckPrincipal(principal); err != nil {
		return nil, err
	}
	pub, err := requestKey(csr)
	if err != nil {
		return nil, err
	}
	now := a.config.Now()
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: strings.Replace(principal, "/", " ", 1)},
		URIs:        []*url.URL{principalURI(principal)},
		NotBefore:   now.Add(-clockTolerance),
		NotAfter:    now.Add(a.config.ClientLifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	leaf, err := a.sign(t, pub)
	if err != nil {
		return nil, err
	}
	return &Issued{
		Chain: [][]byte{leaf.Raw, a.roots[0].cert.Raw}, Roots: a.Roots(),
		Principal: principal, Serial: serialText(leaf), NotAfter: leaf.NotAfter,
	}, nil
}

// sign completes t and has it signed under the newest root.
func (a *Authority) sign(t *x509.Certificate, pub crypto.PublicKey) (*x509.Certificate, error) {
	parent := a.roots[0].cert
	var err error
	if t.SerialNumber, err = newSerial(); err != nil {
		return nil, err
	}
	if t.SignatureAlgorithm, err = algorithmOf(a.config.Signer.Public()); err != nil {
		return nil, err
	}
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.BasicConstraintsValid = true
	if t.NotAfter.After(parent.NotAfter) {
		t.NotAfter = parent.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, pub, a.config.Signer)
	if err != nil {
		return nil, fmt.Errorf("%w: sign certificate: %w", dek.ErrUnavailable, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: sign certificate: %w", dek.ErrUnavailable, err)
	}
	return leaf, nil
}

// serialText is the form of a serial in records and deny lists: hexadecimal.
func serialText(c *x509.Certificate) string { return fmt.Sprintf("%032x", c.SerialNumber) }
