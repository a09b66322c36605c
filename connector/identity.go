package connector

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/keyward/keyward/dek"
)

const (
	identityFile    = "identity.json"
	identityVersion = 1
	// maxIdentityBytes bounds the identity file: a key and a few certificates.
	maxIdentityBytes = 1 << 20
)

// An Identity is a client certificate with its key and the roots that the
// service is pinned to. It is safe for concurrent use; a renewal replaces its
// content in place, and new connections take the new one.
type Identity struct {
	dir  string
	host *dek.Key // seals the private key at rest; nil: a person's, in clear

	mu        sync.Mutex
	cert      tls.Certificate
	leaf      *x509.Certificate
	roots     []*x509.Certificate
	pool      *x509.CertPool
	principal string
	endpoints []string
}

// identityJSON is the file's form. One file holds everything, so that key and
// certificate are replaced together or not at all.
type identityJSON struct {
	Version      int      `json:"keyward_identity"`
	Principal    string   `json:"principal"`
	Endpoints    []string `json:"endpoints"`
	Key          []byte   `json:"key,omitempty"`        // PKCS #8, in clear: a person's
	SealedKey    []byte   `json:"sealed_key,omitempty"` // PKCS #8 under the host secret
	Certificates [][]byte `json:"certificates"`         // DER, leaf first
	Roots        [][]byte `json:"roots"`                // DER
}

// LoadIdentity reads the identity in dir. hostSecretFile is empty for a
// person's, or where an agent's host secret is (see OpenHostSecret); an
// identity whose key is not sealed is then refused. It wraps
// dek.ErrNotFound if there is no identity, dek.ErrInvalid for a file others can
// read or that is malformed, dek.ErrAuth if the host secret is not the one it
// was sealed under. Close ends it.
func LoadIdentity(dir, hostSecretFile string) (*Identity, error) {
	path := filepath.Join(dir, identityFile)
	b, err := readPrivate(path, maxIdentityBytes)
	if err != nil {
		return nil, fmt.Errorf("identity: %w", err)
	}
	defer clear(b)
	var j identityJSON
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if d.Decode(&j) != nil || j.Version != identityVersion {
		return nil, fmt.Errorf("%w: identity: %s is not an identity of version %d: enrol again", dek.ErrInvalid, path, identityVersion)
	}
	defer clear(j.Key)
	i := &Identity{dir: dir}
	if len(j.SealedKey) > 0 {
		if i.host, err = OpenHostSecret(hostSecretFile, false); err != nil {
			return nil, fmt.Errorf("identity %s is sealed: %w", path, err)
		}
	} else if hostSecretFile != "" {
		return nil, fmt.Errorf("%w: identity %s: its key lies in clear although a host secret is set: enrol again", dek.ErrInvalid, path)
	}
	if err := i.decode(j); err != nil {
		i.Close()
		return nil, fmt.Errorf("identity %s: %w", path, err)
	}
	return i, nil
}

// identityBinding is the place a sealed private key belongs to.
func identityBinding(principal string) dek.Binding {
	return dek.Binding{Purpose: dek.PurposeIdentity, Object: principal, Version: identityVersion}
}

func (i *Identity) decode(j identityJSON) error {
	der := j.Key
	switch {
	case (len(j.Key) == 0) == (len(j.SealedKey) == 0):
		return fmt.Errorf("%w: exactly one of key and sealed_key is wanted: enrol again", dek.ErrInvalid)
	case i.host != nil:
		var err error
		if der, err = i.host.Open(identityBinding(j.Principal), j.SealedKey); err != nil {
			return fmt.Errorf("the host secret does not open it (state directory of another host?): %w", err)
		}
		defer clear(der)
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	ec, ok := key.(*ecdsa.PrivateKey)
	if err != nil || !ok {
		return fmt.Errorf("%w: no EC key in it: enrol again", dek.ErrInvalid)
	}
	return i.install(ec, j.Certificates, j.Roots, j.Principal, j.Endpoints)
}

// install checks the parts against each other and puts them in use.
func (i *Identity) install(key *ecdsa.PrivateKey, chain, roots [][]byte, principal string, endpoints []string) error {
	if len(chain) == 0 || len(roots) == 0 {
		return fmt.Errorf("%w: no certificate or no root", dek.ErrInvalid)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("%w: certificate: %w", dek.ErrInvalid, err)
	}
	if pub, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return fmt.Errorf("%w: the certificate is for another key", dek.ErrInvalid)
	}
	pool := x509.NewCertPool()
	var cas []*x509.Certificate
	for _, der := range roots {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("%w: root certificate: %w", dek.ErrInvalid, err)
		}
		pool.AddCert(ca)
		cas = append(cas, ca)
	}
	if err := checkEndpoints(endpoints); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.cert = tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}
	i.leaf, i.roots, i.pool, i.principal, i.endpoints = leaf, cas, pool, principal, endpoints
	return nil
}

// save writes the identity durably, then the caller installs it.
func (i *Identity) save(key *ecdsa.PrivateKey, chain, roots [][]byte, principal string, endpoints []string) error {
	j := identityJSON{Version: identityVersion, Principal: principal, Endpoints: endpoints, Certificates: chain, Roots: roots}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	defer clear(der)
	if i.host == nil {
		j.Key = der
	} else if j.SealedKey, err = i.host.Seal(identityBinding(principal), der); err != nil {
		return fmt.Errorf("identity: seal: %w", err)
	}
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	defer clear(b)
	if err := makePrivateDir(i.dir); err != nil {
		return err
	}
	return writeFileDurably(filepath.Join(i.dir, identityFile), b, 0o600)
}

// Principal is who the certificate names: "person/NAME" or "host/NAME".
func (i *Identity) Principal() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.principal
}

// Endpoints are the addresses the identity was enrolled with.
func (i *Identity) Endpoints() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.endpoints...)
}

// Validity returns the life of the certificate in use.
func (i *Identity) Validity() (notBefore, notAfter time.Time) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.leaf.NotBefore, i.leaf.NotAfter
}

// CAFingerprint returns the fingerprint of the first root, as token files
// carry it.
func (i *Identity) CAFingerprint() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return Fingerprint(i.roots[0].Raw)
}

// Close wipes the host secret. The identity can't be renewed afterwards.
func (i *Identity) Close() { i.host.Destroy() }

// Format prints the principal only.
func (i *Identity) Format(s fmt.State, _ rune) {
	_, _ = io.WriteString(s, "connector.Identity("+i.Principal()+")")
}

// LogValue logs the principal only.
func (i *Identity) LogValue() slog.Value { return slog.StringValue(i.Principal()) }

// MarshalText refuses: an identity is written by its own methods only.
func (*Identity) MarshalText() ([]byte, error) {
	return nil, fmt.Errorf("%w: an identity is not encoded", dek.ErrInvalid)
}

// tlsConfig is built for each handshake, so that a renewed certificate and new
// roots count from the next connection on.
func (i *Identity) tlsConfig(now func() time.Time) *tls.Config {
	i.mu.Lock()
	defer i.mu.Unlock()
	cert := i.cert
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    i.pool, // the system's roots do not count
		Time:       now,
		// An expired certificate is presented too: the service accepts it for
		// a renewal only.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
}

// credentialsOf adapts i to gRPC.
func credentialsOf(i *Identity, now func() time.Time) credentials.TransportCredentials {
	return liveCredentials{i, now}
}

type liveCredentials struct {
	identity *Identity
	now      func() time.Time
}

func (c liveCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := credentials.NewTLS(c.identity.tlsConfig(c.now)).ClientHandshake(ctx, authority, conn)
	if err != nil {
		return nil, nil, explainClock(err, c.now())
	}
	return secured, info, nil
}

func (c liveCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, fmt.Errorf("%w: a client identity serves nobody", dek.ErrInvalid)
}

func (c liveCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c liveCredentials) Clone() credentials.TransportCredentials { return c }

func (c liveCredentials) OverrideServerName(string) error {
	return fmt.Errorf("%w: the server name is the endpoint's", dek.ErrInvalid)
}

// makePrivateDir makes dir 0700 if absent and refuses one that others can
// write to.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return diskError(dir, err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return diskError(dir, err)
	}
	if !info.IsDir() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%w: %s is not a directory that only its owner writes to: chmod 700 it", dek.ErrInvalid, dir)
	}
	return nil
}
