package connector_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// must returns v; a test that can't set itself up ends.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A testCA issues what the service's CA issues.
type testCA struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newTestCA(t testing.TB, name string) *testCA {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour * 24 * 365), KeyUsage: x509.KeyUsageCertSign,
	}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	return &testCA{key, must(x509.ParseCertificate(der))}
}

func (ca *testCA) issue(pub crypto.PublicKey, cn string, usage x509.ExtKeyUsage, from, to time.Time) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: cn}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	if usage == x509.ExtKeyUsageServerAuth {
		tmpl.DNSNames, tmpl.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	return x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
}

func (ca *testCA) serverTLS(t testing.TB, usage x509.ExtKeyUsage) *tls.Config {
	return ca.serverTLSAt(t, usage, time.Now())
}

// serverTLSAt makes the certificate of a service whose clock says now.
func (ca *testCA) serverTLSAt(_ testing.TB, usage x509.ExtKeyUsage, now time.Time) *tls.Config {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(ca.issue(key.Public(), "kms", usage, now.Add(-time.Hour), now.Add(time.Hour)))
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, ca.cert.Raw}, PrivateKey: key}},
	}
}

// A fakeKMS answers with keys that it makes up, and fails as it is told to.
type fakeKMS struct {
	kmspb.UnimplementedEnrolmentServer
	kmspb.UnimplementedInstancesServer
	kmspb.UnimplementedAdminServer
	t  testing.TB
	ca *testCA

	mu         sync.Mutex
	keyrings   map[string]*kmspb.Keyring
	disabled   map[string]bool
	sick       map[string]bool // keyrings that are unavailable
	opened     int             // wrapped DEKs that were undone
	generation uint64
	checkpoint uint64
	openErr    error
	unwrapErr  error
	watchErr   error
	gate       chan struct{} // unwraps wait for it to be closed
	watchers   map[chan *kmspb.Notice]struct{}
	calls      map[string]int
	seen       []byte // checkpoint shown at the last Open
	reports    chan *kmspb.ReportRequest
	entered    chan string // names of calls as they begin
	token      string
	lifetime   time.Duration
	clock      time.Duration                                 // of the service, off by this
	act        func(method string, request any) (any, error) // answers single calls, if it is set
	actStream  func(method string) error                     // and streams

	conns  sync.Map // of net.Conn: what hangUp ends
	addr   string
	server *grpc.Server
	tls    *tls.Config
	served sync.WaitGroup
}

func newFakeKMS(t testing.TB, ca *testCA) *fakeKMS {
	k := &fakeKMS{
		t: t, ca: ca, keyrings: map[string]*kmspb.Keyring{}, disabled: map[string]bool{}, sick: map[string]bool{}, generation: 1, checkpoint: 1,
		watchers: map[chan *kmspb.Notice]struct{}{}, calls: map[string]int{}, reports: make(chan *kmspb.ReportRequest, 100),
		entered: make(chan string, 10000), token: "one-time-secret", lifetime: time.Hour,
	}
	k.tls = ca.serverTLS(t, x509.ExtKeyUsageServerAuth)
	k.start()
	t.Cleanup(k.stop)
	return k
}

// start listens, at the address it had before if there was one.
func (k *fakeKMS) start() {
	addr := k.addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		k.t.Error(err)
		return
	}
	k.addr = l.Addr().String()
	k.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(k.tls)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(k.intercept), grpc.StreamInterceptor(k.interceptStream))
	kmspb.RegisterEnrolmentServer(k.server, k)
	kmspb.RegisterInstancesServer(k.server, k)
	kmspb.RegisterAdminServer(k.server, k)
	k.served.Go(func() { _ = k.server.Serve(notingListener{l, &k.conns}) })
}

// A notingListener remembers the connections it accepts.
type notingListener struct {
	net.Listener
	conns *sync.Map
}

func (l notingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.conns.Store(c, nil)
	}
	return c, err
}

// hangUp cuts every connection; new ones are welcome.
func (k *fakeKMS) hangUp() {
	k.conns.Range(func(c, _ any) bool {
		k.conns.Delete(c)
		_ = c.(net.Conn).Close()
		return true
	})
}

func (k *fakeKMS) intercept(ctx context.Context, r any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	k.mu.Lock()
	act := k.act
	k.mu.Unlock()
	if act == nil {
		return handler(ctx, r)
	}
	return act(info.FullMethod, r)
}

func (k *fakeKMS) interceptStream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	k.mu.Lock()
	act := k.actStream
	k.mu.Unlock()
	if act == nil {
		return handler(srv, s)
	}
	return act(info.FullMethod)
}

func (k *fakeKMS) stop() {
	k.server.Stop()
	k.served.Wait()
}

func (k *fakeKMS) enter(name string) {
	k.mu.Lock()
	k.calls[name]++
	k.mu.Unlock()
	select {
	case k.entered <- name:
	default:
	}
}

func (k *fakeKMS) count(name string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.calls[name]
}

// unwrapped counts the wrapped DEKs that were asked for.
func (k *fakeKMS) unwrapped() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.opened
}

func (k *fakeKMS) set(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

// reason makes an error as the service does.
func reason(c codes.Code, reason string) error {
	s, err := status.New(c, "words").WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: "keyward", Metadata: map[string]string{"request": "r1"}})
	if err != nil {
		return err
	}
	return s.Err()
}

var errNo = reason(codes.PermissionDenied, "DENIED")

// plainKey is the key that the fake gives for a version: recognisable.
func plainKey(keyring string, version uint32) []byte {
	b := make([]byte, dek.KeySize)
	copy(b, keyring)
	binary.BigEndian.PutUint32(b[28:], version)
	return b
}

// wrapKey makes bytes that parse as a wrapped DEK; nobody opens them here.
func wrapKey(t testing.TB, keyring string, version uint32, round byte) []byte {
	seal := must(dek.NewKey())
	defer seal.Destroy()
	h := dek.Header{
		KeyID:  dek.KeyID{KeyringID: dek.KeyringID{Vault: "acme", Keyring: keyring}, Version: dek.Version(version)},
		Master: dek.MasterID{Vault: "acme", Key: "master", Version: 1}, Object: dek.ObjectID{1},
		Hash: crypto.SHA256, SealVersion: 1, SealedSealKey: []byte{1, 2, 3, round},
	}
	w, err := dek.Wrap(h, seal, make([]byte, 256))
	if err != nil {
		t.Fatal(err)
	}
	return w.Bytes()
}

// addVersion rolls keyring, making it if need be.
func (k *fakeKMS) addVersion(keyring string, serverKey uint32) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.keyrings[keyring]
	if r == nil {
		r = &kmspb.Keyring{Vault: "acme", Name: keyring, MasterKey: "master", ServerKey: serverKey}
		k.keyrings[keyring] = r
	}
	n := uint32(len(r.Versions) + 1)
	versions := append([]*kmspb.KeyringVersion(nil), r.Versions...)
	versions = append(versions, &kmspb.KeyringVersion{Version: n, ServerVersion: 2*n - 1, State: "enabled", Master: 1, Wrapped: wrapKey(k.t, keyring, n, 0)})
	k.keyrings[keyring] = &kmspb.Keyring{Vault: "acme", Name: keyring, MasterKey: "master", ServerKey: r.ServerKey, Current: n, Versions: versions}
	k.generation++
	k.checkpoint++
}

func (k *fakeKMS) checkpointText() []byte {
	return fmt.Appendf(nil, "keyward-log\n%d\nhash\n", k.checkpoint)
}

func (k *fakeKMS) notify(kind kmspb.Notice_Kind, keyring string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for c := range k.watchers {
		c <- &kmspb.Notice{Kind: kind, Keyring: keyring, Generation: k.generation, Checkpoint: k.checkpointText()}
	}
}

func (k *fakeKMS) setDisabled(keyring string, disabled bool) {
	k.mu.Lock()
	k.disabled[keyring] = disabled
	k.generation++
	k.mu.Unlock()
	kind := kmspb.Notice_KIND_ENABLED
	if disabled {
		kind = kmspb.Notice_KIND_DISABLED
	}
	k.notify(kind, keyring)
}

func (k *fakeKMS) Enroll(_ context.Context, r *kmspb.EnrollRequest) (*kmspb.EnrollResponse, error) {
	k.enter("Enroll")
	k.mu.Lock()
	good := r.GetToken() == k.token
	k.token = ""
	k.mu.Unlock()
	if !good {
		return nil, errNo
	}
	return k.certify(r.GetCsr(), "host/db1")
}

func (k *fakeKMS) Renew(_ context.Context, r *kmspb.RenewRequest) (*kmspb.EnrollResponse, error) {
	k.enter("Renew")
	return k.certify(r.GetCsr(), "host/db1")
}

func (k *fakeKMS) certify(csr []byte, principal string) (*kmspb.EnrollResponse, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil || req.CheckSignature() != nil {
		return nil, reason(codes.InvalidArgument, "INVALID")
	}
	k.mu.Lock()
	life, now := k.lifetime, time.Now().Add(k.clock)
	k.mu.Unlock()
	der, err := k.ca.issue(req.PublicKey, principal, x509.ExtKeyUsageClientAuth, now.Add(-life/10), now.Add(life))
	if err != nil {
		return nil, err
	}
	return &kmspb.EnrollResponse{Certificate: [][]byte{der}, Roots: [][]byte{k.ca.cert.Raw}, Principal: principal}, nil
}

func (k *fakeKMS) Open(_ context.Context, r *kmspb.OpenRequest) (*kmspb.OpenResponse, error) {
	k.enter("Open")
	k.mu.Lock()
	defer k.mu.Unlock()
	k.seen = r.GetCheckpoint()
	if k.openErr != nil {
		return nil, k.openErr
	}
	resp := &kmspb.OpenResponse{Instance: &kmspb.Instance{Name: r.GetInstance()}, Generation: k.generation, Checkpoint: k.checkpointText()}
	for name, ring := range k.keyrings {
		if k.disabled[name] && r.GetCold() {
			return nil, errNo
		}
		resp.Keyrings = append(resp.Keyrings, ring)
	}
	return resp, nil
}

// open undoes one wrapped DEK as a service would.
func (k *fakeKMS) open(b []byte) ([]byte, codes.Code) {
	k.mu.Lock()
	defer k.mu.Unlock()
	w, err := dek.ParseWrapped(b)
	if err != nil {
		return nil, codes.InvalidArgument
	}
	k.opened++
	if k.disabled[w.ID().Keyring] {
		return nil, codes.PermissionDenied
	}
	if k.sick[w.ID().Keyring] {
		return nil, codes.Unavailable
	}
	return plainKey(w.ID().Keyring, uint32(w.ID().Version)), 0
}

func (k *fakeKMS) wait(ctx context.Context) error {
	k.mu.Lock()
	gate, err := k.gate, k.unwrapErr
	k.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	return err
}

func (k *fakeKMS) Unwrap(ctx context.Context, r *kmspb.UnwrapRequest) (*kmspb.UnwrapResponse, error) {
	k.enter("Unwrap")
	if err := k.wait(ctx); err != nil {
		return nil, err
	}
	key, code := k.open(r.GetWrapped())
	if code != 0 {
		return nil, status.Error(code, "no")
	}
	return &kmspb.UnwrapResponse{Key: key}, nil
}

func (k *fakeKMS) UnwrapBatch(ctx context.Context, r *kmspb.UnwrapBatchRequest) (*kmspb.UnwrapBatchResponse, error) {
	k.enter("UnwrapBatch")
	if err := k.wait(ctx); err != nil {
		return nil, err
	}
	resp := &kmspb.UnwrapBatchResponse{}
	for _, it := range r.GetItems() {
		key, code := k.open(it.GetWrapped())
		resp.Items = append(resp.Items, &kmspb.UnwrapResponse{Tag: it.GetTag(), Key: key, Code: uint32(code)})
	}
	return resp, nil
}

func (k *fakeKMS) Watch(_ *kmspb.WatchRequest, s grpc.ServerStreamingServer[kmspb.Notice]) error {
	k.enter("Watch")
	c := make(chan *kmspb.Notice, 1000)
	k.mu.Lock()
	if err := k.watchErr; err != nil {
		k.mu.Unlock()
		return err
	}
	k.watchers[c] = struct{}{}
	c <- &kmspb.Notice{Kind: kmspb.Notice_KIND_PING, Generation: k.generation, Checkpoint: k.checkpointText()}
	k.mu.Unlock()
	defer k.set(func() { delete(k.watchers, c) })
	for {
		select {
		case n := <-c:
			if err := s.Send(n); err != nil {
				return err
			}
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
}

func (k *fakeKMS) Report(_ context.Context, r *kmspb.ReportRequest) (*kmspb.ReportResponse, error) {
	k.enter("Report")
	k.reports <- r
	return &kmspb.ReportResponse{}, nil
}

// identity enrols a host in a fresh directory and returns it and the path of
// its host secret.
func (k *fakeKMS) identity(t testing.TB) (dir, secret string) {
	dir, secret = filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "host-secret")
	k.set(func() { k.token = "one-time-secret" })
	i, err := connector.Enroll(testContext(t), k.tokenFile(), connector.EnrollOptions{Dir: dir, HostSecretFile: secret})
	if err != nil {
		t.Fatal(err)
	}
	i.Close()
	return dir, secret
}

func (k *fakeKMS) tokenFile() connector.TokenFile {
	return connector.TokenFile{
		Endpoints: []string{k.addr}, CAFingerprint: connector.Fingerprint(k.ca.cert.Raw), Principal: "host/db1",
		Expires: time.Now().Add(time.Hour), Token: connector.NewSecretText("one-time-secret"),
	}
}

// client returns a client of the given endpoints, all under one CA.
func (k *fakeKMS) client(t testing.TB, endpoints ...string) *connector.Client {
	dir, secret := k.identity(t)
	i, err := connector.LoadIdentity(dir, secret)
	if err != nil {
		t.Fatal(err)
	}
	c, err := connector.NewClient(connector.Config{Identity: i, Endpoints: endpoints, Logger: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); i.Close() })
	return c
}
