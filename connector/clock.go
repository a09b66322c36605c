package connector

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// clockTolerance is how far two hosts' clocks may differ before it is said to
// be a fault: what the key service allows for, too.
const clockTolerance = 5 * time.Minute

// explainClock adds to a failed handshake what the two clocks say. A clock that
// is wrong is an outage like any other: nothing is denied, nothing is dropped.
func explainClock(err error, now time.Time) error {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired || invalid.Cert == nil {
		return err
	}
	return fmt.Errorf("%w: the clock of this host says %s, the certificate of the key service is good from %s to %s: compare the clocks of both hosts: %w",
		dek.ErrUnavailable, stamp(now), stamp(invalid.Cert.NotBefore), stamp(invalid.Cert.NotAfter), err)
}

// checkRenewed refuses a renewed certificate that is not good by this host's
// clock. One from the future would lock the host out once the clock of the key
// service is right again; the certificate in use is kept. It wraps
// dek.ErrUnavailable.
func checkRenewed(chain [][]byte, now time.Time) error {
	if len(chain) == 0 {
		return nil // install refuses it
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil //nolint:nilerr // install refuses it, and says why
	}
	if now.Before(leaf.NotBefore.Add(-clockTolerance)) || now.After(leaf.NotAfter) {
		return fmt.Errorf("%w: the clock of this host says %s, the new certificate is good from %s to %s: compare the clocks of this host and the key service; the certificate in use is kept",
			dek.ErrUnavailable, stamp(now), stamp(leaf.NotBefore), stamp(leaf.NotAfter))
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
