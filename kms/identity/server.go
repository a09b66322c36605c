package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// A served is a server certificate in use.
type served struct {
	cert   tls.Certificate
	issuer *x509.Certificate
}

const serverVersion = 1

type serverJSON struct {
	Version     int    `json:"version"`
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key"` // PKCS #8; the record is sealed
}

// loadServer takes the stored certificate if it is good, else issues one.
func (a *Authority) loadServer(ctx context.Context) error {
	b, ok := a.config.Blobs.Blob(blobServer)
	if ok {
		s, err := a.parseServer(b)
		if err != nil {
			return err
		}
		a.server.Store(s)
		if !a.due(s, a.config.Now()) {
			return nil
		}
	}
	return a.renewServer(ctx)
}

// parseServer reads the record of the server's certificate. Its issuer must be
// one of the roots. Every error wraps dek.ErrCorrupt.
func (a *Authority) parseServer(b []byte) (*served, error) {
	var j serverJSON
	if err := decodeStrictly(b, &j); err != nil {
		return nil, fmt.Errorf("%w: record of the server certificate: not in its form", dek.ErrCorrupt)
	}
	defer clear(j.Key)
	leaf, err := x509.ParseCertificate(j.Certificate)
	if err != nil || j.Version != serverVersion {
		return nil, fmt.Errorf("%w: record of the server certificate: version %d, no certificate of ours", dek.ErrCorrupt, j.Version)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(j.Key)
	key, isEC := parsed.(*ecdsa.PrivateKey)
	if err != nil || !isEC || !samePublic(leaf.PublicKey, key.Public()) {
		return nil, fmt.Errorf("%w: record of the server certificate: key and certificate don't belong together", dek.ErrCorrupt)
	}
	for _, r := range a.roots {
		if leaf.CheckSignatureFrom(r.cert) == nil {
			return newServed(leaf, key, r.cert), nil
		}
	}
	return nil, fmt.Errorf("%w: record of the server certificate: no root of ours issued it", dek.ErrCorrupt)
}

// newServed joins the parts; the root goes along, since a host that enrols has
// only its fingerprint.
func newServed(leaf *x509.Certificate, key *ecdsa.PrivateKey, issuer *x509.Certificate) *served {
	return &served{
		cert:   tls.Certificate{Certificate: [][]byte{leaf.Raw, issuer.Raw}, PrivateKey: key, Leaf: leaf},
		issuer: issuer,
	}
}

// due reports whether s is to be replaced at now: a third of its life is over
// or it lacks a name. One of a root whose key is gone is kept as long as it
// lives, less a tenth: clients trust its root and learn of the new one with
// their next renewal, which comes long before.
func (a *Authority) due(s *served, now time.Time) bool {
	leaf := s.cert.Leaf
	for _, name := range a.config.Names {
		if leaf.VerifyHostname(name) != nil {
			return true
		}
	}
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	renewAt := leaf.NotBefore.Add(life / 3)
	if !samePublic(s.issuer.PublicKey, a.config.Signer.Public()) {
		renewAt = leaf.NotAfter.Add(-life / 10)
	}
	return now.Before(leaf.NotBefore) || !now.Before(renewAt)
}

// renewServer issues, keeps and then shows a new server certificate.
func (a *Authority) renewServer(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("%w: make server key: %w", dek.ErrUnavailable, err)
	}
	now := a.config.Now()
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "Keyward key service"},
		NotBefore:   now.Add(-clockTolerance),
		NotAfter:    now.Add(a.config.ServerLifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, name := range a.config.Names {
		if ip := net.ParseIP(name); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	leaf, err := a.sign(t, key.Public())
	if err != nil {
		return err
	}
	if err := a.keepServer(ctx, leaf, key); err != nil {
		return err
	}
	old := a.server.Swap(newServed(leaf, key, a.roots[0].cert))
	if old != nil && !samePublic(old.issuer.PublicKey, a.roots[0].cert.PublicKey) {
		a.config.Logger.Warn("the server leaves the certificate of a lost CA key: hosts that have not renewed since must enrol again",
			"was", old.cert.Leaf.NotAfter)
	}
	a.config.Logger.Info("made a server certificate", "names", strings.Join(a.config.Names, ","), "until", leaf.NotAfter)
	return nil
}

func (a *Authority) keepServer(ctx context.Context, leaf *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("%w: server key: %w", dek.ErrUnavailable, err)
	}
	defer clear(der)
	b, err := json.Marshal(serverJSON{Version: serverVersion, Certificate: leaf.Raw, Key: der})
	if err != nil {
		return fmt.Errorf("%w: record of the server certificate: %w", dek.ErrUnavailable, err)
	}
	defer clear(b)
	if err := a.config.Blobs.PutBlob(ctx, blobServer, b); err != nil {
		return fmt.Errorf("keep server certificate: %w", err)
	}
	return nil
}

// ServerCertificate is a tls.Config.GetCertificate: each handshake gets the
// newest certificate, so a renewal needs no restart.
func (a *Authority) ServerCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return &a.server.Load().cert, nil
}

// ServerNotAfter returns the end of the certificate that the server shows.
func (a *Authority) ServerNotAfter() time.Time { return a.server.Load().cert.Leaf.NotAfter }

// lookEvery is how often Run looks whether the certificate is due: one that
// was made while the clock was wrong is replaced so soon after it was set.
const lookEvery = time.Minute

// Run renews the server's certificate when it is due, until ctx ends. A
// renewal that fails is logged and tried again: the old certificate has two
// thirds of its life left.
func (a *Authority) Run(ctx context.Context) {
	every := min(a.config.ServerLifetime/60, lookEvery)
	tick := time.NewTicker(jitter(every))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s := a.server.Load()
		if !a.due(s, a.config.Now()) {
			continue
		}
		if err := a.renewServer(ctx); err != nil {
			a.config.Logger.Warn("the server certificate could not be renewed", "until", s.cert.Leaf.NotAfter, "error", err)
		}
	}
}

// jitter returns d less up to a tenth, so that nodes don't renew together.
func jitter(d time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(d/10)+1))
	if err != nil {
		return d
	}
	return d - time.Duration(n.Int64())
}

// CheckNames reports whether names can be in a server's certificate: at least
// one, each a DNS name or IP address, no wildcard. It wraps dek.ErrInvalid.
func CheckNames(names []string) error {
	if len(names) == 0 {
		return fmt.Errorf("%w: identity: no server name: give the names and addresses that clients use", dek.ErrInvalid)
	}
	for _, n := range names {
		if net.ParseIP(n) != nil {
			continue
		}
		ok := n != "" && len(n) <= 253 && !strings.HasPrefix(n, ".") && !strings.HasSuffix(n, ".") && !strings.Contains(n, "..")
		for i := 0; ok && i < len(n); i++ {
			c := n[i]
			ok = c == '-' || c == '.' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		}
		if !ok {
			return fmt.Errorf("%w: identity: server name %.80q is neither a DNS name nor an IP address", dek.ErrInvalid, n)
		}
	}
	return nil
}
