package etcdstore_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/etcdstore"
	"github.com/keyward/keyward/kms/storetest"
)

// issue makes a certificate for 127.0.0.1, signed by parent or by itself.
func issue(t *testing.T, parent *tls.Certificate) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: parent == nil,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	by, signer := c, any(key)
	if parent != nil {
		by, signer = parent.Leaf, parent.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func pemFile(t *testing.T, kind string, der []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "pem")
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// external starts an etcd as an operator would run it: with its defaults,
// listening on 127.0.0.1 and asking for client certificates.
func external(t *testing.T, ca *tls.Certificate) (endpoint string) {
	t.Helper()
	server := issue(t, ca)
	key, err := x509.MarshalPKCS8PrivateKey(server.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel = newDir(t), "fatal"
	cfg.ClientTLSInfo = transport.TLSInfo{
		CertFile: pemFile(t, "CERTIFICATE", server.Certificate[0]), KeyFile: pemFile(t, "PRIVATE KEY", key),
		TrustedCAFile: pemFile(t, "CERTIFICATE", ca.Certificate[0]), ClientCertAuth: true,
	}
	client, peer := freeURL(t, "https"), freeURL(t, "http")
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	<-e.Server.ReadyNotify()
	return client.String()
}

func freeURL(t *testing.T, scheme string) url.URL {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return url.URL{Scheme: scheme, Host: l.Addr().String()}
}

func clientTLS(ca, cert *tls.Certificate) *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(ca.Leaf)
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13}
}

// TestExternal runs the contract on external endpoints with mutual TLS.
func TestExternal(t *testing.T) {
	ca := issue(t, nil)
	endpoint := external(t, ca)
	var n atomic.Int64
	storetest.Run(t, func(t *testing.T) kms.Store {
		s, err := etcdstore.Open(t.Context(), etcdstore.Config{
			Endpoints: []string{endpoint}, TLS: clientTLS(ca, issue(t, ca)), Prefix: fmt.Sprintf("/t%d/", n.Add(1)), Logger: testLog(t),
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeStore(t, s) })
		return s
	})
	other := issue(t, nil)
	for name, cfg := range map[string]*tls.Config{
		"foreign client": clientTLS(ca, issue(t, other)),
		"foreign server": clientTLS(other, issue(t, ca)),
	} {
		_, err := etcdstore.Open(t.Context(), etcdstore.Config{Endpoints: []string{endpoint}, TLS: cfg, ReadyTimeout: 2 * time.Second})
		if !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrUnavailable", name, err)
		}
	}
}
