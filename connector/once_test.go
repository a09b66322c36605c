package connector_test

import (
	"context"
	"errors"
	"io"
	"path"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// An act is a management call with an effect, and the reply that a service
// gives to it.
type act struct {
	do    func(ctx context.Context, a *connector.Admin, id string) error
	reply proto.Message // nil: a stream
}

// once are the calls of which a repetition could have a second effect.
var once = map[string]act{
	"CreateVault": {func(ctx context.Context, a *connector.Admin, _ string) error {
		_, err := a.CreateVault(ctx, "acme")
		return err
	}, &kmspb.Vault{}},
	"AddGrant": {func(ctx context.Context, a *connector.Admin, _ string) error {
		return a.AddGrant(ctx, connector.Grant{Principal: "person/alice", Role: "auditor", Scope: "/"})
	}, &kmspb.Empty{}},
	"RemoveGrant": {func(ctx context.Context, a *connector.Admin, _ string) error {
		return a.RemoveGrant(ctx, connector.Grant{Principal: "person/alice", Role: "auditor", Scope: "/"})
	}, &kmspb.Empty{}},
	"CreateToken": {func(ctx context.Context, a *connector.Admin, _ string) error {
		_, err := a.CreateToken(ctx, "person/alice", time.Hour)
		return err
	}, &kmspb.EnrolmentToken{}},
	"RewrapKey": {func(ctx context.Context, a *connector.Admin, _ string) error {
		_, err := a.RewrapKey(ctx, "acme", "master", nil)
		return err
	}, nil},
	"Backup": {func(ctx context.Context, a *connector.Admin, _ string) error {
		_, err := a.Backup(ctx, io.Discard)
		return err
	}, nil},
	"ReadAudit": {func(ctx context.Context, a *connector.Admin, _ string) error {
		return a.ReadAudit(ctx, connector.AuditFilter{}, func(connector.AuditRecord) error { return nil })
	}, nil},
	"ExportAudit": {func(ctx context.Context, a *connector.Admin, _ string) error {
		_, err := a.ExportAudit(ctx, io.Discard)
		return err
	}, nil},
}

// byID are the calls that carry a request id.
var byID = map[string]act{
	"CreateKey": {func(ctx context.Context, a *connector.Admin, id string) error {
		_, err := a.CreateKey(ctx, connector.NewKey{RequestID: id, Vault: "acme", Name: "master"})
		return err
	}, &kmspb.MasterKey{}},
	"RollKey": {func(ctx context.Context, a *connector.Admin, id string) error {
		_, err := a.RollKey(ctx, id, "acme", "master")
		return err
	}, &kmspb.MasterKey{}},
	"CreateKeyring": {func(ctx context.Context, a *connector.Admin, id string) error {
		_, err := a.CreateKeyring(ctx, connector.NewKeyring{RequestID: id, Vault: "acme", Name: "orders", MasterKey: "master"})
		return err
	}, &kmspb.Keyring{}},
	"RollKeyring": {func(ctx context.Context, a *connector.Admin, id string) error {
		_, err := a.RollKeyring(ctx, id, "acme", "orders")
		return err
	}, &kmspb.Keyring{}},
	"PrepareInstance": {func(ctx context.Context, a *connector.Admin, id string) error {
		_, _, err := a.PrepareInstance(ctx, connector.NewInstance{RequestID: id, Kind: "mariadb", Name: "shop", Vault: "acme", Keyrings: []string{"orders"}})
		return err
	}, &kmspb.PrepareInstanceResponse{}},
}

// harmless are the calls that set a state or change nothing: they may repeat.
var harmless = map[string]bool{
	"SetKeyEnabled": true, "SetKeyringEnabled": true, "RevokeInstance": true, "RevokeIdentity": true,
	"ListVaults": true, "GetKey": true, "ListKeys": true, "GetKeyring": true, "ListKeyrings": true,
	"ListInstances": true, "ListGrants": true, "GetStatus": true,
}

// Every management call is one of the three: a new one must be given its place.
func TestEveryActHasItsSafety(t *testing.T) {
	var names []string
	for _, m := range kmspb.Admin_ServiceDesc.Methods {
		names = append(names, m.MethodName)
	}
	for _, m := range kmspb.Admin_ServiceDesc.Streams {
		names = append(names, m.StreamName)
	}
	for _, name := range names {
		_, isOnce := once[name]
		_, isByID := byID[name]
		if !isOnce && !isByID && !harmless[name] {
			t.Errorf("%s is neither sent once, nor by request id, nor harmless", name)
		}
	}
	if n := len(once) + len(byID) + len(harmless); n != len(names) {
		t.Errorf("%d calls are placed, there are %d", n, len(names))
	}
}

// A forgetful pair of endpoints does what it is asked and then fails to say so,
// until it has failed as often as it is told to.
type forgetful struct {
	a, b     *fakeKMS
	failures int

	mu       sync.Mutex
	requests []any // as they arrived, at either endpoint; nil for a stream
}

// ways are how an endpoint fails after the act.
var ways = map[string]func(k *fakeKMS) error{
	"unavailable": func(*fakeKMS) error { return reason(codes.Unavailable, "UNAVAILABLE") },
	"no reason":   func(*fakeKMS) error { return reason(codes.Unknown, "") },
	"hangs up":    func(k *fakeKMS) error { k.hangUp(); return nil },
}

func newForgetful(t *testing.T, failures int, way func(*fakeKMS) error, reply proto.Message) *forgetful {
	ca := newTestCA(t, "ca")
	f := &forgetful{a: newFakeKMS(t, ca), b: newFakeKMS(t, ca), failures: failures}
	for _, k := range []*fakeKMS{f.a, f.b} {
		k.set(func() {
			k.act = func(method string, request any) (any, error) {
				if path.Dir(method) != "/keyward.kms.v1.Admin" || !f.arrived(request) {
					return reply, nil
				}
				return reply, way(k)
			}
			k.actStream = func(string) error {
				f.arrived(nil)
				return way(k)
			}
		})
	}
	return f
}

// client enrols before the endpoints begin to forget.
func (f *forgetful) client(t *testing.T) *connector.Admin {
	act := f.a.act
	f.a.set(func() { f.a.act = nil })
	c := f.a.client(t, refusedAddress(t), f.a.addr, f.b.addr)
	f.a.set(func() { f.a.act = act })
	return connector.NewAdmin(c)
}

// arrived notes a request and reports whether it shall fail.
func (f *forgetful) arrived(request any) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, request)
	return len(f.requests) <= f.failures
}

func (f *forgetful) seen() []any {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests
}

// A call with a second effect arrives once, although nothing is known of it
// and another endpoint is up.
func TestOnceOnly(t *testing.T) {
	for way, fail := range ways {
		for name, act := range once {
			t.Run(way+"/"+name, func(t *testing.T) {
				t.Parallel()
				f := newForgetful(t, 100, fail, act.reply)
				ctx, cancel := context.WithTimeout(testContext(t), 5*time.Second)
				defer cancel()
				err := act.do(ctx, f.client(t), "")
				if act.reply == nil && way == "hangs up" && err == nil {
					t.Error("a stream that was cut ended well")
				}
				if !errors.Is(err, dek.ErrUnavailable) {
					t.Errorf("got %v, want unavailable", err)
				}
				if n := len(f.seen()); n != 1 {
					t.Errorf("it arrived %d times, want once", n)
				}
			})
		}
	}
}

// A call with a request id goes on until it is answered, always with the same
// id: the caller's, or one of its own for the retries of this call only.
func TestRequestIDs(t *testing.T) {
	for way, fail := range ways {
		for name, act := range byID {
			t.Run(way+"/"+name, func(t *testing.T) {
				t.Parallel()
				f := newForgetful(t, 2, fail, act.reply)
				c := f.client(t)
				if err := act.do(testContext(t), c, ""); err != nil {
					t.Fatal(err)
				}
				own := sameID(t, f.seen(), 3)
				if err := act.do(testContext(t), c, ""); err != nil {
					t.Fatal(err)
				}
				if next := sameID(t, f.seen()[3:], 1); next == own {
					t.Errorf("two calls share the id %q", next)
				}
				if err := act.do(testContext(t), c, "ticket-4711"); err != nil {
					t.Fatal(err)
				}
				if given := sameID(t, f.seen()[4:], 1); given != "ticket-4711" {
					t.Errorf("got id %q, want the caller's", given)
				}
			})
		}
	}
}

// sameID wants n requests with one id that is not empty, and returns it.
func sameID(t *testing.T, requests []any, n int) string {
	t.Helper()
	if len(requests) != n {
		t.Fatalf("%d requests arrived, want %d", len(requests), n)
	}
	var id string
	for i, r := range requests {
		got := r.(interface{ GetRequestId() string }).GetRequestId()
		if got == "" || i > 0 && got != id {
			t.Errorf("request %d: got id %q after %q", i+1, got, id)
		}
		id = got
	}
	return id
}
