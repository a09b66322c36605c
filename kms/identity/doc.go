// Package identity is the certificate authority of the key service: its root
// is a key in the token, its certificates name principals. It issues client
// certificates of a few days for requests that an enrolment token or an older
// certificate vouches for, keeps the server's own certificate fresh without a
// restart, and says who a presented certificate stands for.
//
// It refuses everything it did not issue itself, takes nothing but the public
// key from a request, and keeps no list: whether an identity was revoked is
// asked of the service at every call.
package identity

import (
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

const (
	// clockTolerance is how far two clocks may differ: certificates begin so
	// much earlier and are honoured so much longer.
	clockTolerance = 5 * time.Minute
	// renewGrace is how long after its end an unrevoked certificate may still
	// be renewed (and nothing else), so that a weekend's outage or a host that
	// was off needs no new enrolment.
	renewGrace = 30 * 24 * time.Hour
	// clientLifetime and serverLifetime are the defaults.
	clientLifetime = 7 * 24 * time.Hour
	serverLifetime = 90 * 24 * time.Hour
	// rootLifetime is the life of a CA certificate; it is issued anew, for the
	// same key, when less than rootRenewal is left.
	rootLifetime = 10 * 365 * 24 * time.Hour
	rootRenewal  = 365 * 24 * time.Hour
)

// scheme is that of the URI that names a principal: keyward://host/db1.
const scheme = "keyward"

// CheckPrincipal reports whether s can be certified: "person/NAME" or
// "host/NAME". The error wraps dek.ErrInvalid. The principals of the service
// itself ("system/...", "local/...") never get a certificate.
func CheckPrincipal(s string) error {
	kind, name, ok := strings.Cut(s, "/")
	if !ok || kind != "person" && kind != "host" {
		return fmt.Errorf("%w: principal %.80q: use person/NAME or host/NAME", dek.ErrInvalid, s)
	}
	return dek.CheckName(kind, name)
}

// principalURI returns the URI SAN for a checked principal.
func principalURI(principal string) *url.URL {
	kind, name, _ := strings.Cut(principal, "/")
	return &url.URL{Scheme: scheme, Host: kind, Path: "/" + name}
}

// principalOf is the inverse of principalURI: it accepts the exact text that
// principalURI makes, nothing that merely means the same.
func principalOf(u *url.URL) (string, error) {
	principal := u.Host + u.Path
	if err := CheckPrincipal(principal); err != nil {
		return "", err
	}
	if got, want := u.String(), principalURI(principal).String(); got != want {
		return "", fmt.Errorf("%w: subject %.80q is not %s", dek.ErrInvalid, got, want)
	}
	return principal, nil
}
