package rpc_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/rpc"
)

// A door is a server under test with the authority that issues for it.
type door struct {
	*rpc.Server
	house     *house
	ledger    *ledger
	records   rpc.Recorder // ledger, or the real log
	authority *identity.Authority
	signer    *ecdsa.PrivateKey
	registry  *prometheus.Registry
	clock     *clock
	address   string
	socket    string
}

// A clock is the service's; TLS clients in tests keep the real one.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.offset.Load())) }

func (c *clock) jump(d time.Duration) { c.offset.Store(int64(d)) }

func newSigner(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newAuthority(t testing.TB, signer crypto.Signer, now func() time.Time) *identity.Authority {
	t.Helper()
	a, err := identity.Open(t.Context(), identity.Config{
		Signer: signer, Blobs: new(shelf), Names: []string{"127.0.0.1"}, Now: now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func openDoor(t testing.TB) *door {
	t.Helper()
	d := &door{
		house:  &house{revoked: map[string]bool{}, token: "one-time-token", notices: make(chan kms.Notice)},
		ledger: new(ledger), signer: newSigner(t), registry: prometheus.NewRegistry(), clock: new(clock),
	}
	d.authority = newAuthority(t, d.signer, d.clock.now)
	d.start(t, rpc.NewBackend(d.house), d.house)
	return d
}

// start serves b on a port and a control socket until the test ends.
func (d *door) start(t testing.TB, b rpc.Backend, log rpc.AuditLog) {
	t.Helper()
	policy, err := access.New()
	if err != nil {
		t.Fatal(err)
	}
	if d.records == nil {
		d.records = d.ledger
	}
	d.Server, err = rpc.NewServer(rpc.Config{
		Backend: b, Identities: d.authority, Records: d.records, Rules: policy, AuditLog: log,
		Endpoints: []string{"127.0.0.1:7443"}, Registerer: d.registry, Now: d.clock.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.address, d.socket = l.Addr().String(), filepath.Join(t.TempDir(), "control")
	c, err := rpc.ListenControl(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 2)
	go func() { served <- d.Serve(l) }()
	go func() { served <- d.ServeControl(c) }()
	d.SetServing(true)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		d.Close(ctx)
		if err := errors.Join(<-served, <-served); err != nil {
			t.Errorf("serve: %v", err)
		}
		if ctx.Err() != nil {
			t.Error("Close had to cut calls that should have ended")
		}
	})
}

// certificate enrols principal by the authority itself.
func certificate(t testing.TB, a *identity.Authority, principal string) *tls.Certificate {
	t.Helper()
	key := newSigner(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	i, err := a.IssueClient(principal, csr)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: i.Chain, PrivateKey: key}
}

func (d *door) tls(cert *tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	for _, der := range d.authority.Roots() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			panic(err)
		}
		roots.AddCert(c)
	}
	c := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13, ServerName: "127.0.0.1", NextProtos: []string{"h2"}}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return c
}

func dialWith(t testing.TB, target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithDisableServiceConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// dial connects with cert, nil as a stranger.
func (d *door) dial(t testing.TB, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	return dialWith(t, "passthrough:///"+d.address, credentials.NewTLS(d.tls(cert)))
}

// as connects as principal.
func (d *door) as(t testing.TB, principal string) *grpc.ClientConn {
	t.Helper()
	return d.dial(t, certificate(t, d.authority, principal))
}

func (d *door) local(t testing.TB) *grpc.ClientConn {
	t.Helper()
	return dialWith(t, "unix://"+d.socket, insecure.NewCredentials())
}

// raw sends and receives bytes as they are.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}
func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = raw{}

// testID is the request id of exchange, so that replies can be compared.
const testID = "test-0001"

// exchange sends one request and returns all replies and the status.
func exchange(t testing.TB, conn *grpc.ClientConn, method string, request []byte) ([][]byte, *status.Status) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "keyward-request-id", testID)
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(raw{}))
	if err != nil {
		return nil, status.Convert(err)
	}
	if err := stream.SendMsg(&request); err != nil && !errors.Is(err, io.EOF) {
		return nil, status.Convert(err)
	}
	if err := stream.CloseSend(); err != nil {
		return nil, status.Convert(err)
	}
	var replies [][]byte
	for {
		var reply []byte
		err := stream.RecvMsg(&reply)
		if errors.Is(err, io.EOF) {
			return replies, status.New(0, "")
		}
		if err != nil {
			return replies, status.Convert(err)
		}
		replies = append(replies, reply)
		if strings.HasSuffix(method, "/Watch") {
			return replies, status.New(0, "") // it has no end
		}
	}
}

// reason returns our detail's reason, or the code's name.
func reason(s *status.Status) string {
	for _, d := range s.Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok && i.GetDomain() == "keyward" {
			return i.GetReason()
		}
	}
	return s.Code().String()
}

func header(version dek.Version) dek.Header {
	return dek.Header{
		KeyID:  dek.KeyID{KeyringID: dek.KeyringID{Vault: "v", Keyring: "r"}, Version: version},
		Master: dek.MasterID{Vault: "v", Key: "k", Version: 1},
		Hash:   crypto.SHA256, SealVersion: 1, SealedSealKey: make([]byte, 60),
	}
}
