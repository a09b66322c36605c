package connector

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// enrolTimeout bounds one attempt at one endpoint.
const enrolTimeout = 20 * time.Second

// EnrollOptions says where the identity goes.
type EnrollOptions struct {
	// Dir is the identity's directory, made 0700 if absent. Required.
	Dir string
	// HostSecretFile is where an agent's host secret is or will be made. Empty
	// for a person: the key is then stored in clear, mode 0600.
	HostSecretFile string
	// Replace allows an identity that is already there to be replaced.
	Replace bool
	// Dial opens a network connection; nil: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

// Fingerprint returns the SHA-256 of a certificate's DER in hexadecimal, the
// form token files carry.
func Fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// Enroll redeems a token file: it makes a P-256 key, proves the service by the
// CA fingerprint, has the key certified and stores the identity durably. The
// token works once. Errors wrap dek.ErrDenied (token wrong, used or ended: ask
// for a new one), dek.ErrUnavailable (no endpoint answered; try again),
// dek.ErrExists (there is an identity; Replace allows it), dek.ErrInvalid, and
// dek.ErrAuth if the service is not the one the token is for.
func Enroll(ctx context.Context, t TokenFile, o EnrollOptions) (*Identity, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	now := time.Now
	if o.Now != nil {
		now = o.Now
	}
	if now().After(t.Expires) {
		return nil, fmt.Errorf("%w: enrol: the token ended at %s and the clock of this host says %s: ask for a new one, or set the clock", dek.ErrDenied, stamp(t.Expires), stamp(now()))
	}
	i, err := prepareIdentity(o)
	if err != nil {
		return nil, err
	}
	if err := i.enroll(ctx, t, o); err != nil {
		i.Close()
		return nil, err
	}
	return i, nil
}

// prepareIdentity proves that the identity can be stored before the one-time
// token is spent.
func prepareIdentity(o EnrollOptions) (*Identity, error) {
	if o.Dir == "" {
		return nil, fmt.Errorf("%w: enrol: no directory", dek.ErrInvalid)
	}
	if err := makePrivateDir(o.Dir); err != nil {
		return nil, fmt.Errorf("enrol: %w", err)
	}
	path := filepath.Join(o.Dir, identityFile)
	if _, err := os.Lstat(path); err == nil && !o.Replace {
		return nil, fmt.Errorf("%w: enrol: %s: this is enrolled already; say so if it shall be replaced", dek.ErrExists, path)
	}
	probe := filepath.Join(o.Dir, ".probe")
	if err := writeFileDurably(probe, []byte("probe"), 0o600); err != nil {
		return nil, fmt.Errorf("enrol: %w", err)
	}
	if err := os.Remove(probe); err != nil {
		return nil, diskError(probe, err)
	}
	i := &Identity{dir: o.Dir}
	if o.HostSecretFile == "" {
		return i, nil
	}
	if err := checkHostSecretPlace(o.Dir, o.HostSecretFile); err != nil {
		return nil, err
	}
	var err error
	i.host, err = OpenHostSecret(o.HostSecretFile, true)
	return i, err
}

func (i *Identity) enroll(ctx context.Context, t TokenFile, o EnrollOptions) error {
	key, csr, err := newRequest(t.Principal)
	if err != nil {
		return err
	}
	var failures []error
	for _, endpoint := range t.Endpoints {
		resp, err := enrollAt(ctx, endpoint, t, csr, o)
		if err != nil {
			failures = append(failures, err)
			// A token is burned by an answer, not by a dead endpoint.
			if retryable(err) && ctx.Err() == nil {
				continue
			}
			return err
		}
		return i.adopt(key, resp, t)
	}
	return fmt.Errorf("enrol: no endpoint answered: %w", errors.Join(failures...))
}

// adopt checks the answer, stores it and puts it in use.
func (i *Identity) adopt(key *ecdsa.PrivateKey, resp *kmspb.EnrollResponse, t TokenFile) error {
	if resp.GetPrincipal() != t.Principal {
		return fmt.Errorf("%w: enrol: certified as %q, the token file says %q", dek.ErrAuth, resp.GetPrincipal(), t.Principal)
	}
	pinned := false
	for _, der := range resp.GetRoots() {
		if ca, err := x509.ParseCertificate(der); err == nil {
			pinned = pinned || matchesFingerprint(ca, t.CAFingerprint)
		}
	}
	if !pinned {
		return fmt.Errorf("%w: enrol: the root of the token file is not among the service's roots", dek.ErrAuth)
	}
	return i.replace(key, resp, t.Principal, t.Endpoints)
}

// replace checks new content on a scratch identity, stores it, installs it.
func (i *Identity) replace(key *ecdsa.PrivateKey, resp *kmspb.EnrollResponse, principal string, endpoints []string) error {
	var scratch Identity
	if err := scratch.install(key, resp.GetCertificate(), resp.GetRoots(), principal, endpoints); err != nil {
		return fmt.Errorf("certificate from the service: %w", err)
	}
	if err := i.save(key, resp.GetCertificate(), resp.GetRoots(), principal, endpoints); err != nil {
		return err
	}
	return i.install(key, resp.GetCertificate(), resp.GetRoots(), principal, endpoints)
}

// newRequest makes a key and a PKCS #10 request; only its key is used.
func newRequest(principal string) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make identity key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: principal}}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	return key, csr, nil
}

func enrollAt(ctx context.Context, endpoint string, t TokenFile, csr []byte, o EnrollOptions) (*kmspb.EnrollResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, enrolTimeout)
	defer cancel()
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, fmt.Errorf("%w: endpoint %q", dek.ErrInvalid, endpoint)
	}
	pin := &pinnedServer{fingerprint: t.CAFingerprint, host: host, now: o.Now}
	conn, err := grpc.NewClient("passthrough:///"+endpoint,
		grpc.WithTransportCredentials(credentials.NewTLS(pin.tlsConfig())),
		grpc.WithContextDialer(dialer(o.Dial)), connectParams(), grpc.WithDisableServiceConfig())
	if err != nil {
		return nil, fmt.Errorf("%w: endpoint %q: %w", dek.ErrInvalid, endpoint, err)
	}
	defer func() { _ = conn.Close() }()
	resp, err := kmspb.NewEnrolmentClient(conn).Enroll(ctx, &kmspb.EnrollRequest{Token: t.Token.Reveal(), Csr: csr})
	if err != nil && strings.Contains(err.Error(), errForeignServer.Error()) {
		// gRPC flattens the handshake's error to text; the handshake failed
		// either way and the token was not sent.
		return nil, fmt.Errorf("%w: enrol at %s: %w", dek.ErrAuth, endpoint, errForeignServer)
	}
	return resp, decodeError(ctx, "enrol", endpoint, err)
}

var errForeignServer = errors.New("the server does not chain to the CA fingerprint of the token file: wrong endpoint, old token file, or someone in between")

// A pinnedServer verifies a server by the fingerprint of its root alone, for
// the one connection that is made before the roots are known.
type pinnedServer struct {
	fingerprint string
	host        string
	now         func() time.Time
}

func (p *pinnedServer) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: p.host,
		// verify does the whole verification: the chain must end in the root
		// with the pinned fingerprint, which the server sends along.
		InsecureSkipVerify: true, //nolint:gosec // see verify
		VerifyConnection:   p.verify,
	}
}

func (p *pinnedServer) verify(s tls.ConnectionState) error {
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	found := false
	for _, c := range s.PeerCertificates[1:] {
		if c.IsCA && matchesFingerprint(c, p.fingerprint) {
			roots.AddCert(c)
			found = true
		} else {
			inter.AddCert(c)
		}
	}
	if !found {
		return errForeignServer
	}
	now := time.Now()
	if p.now != nil {
		now = p.now()
	}
	opts := x509.VerifyOptions{Roots: roots, Intermediates: inter, DNSName: p.host, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, CurrentTime: now}
	if _, err := s.PeerCertificates[0].Verify(opts); err != nil {
		return fmt.Errorf("server certificate: %w", explainClock(err, now))
	}
	return nil
}

// matchesFingerprint accepts the SHA-256 of the certificate or of its public
// key (SPKI), so that a root that was issued anew for the same key still counts.
func matchesFingerprint(c *x509.Certificate, fingerprint string) bool {
	want := []byte(strings.ToLower(fingerprint))
	whole := []byte(Fingerprint(c.Raw))
	spki := []byte(Fingerprint(c.RawSubjectPublicKeyInfo))
	return subtle.ConstantTimeCompare(whole, want)|subtle.ConstantTimeCompare(spki, want) == 1
}
