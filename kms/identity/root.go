package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"time"

	"github.com/keyward/keyward/dek"
)

// A root is one CA certificate that is trusted. Its key may be gone: after a
// disaster the new token has a new key, and certificates of the old one are
// honoured until the last of them has ended.
type root struct {
	cert    *x509.Certificate
	retired time.Time // zero: its key is in the token now
}

// trusted reports whether certificates under r can still be alive at now.
func (r root) trusted(now time.Time, lifetime time.Duration) bool {
	return r.retired.IsZero() || now.Before(r.retired.Add(lifetime+renewGrace+clockTolerance))
}

// makeRoot signs a CA certificate for signer: path length 0, so that no other
// CA can hang below it.
func makeRoot(signer crypto.Signer, installation string, now time.Time) (*x509.Certificate, error) {
	algorithm, err := algorithmOf(signer.Public())
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		SignatureAlgorithm:    algorithm,
		Subject:               pkix.Name{Organization: []string{"Keyward"}, CommonName: "Keyward CA " + installation},
		NotBefore:             now.Add(-clockTolerance),
		NotAfter:              now.Add(rootLifetime),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, signer.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("%w: make CA certificate: %w", dek.ErrUnavailable, err)
	}
	return parseRoot(der)
}

// parseRoot parses a CA certificate and refuses any other.
func parseRoot(der []byte) (*x509.Certificate, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("%w: CA certificate: %w", dek.ErrInvalid, err)
	}
	if !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("%w: %q is not a CA certificate", dek.ErrInvalid, c.Subject)
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		return nil, fmt.Errorf("%w: CA certificate %q is not self-signed: %w", dek.ErrInvalid, c.Subject, err)
	}
	return c, nil
}

// algorithmOf names the signature the token makes: it is given SHA-256 digests.
func algorithmOf(pub crypto.PublicKey) (x509.SignatureAlgorithm, error) {
	switch pub.(type) {
	case *ecdsa.PublicKey:
		return x509.ECDSAWithSHA256, nil
	case *rsa.PublicKey:
		return x509.SHA256WithRSA, nil
	}
	return 0, fmt.Errorf("%w: CA key is a %T: use EC P-256 or RSA", dek.ErrInvalid, pub)
}

// newSerial returns a random positive number of 128 bits (CA/B Forum BR §7.1
// asks for 64 at least).
func newSerial() (*big.Int, error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(rand.Reader, b); err != nil {
		return nil, fmt.Errorf("%w: serial: %w", dek.ErrUnavailable, err)
	}
	b[0] |= 1 // never zero, however unlikely
	return new(big.Int).SetBytes(b), nil
}

// samePublic compares two public keys of the kinds that x509 knows.
func samePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// bundleVersion is the only version of the record of roots there is.
const bundleVersion = 1

type bundleJSON struct {
	Version int        `json:"version"`
	Roots   []rootJSON `json:"roots"` // newest first
}

type rootJSON struct {
	Certificate []byte     `json:"certificate"`
	Retired     *time.Time `json:"retired,omitempty"`
}

func encodeRoots(roots []root) ([]byte, error) {
	j := bundleJSON{Version: bundleVersion}
	for _, r := range roots {
		e := rootJSON{Certificate: r.cert.Raw}
		if !r.retired.IsZero() {
			at := r.retired.UTC().Truncate(time.Second)
			e.Retired = &at
		}
		j.Roots = append(j.Roots, e)
	}
	b, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("record of roots: %w", err)
	}
	return b, nil
}

// parseRoots reads the record of roots. Every error wraps dek.ErrCorrupt: the
// record is ours and was sealed.
func parseRoots(b []byte) ([]root, error) {
	var j bundleJSON
	if err := decodeStrictly(b, &j); err != nil {
		return nil, fmt.Errorf("%w: record of roots: %w", dek.ErrCorrupt, err)
	}
	if j.Version != bundleVersion || len(j.Roots) == 0 {
		return nil, fmt.Errorf("%w: record of roots: version %d with %d roots", dek.ErrCorrupt, j.Version, len(j.Roots))
	}
	roots := make([]root, 0, len(j.Roots))
	for _, e := range j.Roots {
		cert, err := parseRoot(e.Certificate)
		if err != nil {
			return nil, fmt.Errorf("%w: record of roots: %w", dek.ErrCorrupt, err)
		}
		r := root{cert: cert}
		if e.Retired != nil {
			r.retired = *e.Retired
		}
		roots = append(roots, r)
	}
	return roots, nil
}

// decodeStrictly reads exactly one JSON value without unknown fields.
func decodeStrictly(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("data after the end")
	}
	return nil
}
