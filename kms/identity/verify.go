package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// A Standing says what a certificate is good for at a moment.
type Standing uint8

// The standings. Zero is none of them.
const (
	Full      Standing = iota + 1 // everything its principal may do
	RenewOnly                     // it ran out: a renewal, and nothing else
	Ended                         // nothing; enrol again
)

// A Peer is who a verified certificate stands for. Whether the identity was
// revoked is not known here.
type Peer struct {
	Principal string    // "person/NAME" or "host/NAME"
	Serial    string    // of the certificate, hexadecimal
	NotAfter  time.Time // end of the certificate
}

// Standing returns what the certificate is good for at now. Connections
// outlive certificates, so it is asked at every call.
func (p Peer) Standing(now time.Time) Standing {
	switch {
	case !now.After(p.NotAfter.Add(clockTolerance)):
		return Full
	case !now.After(p.NotAfter.Add(renewGrace)):
		return RenewOnly
	}
	return Ended
}

// Verify says who a presented leaf certificate stands for: one that a trusted
// root issued, for client authentication and nothing else, that names exactly
// one principal, and that has begun and not ended for more than the time in
// which it may be renewed. Every error wraps dek.ErrDenied.
func (a *Authority) Verify(leaf *x509.Certificate) (Peer, error) {
	now := a.config.Now()
	opts := x509.VerifyOptions{
		Roots:         a.pool(now),
		Intermediates: x509.NewCertPool(), // no CA hangs below ours
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		CurrentTime:   honoured(leaf, now),
	}
	if _, err := leaf.Verify(opts); err != nil {
		hint := ""
		if e := (x509.CertificateInvalidError{}); errors.As(err, &e) && e.Reason == x509.Expired {
			hint = " (if it should be good, compare the clocks of both hosts)"
		}
		return Peer{}, fmt.Errorf("%w: client certificate: %w%s", dek.ErrDenied, err, hint)
	}
	principal, err := soleSubject(leaf)
	if err != nil {
		return Peer{}, fmt.Errorf("%w: client certificate: %w", dek.ErrDenied, err)
	}
	return Peer{Principal: principal, Serial: serialText(leaf), NotAfter: leaf.NotAfter}, nil
}

// honoured returns the time at which leaf is to be verified: now, or the end
// it overran by less than may be forgiven.
func honoured(leaf *x509.Certificate, now time.Time) time.Time {
	switch {
	case now.Before(leaf.NotBefore) && !now.Add(clockTolerance).Before(leaf.NotBefore):
		return leaf.NotBefore
	case now.After(leaf.NotAfter) && !now.After(leaf.NotAfter.Add(renewGrace)):
		return leaf.NotAfter
	}
	return now
}

// soleSubject returns the one principal of a client certificate, and refuses
// certificates that could be taken for something else.
func soleSubject(leaf *x509.Certificate) (string, error) {
	if leaf.IsCA {
		return "", fmt.Errorf("%w: it is a CA", dek.ErrInvalid)
	}
	if len(leaf.ExtKeyUsage) != 1 || leaf.ExtKeyUsage[0] != x509.ExtKeyUsageClientAuth || len(leaf.UnknownExtKeyUsage) > 0 {
		return "", fmt.Errorf("%w: it is not for client authentication alone", dek.ErrInvalid)
	}
	if len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 {
		return "", fmt.Errorf("%w: it does not name exactly one principal", dek.ErrInvalid)
	}
	return principalOf(leaf.URIs[0])
}
