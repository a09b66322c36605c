package rpc_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
)

// forge signs a certificate of the test's making with the door's own CA key.
func (d *door) forge(t *testing.T, edit func(*x509.Certificate)) *tls.Certificate {
	t.Helper()
	u, err := url.Parse("keyward://person/a")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(c)
	root, err := x509.ParseCertificate(d.authority.Roots()[0])
	if err != nil {
		t.Fatal(err)
	}
	key := newSigner(t)
	der, err := x509.CreateCertificate(rand.Reader, c, root, key.Public(), d.signer)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// A handshake is a way to come in, and what a call then gets.
type handshake struct {
	name   string
	config func() *tls.Config
	code   codes.Code
}

// handshakes are ways to come in with a certificate that is not forged here.
func (d *door) handshakes(t *testing.T) []handshake {
	foreign := newAuthority(t, newSigner(t), d.clock.now)
	good := certificate(t, d.authority, "person/a")
	server, err := d.authority.ServerCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	stolen := tls.Certificate{Certificate: good.Certificate, PrivateKey: newSigner(t)}
	return []handshake{
		{"good", func() *tls.Config { return d.tls(good) }, codes.OK},
		{"no certificate", func() *tls.Config { return d.tls(nil) }, codes.Unauthenticated},
		{"TLS 1.2", func() *tls.Config {
			c := d.tls(good)
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return c
		}, codes.Unavailable},
		{"foreign CA", func() *tls.Config { return d.tls(certificate(t, foreign, "person/a")) }, codes.Unavailable},
		{"certificate without its key", func() *tls.Config { return d.tls(&stolen) }, codes.Unavailable},
		{"server's certificate", func() *tls.Config { return d.tls(server) }, codes.Unavailable},
		{"other server name", func() *tls.Config { c := d.tls(good); c.ServerName = "kms.other"; return c }, codes.Unavailable},
		{"foreign server", func() *tls.Config { c := d.tls(good); c.RootCAs = x509.NewCertPool(); return c }, codes.Unavailable},
	}
}

// forgeries are certificates that our own CA would not issue.
func (d *door) forgeries(t *testing.T) []handshake {
	return []handshake{
		{"wrong EKU", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }))
		}, codes.Unavailable},
		{"any EKU", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }))
		}, codes.Unavailable},
		{"no SAN", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) { c.URIs = nil; c.Subject.CommonName = "person a" }))
		}, codes.Unavailable},
		{"wrong SAN", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) { c.URIs[0].Host = "local" }))
		}, codes.Unavailable},
		{"expired long ago", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = c.NotBefore.AddDate(0, -3, 0), c.NotAfter.AddDate(0, -2, 0)
			}))
		}, codes.Unavailable},
		{"not yet", func() *tls.Config {
			return d.tls(d.forge(t, func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = c.NotBefore.AddDate(0, 1, 0), c.NotAfter.AddDate(0, 2, 0)
			}))
		}, codes.Unavailable},
	}
}

func TestHandshakes(t *testing.T) {
	d := openDoor(t)
	request := encode(t, &kmspb.GetStatusRequest{})
	for _, tt := range append(d.handshakes(t), d.forgeries(t)...) {
		t.Run(tt.name, func(t *testing.T) {
			conn := dialWith(t, "passthrough:///"+d.address, credentials.NewTLS(tt.config()))
			before := d.house.calls.Load()
			replies, s := exchange(t, conn, kmspb.Admin_GetStatus_FullMethodName, request)
			if s.Code() != tt.code || (len(replies) > 0) != (tt.code == codes.OK) {
				t.Errorf("got %v and %d replies, want %v", s, len(replies), tt.code)
			}
			if reached := d.house.calls.Load() > before; reached != (tt.code == codes.OK) {
				t.Errorf("reached the service: %v", reached)
			}
		})
	}
	handshakes := 0
	for _, e := range d.ledger.take() {
		if e.Operation == "front-door.handshake" && e.Remote != "" && e.Result == "denied" {
			handshakes++
		}
	}
	if handshakes != 9 { // all but the good, the nameless and those that the client or the version ends
		t.Errorf("refused certificates on record: got %d, want 9", handshakes)
	}
}

func TestNegotiatesHybrid(t *testing.T) {
	d := openDoor(t)
	conn, err := tls.Dial("tcp", d.address, d.tls(certificate(t, d.authority, "person/a")))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := conn.ConnectionState()
	if s.Version != tls.VersionTLS13 || s.NegotiatedProtocol != "h2" {
		t.Errorf("got version %x, protocol %q", s.Version, s.NegotiatedProtocol)
	}
	switch s.CurveID {
	case tls.X25519MLKEM768, tls.SecP256r1MLKEM768, tls.SecP384r1MLKEM1024:
	default:
		t.Errorf("key exchange: got %v, want a hybrid", s.CurveID)
	}
}

// TestPlainText: what speaks no TLS gets not one byte of the service.
func TestPlainText(t *testing.T) {
	d := openDoor(t)
	conn, err := net.Dial("tcp", d.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Fatal(err)
	}
	if len(b) > 100 || strings.Contains(string(b), "keyward") {
		t.Errorf("got %q", b)
	}
}

// TestExpiredMayOnlyRenew: a certificate that ran out within the month reaches
// Renew, and health, and nothing else; none of it looks like a denial.
func TestExpiredMayOnlyRenew(t *testing.T) {
	d := openDoor(t)
	cert := certificate(t, d.authority, "host/db1")
	conn := d.dial(t, cert)
	if _, s := exchange(t, conn, kmspb.Admin_GetStatus_FullMethodName, nil); s.Code() != codes.OK {
		t.Fatal(s)
	}
	d.clock.jump(8 * 24 * time.Hour) // also for the connection that is open
	for _, which := range []string{"open connection", "new connection"} {
		for _, m := range rpc.Methods() {
			_, s := exchange(t, conn, m.Name(), encode(t, good(t)[m.Name()]))
			if m.ForExpired() {
				if s.Code() != codes.OK {
					t.Errorf("%s, %s: got %v, want ok", which, m.Name(), s)
				}
			} else if s.Code() != codes.Unauthenticated || reason(s) != "UNAVAILABLE" {
				t.Errorf("%s, %s: got %v %q, want Unauthenticated UNAVAILABLE", which, m.Name(), s, reason(s))
			}
		}
		conn = d.dial(t, cert)
		d.house.set(func(h *house) { h.token = "one-time-token" })
	}
	d.house.set(func(h *house) { h.revoked["host/db1"] = true })
	if _, s := exchange(t, conn, kmspb.Instances_Renew_FullMethodName, encode(t, good(t)[kmspb.Instances_Renew_FullMethodName])); reason(s) != "DENIED" {
		t.Errorf("revoked and expired: Renew: got %v", s)
	}
	d.clock.jump(40 * 24 * time.Hour)
	d.house.set(func(h *house) { delete(h.revoked, "host/db1") })
	conn = d.dial(t, nil)
	if _, s := exchange(t, conn, kmspb.Instances_Renew_FullMethodName, nil); s.Code() != codes.Unauthenticated {
		t.Errorf("after the grace: got %v", s)
	}
}

func TestStrangersMayEnrolAndAskForHealth(t *testing.T) {
	d := openDoor(t)
	conn := d.dial(t, nil)
	if r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: got %v, %v", r, err)
	}
	c := kmspb.NewEnrolmentClient(conn)
	request := good(t)[kmspb.Enrolment_Enroll_FullMethodName].(*kmspb.EnrollRequest)
	bad := &kmspb.EnrollRequest{Token: request.GetToken(), Csr: request.GetCsr()[1:]}
	if _, err := c.Enroll(t.Context(), bad); err == nil || strings.Contains(err.Error(), "PKCS") {
		t.Errorf("bad request: got %v, want the class alone", err)
	}
	resp, err := c.Enroll(t.Context(), request) // the bad one cost no token
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(resp.GetCertificate()[0])
	if err != nil || resp.GetPrincipal() != "host/db1" {
		t.Fatalf("got %v, %v", resp, err)
	}
	if p, err := d.authority.Verify(leaf); err != nil || p.Principal != "host/db1" {
		t.Errorf("certificate: got %+v, %v", p, err)
	}
	if c, _ := d.house.seen(); c.Principal != "" || c.Remote == "" || c.Correlation == "" {
		t.Errorf("caller: got %+v", c)
	}
	if _, err := c.Enroll(t.Context(), request); err == nil {
		t.Error("a token worked twice")
	}
}

// TestStrangersAreBounded: they can't take the connections that hosts need.
func TestStrangersAreBounded(t *testing.T) {
	d := openDoor(t)
	var open []*tls.Conn
	connect := func() error {
		c, err := tls.Dial("tcp", d.address, d.tls(nil))
		if err != nil {
			return err
		}
		open = append(open, c)
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1)) // the server's HTTP/2 settings, or the end
		return err
	}
	for i := range rpc.MaxStrangers {
		if err := connect(); err != nil {
			t.Fatalf("stranger %d: %v", i, err)
		}
	}
	if err := connect(); err == nil {
		t.Error("one stranger too many got in")
	}
	if _, s := exchange(t, d.as(t, "host/db1"), kmspb.Admin_GetStatus_FullMethodName, nil); s.Code() != codes.OK {
		t.Errorf("a host beside them: %v", s)
	}
	for _, c := range open {
		_ = c.Close()
	}
	for err := error(io.EOF); err != nil; { // until the server has seen it
		err = connect()
	}
	_ = open[len(open)-1].Close()
}

func TestCallerIsTheCertificates(t *testing.T) {
	d := openDoor(t)
	cert := certificate(t, d.authority, "person/alice")
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	peer, err := d.authority.Verify(leaf)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := kmspb.NewAdminClient(d.dial(t, cert)).GetStatus(ctx, &kmspb.GetStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	got, deadline := d.house.seen()
	if got.Principal != "person/alice" || got.Serial != peer.Serial || len(got.Correlation) != 32 || !strings.HasPrefix(got.Remote, "127.0.0.1:") {
		t.Errorf("got %+v", got)
	}
	if left := time.Until(deadline); left <= 0 || left > time.Minute {
		t.Errorf("a call without deadline: got %v left, want at most a minute", left)
	}
}

func TestMetricsName(t *testing.T) {
	d := openDoor(t)
	exchange(t, d.as(t, "person/verysecret"), kmspb.Admin_GetKey_FullMethodName, encode(t, &kmspb.GetKeyRequest{Vault: "hidden", Name: "hidden"}))
	if err := rpc.ServeMetrics(t.Context(), mustListen(t, "0.0.0.0:0"), d.registry); err == nil {
		t.Error("metrics on all addresses: want an error")
	}
	l := mustListen(t, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- rpc.ServeMetrics(ctx, l, d.registry) }()
	resp, err := http.Get("http://" + l.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`keyward_rpc_calls_total{class="OK",method="/keyward.kms.v1.Admin/GetKey"} 1`, `keyward_rpc_in_flight{lane="use"} 0`, "keyward_rpc_seconds_bucket"} {
		if !strings.Contains(string(body), want) {
			t.Errorf("missing: %s", want)
		}
	}
	for _, secret := range []string{"verysecret", "hidden"} {
		if strings.Contains(string(body), secret) {
			t.Errorf("metrics name %q", secret)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func mustListen(t *testing.T, address string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var _ rpc.Identities = (*identity.Authority)(nil)
