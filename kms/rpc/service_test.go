package rpc_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
	"github.com/keyward/keyward/kms/storetest"
)

// A token is the software token with what the service asks beside.
type token struct{ *hsm.Software }

func (token) OAEPHash() crypto.Hash    { return crypto.SHA256 }
func (token) RestsOnRSA(b []byte) bool { return hsm.RestsOnRSA(b) }
func (token) Describe() string         { return "software" }

// An estate is the real service behind the door: rules, software token, store
// in memory, log on disk. Strict mode is on.
type estate struct {
	*door
	service *kms.Service
	log     *audit.Log
	first   *kms.EnrolmentToken
}

func openEstate(t *testing.T) *estate {
	t.Helper()
	dir := t.TempDir()
	soft, err := hsm.OpenSoftware(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = soft.Close() })
	policy, err := access.New(kms.Operations()...)
	if err != nil {
		t.Fatal(err)
	}
	e := &estate{door: &door{ledger: new(ledger), registry: prometheus.NewRegistry(), clock: new(clock)}}
	config := kms.Config{
		Token: token{soft}, Store: storetest.NewMemory(), Clock: clockOf{e.clock}, Authorizer: policy, Strict: true,
		OpenAudit: func(ctx context.Context, signer crypto.Signer) (kms.Auditor, error) {
			l, err := audit.Open(ctx, audit.Config{Dir: filepath.Join(dir, "audit"), Signer: signer})
			if err != nil { // not a nil *Log in an interface
				return nil, err
			}
			e.log = l
			return l, nil
		},
	}
	if e.first, err = kms.Init(t.Context(), config, kms.InitRequest{FirstAdministrator: "person/admin"}); err != nil {
		t.Fatal(err)
	}
	if e.service, err = kms.Open(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.service.Close() })
	e.authority, err = identity.Open(t.Context(), identity.Config{
		Signer: e.service.CASigner(), Blobs: e.service, Names: []string{"127.0.0.1"}, Now: e.clock.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	e.records = e.log
	e.start(t, rpc.NewBackend(e.service), new(house))
	return e
}

// TestRefusalsAreInTheLog: what never reached the service is in the real log
// too, beside what it refused itself.
func TestRefusalsAreInTheLog(t *testing.T) {
	e := openEstate(t)
	_, s := exchange(t, e.as(t, "person/x"), kmspb.Admin_GetKey_FullMethodName, []byte("\xff")) // malformed
	if s.Code() != codes.InvalidArgument {
		t.Fatal(s)
	}
	exchange(t, e.as(t, "person/x"), kmspb.Admin_GetKey_FullMethodName, encode(t, &kmspb.GetKeyRequest{Vault: "v", Name: "k"}))
	exchange(t, e.dial(t, nil), kmspb.Admin_GetStatus_FullMethodName, nil)
	foreign := newAuthority(t, newSigner(t), e.clock.now)
	exchange(t, e.dial(t, certificate(t, foreign, "person/x")), kmspb.Admin_GetStatus_FullMethodName, nil)
	if _, err := e.redeem(t, "kwt1_"+strings.Repeat("A", 59), nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("unknown token: got %v, want PermissionDenied", err)
	}
	want := map[string]bool{
		"key.read person/x front door invalid": true, "key.read person/x no grant for key.read denied": true,
		"system.status anonymous front door denied": true, "front-door.handshake anonymous front door denied": true,
		"enrolment.redeem anonymous unknown token denied": true,
	}
	eventually(func() bool {
		for r, err := range e.log.Records(t.Context(), audit.Filter{}) {
			if err != nil {
				t.Fatal(err)
			}
			if r.Event.Phase == kms.PhaseRefused {
				delete(want, fmt.Sprintf("%s %s %s %s", r.Event.Operation, r.Event.Principal, r.Event.Rule, r.Event.Result))
			}
		}
		return len(want) == 0
	})
	for w := range want {
		t.Errorf("no record of: %s", w)
	}
}

// eventually tries f until it is true, for 10 s at most: the record of a refused
// handshake is written after the peer was told (TLS 1.3 lets it be done first).
func eventually(f func() bool) {
	for deadline := time.Now().Add(10 * time.Second); !f() && time.Now().Before(deadline); {
		runtime.Gosched()
	}
}

type clockOf struct{ c *clock }

func (c clockOf) Now() time.Time { return c.c.now() }

// enrol redeems a token over the wire and returns a connection as its owner.
func (e *estate) enrol(t *testing.T, text string) *grpc.ClientConn {
	t.Helper()
	cert, err := e.redeem(t, text, nil)
	if err != nil {
		t.Fatal(err)
	}
	return e.dial(t, cert)
}

func (e *estate) redeem(t *testing.T, text string, from net.Addr) (*tls.Certificate, error) {
	t.Helper()
	key := newSigner(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+e.address, grpc.WithTransportCredentials(credentials.NewTLS(e.tls(nil))),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{LocalAddr: from}).DialContext(ctx, "tcp", addr)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	resp, err := kmspb.NewEnrolmentClient(conn).Enroll(t.Context(), &kmspb.EnrollRequest{Token: text, Csr: csr})
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: resp.GetCertificate(), PrivateKey: key}, nil
}

// cast enrols the people of the tests, each with one duty.
func (e *estate) cast(t *testing.T) (admin, officer, auditor kmspb.AdminClient) {
	t.Helper()
	admin = kmspb.NewAdminClient(e.enrol(t, e.first.Text.Reveal()))
	hire := func(name, role string) kmspb.AdminClient {
		if _, err := admin.AddGrant(t.Context(), &kmspb.Grant{Principal: name, Role: role, Scope: "/"}); err != nil {
			t.Fatal(err)
		}
		tok, err := admin.CreateToken(t.Context(), &kmspb.CreateTokenRequest{Principal: name})
		if err != nil {
			t.Fatal(err)
		}
		if len(tok.GetCaSha256()) != 32 || len(tok.GetEndpoints()) != 1 {
			t.Errorf("token without a way back: %v", tok.GetEndpoints())
		}
		return kmspb.NewAdminClient(e.enrol(t, tok.GetText()))
	}
	return admin, hire("person/officer", "crypto-officer"), hire("person/auditor", "auditor")
}

// furnish makes vault, key, keyring and instance, and returns the host's
// connection.
func (e *estate) furnish(t *testing.T, officer kmspb.AdminClient) *grpc.ClientConn {
	t.Helper()
	ctx := t.Context()
	_, err1 := officer.CreateVault(ctx, &kmspb.CreateVaultRequest{Name: "pay"})
	_, err2 := officer.CreateKey(ctx, &kmspb.CreateKeyRequest{Vault: "pay", Name: "k", Bits: 2048})
	_, err3 := officer.CreateKeyring(ctx, &kmspb.CreateKeyringRequest{Vault: "pay", Name: "r", MasterKey: "k", ServerKey: 1})
	p, err4 := officer.PrepareInstance(ctx, &kmspb.PrepareInstanceRequest{Kind: "mariadb", Name: "db1", Vault: "pay", Keyrings: []string{"r"}})
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	return e.enrol(t, p.GetToken().GetText())
}

func TestRealService(t *testing.T) {
	e := openEstate(t)
	ctx := t.Context()
	admin, officer, auditor := e.cast(t)
	host := kmspb.NewInstancesClient(e.furnish(t, officer))

	open, err := host.Open(ctx, &kmspb.OpenRequest{Instance: "db1", Cold: true})
	if err != nil {
		t.Fatal(err)
	}
	w := open.GetKeyrings()[0].GetVersions()[0].GetWrapped()
	one, err := host.Unwrap(ctx, &kmspb.UnwrapRequest{Wrapped: w})
	if err != nil || len(one.GetKey()) != dek.KeySize {
		t.Fatalf("unwrap: got %d bytes, %v", len(one.GetKey()), err)
	}
	batch, err := host.UnwrapBatch(ctx, &kmspb.UnwrapBatchRequest{Items: []*kmspb.UnwrapRequest{{Wrapped: w}, {Wrapped: w}}})
	if err != nil || !bytes.Equal(batch.GetItems()[1].GetKey(), one.GetKey()) {
		t.Errorf("batch: %v", err)
	}
	stream, err := host.UnwrapStream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&kmspb.UnwrapRequest{Tag: 4, Wrapped: w}); err != nil {
		t.Fatal(err)
	}
	if a, err := stream.Recv(); err != nil || a.GetTag() != 4 || !bytes.Equal(a.GetKey(), one.GetKey()) {
		t.Errorf("stream: %v", err)
	}
	notices, err := host.Watch(ctx, &kmspb.WatchRequest{Instance: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	awaitNotice(t, notices, kmspb.Notice_KIND_PING)
	if _, err := officer.RollKeyring(ctx, &kmspb.RollKeyringRequest{Vault: "pay", Name: "r"}); err != nil {
		t.Fatal(err)
	}
	awaitNotice(t, notices, kmspb.Notice_KIND_ROLLED)
	separateDuties(ctx, t, admin, auditor)

	start := time.Now()
	if _, err := admin.RevokeInstance(ctx, &kmspb.RevokeInstanceRequest{Name: "db1"}); err != nil {
		t.Fatal(err)
	}
	for err = nil; err == nil; {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied || time.Since(start) > time.Second {
		t.Errorf("stream of a revoked instance: %v after %v", err, time.Since(start))
	}
	if _, err := host.Unwrap(ctx, &kmspb.UnwrapRequest{Wrapped: w}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("unwrap by a revoked instance: %v", err)
	}
}

// separateDuties: nobody but the auditor reads the log, and the auditor does
// nothing else.
func separateDuties(ctx context.Context, t *testing.T, admin, auditor kmspb.AdminClient) {
	t.Helper()
	if err := drain(auditor.ReadAudit(ctx, &kmspb.ReadAuditRequest{})); err != nil {
		t.Errorf("auditor: %v", err)
	}
	if err := drain(admin.ReadAudit(ctx, &kmspb.ReadAuditRequest{})); status.Code(err) != codes.PermissionDenied {
		t.Errorf("administrator reads the log: %v", err)
	}
	if _, err := auditor.RollKey(ctx, &kmspb.RollKeyRequest{Vault: "pay", Name: "k"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("auditor rolls a key: %v", err)
	}
	if _, err := admin.AddGrant(ctx, &kmspb.Grant{Principal: "person/officer", Role: "auditor", Scope: "/vaults/pay"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("officer becomes auditor: %v", err)
	}
}

func awaitNotice(t *testing.T, w kmspb.Instances_WatchClient, want kmspb.Notice_Kind) {
	t.Helper()
	for {
		n, err := w.Recv()
		if err != nil {
			t.Fatalf("waiting for %v: %v", want, err)
		}
		if n.GetKind() == want {
			return
		}
	}
}

func drain[T any](s grpc.ServerStreamingClient[T], err error) error {
	for err == nil {
		_, err = s.Recv()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// TestAbsentAndForbidden: to a caller without rights an object that is not
// there and one that is answer alike, byte for byte, on every method.
func TestAbsentAndForbidden(t *testing.T) {
	e := openEstate(t)
	_, officer, _ := e.cast(t)
	host := e.furnish(t, officer)
	open, err := kmspb.NewInstancesClient(host).Open(t.Context(), &kmspb.OpenRequest{Instance: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	there := open.GetKeyrings()[0].GetVersions()[0].GetWrapped()
	nobody := e.as(t, "person/nobody")
	pairs := map[string]string{"pay": "absent", "k": "none", "r": "none", "db1": "db9", "v": "pay", "person/b": "person/officer", "/vaults/v": "/vaults/pay"}
	n := 0
	for _, m := range rpc.Methods() {
		request := good(t)[m.Name()]
		if m.ForExpired() {
			continue
		}
		existing, absent := rename(request, map[string]string{"v": "pay", "/vaults/v": "/vaults/pay", "person/b": "person/officer"}), rename(rename(request, map[string]string{"v": "pay"}), pairs)
		if u, ok := existing.(*kmspb.UnwrapRequest); ok {
			u.Wrapped = there
		}
		_, a := exchange(t, nobody, m.Name(), encode(t, existing))
		_, b := exchange(t, nobody, m.Name(), encode(t, absent))
		if !bytes.Equal(encode(t, a.Proto()), encode(t, b.Proto())) {
			t.Errorf("%s: existing %v, absent %v", m.Name(), a, b)
		}
		n++
	}
	if n < 30 {
		t.Errorf("methods compared: got %d, want at least 30", n)
	}
}

// rename replaces whole strings in the scalar fields of a request.
func rename(m proto.Message, names map[string]string) proto.Message {
	out := proto.Clone(m)
	r := out.ProtoReflect()
	for i := range r.Descriptor().Fields().Len() {
		f := r.Descriptor().Fields().Get(i)
		if f.IsList() || f.Kind().String() != "string" {
			continue
		}
		if to, ok := names[r.Get(f).String()]; ok {
			setField(out, string(f.Name()), to)
		}
	}
	return out
}

// TestTokenWorksOnce: of two redemptions at the same moment exactly one wins,
// a thousand times; each tenth time over the wire.
func TestTokenWorksOnce(t *testing.T) {
	rounds := 1000
	if testing.Short() {
		rounds = 50
	}
	e := openEstate(t)
	admin := kms.Caller{Principal: "person/admin", Remote: "test"}
	for i := range rounds {
		principal := fmt.Sprintf("host/h%d", i)
		tok, err := e.service.NewEnrolmentToken(t.Context(), admin, principal, 0)
		if err != nil {
			t.Fatal(err)
		}
		redeem := func(int) error {
			c := kms.Caller{Remote: fmt.Sprintf("10.0.%d.%d:1", i>>8, i&255)}
			return e.service.Redeem(t.Context(), c, tok.Text, func(string) error { return nil })
		}
		if i%10 == 0 {
			redeem = func(n int) error {
				_, err := e.redeem(t, tok.Text.Reveal(), loopback(2*i+n))
				return err
			}
		}
		var won atomic.Int32
		var both sync.WaitGroup
		for n := range 2 {
			both.Go(func() {
				err := redeem(n)
				switch {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, dek.ErrDenied) && status.Code(err) != codes.PermissionDenied:
					t.Errorf("round %d: got %v, want a denial", i, err)
				}
			})
		}
		both.Wait()
		if won.Load() != 1 {
			t.Fatalf("round %d: %d redemptions won, want 1", i, won.Load())
		}
	}
}
