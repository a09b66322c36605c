package main

import (
	"context"
	"crypto"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek/recovery"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/rpc"
	"github.com/keyward/keyward/kms/storetest"
)

// A service is a whole key service in this process: the real rules, front door
// and audit log, over a software token and a store in memory.
type service struct {
	endpoint string
	admin    connector.TokenFile // the first administrator's
}

type wallClock struct{}

func (wallClock) Now() time.Time { return time.Now() }

// A softToken is the pure-Go token as the rules want one.
type softToken struct{ *hsm.Software }

func (t softToken) OAEPHash() crypto.Hash { return t.Capabilities().PreferredOAEP() }

func (softToken) RestsOnRSA(sealed []byte) bool { return hsm.RestsOnRSA(sealed) }

func (softToken) Describe() string { return "software token for tests" }

// A folder takes backups.
type folder struct{ dir string }

func (f folder) Put(_ context.Context, name string, r io.Reader) error {
	_, err := saveWhole(filepath.Join(f.dir, name), func(w io.Writer) error {
		_, err := io.Copy(w, r)
		return err
	})
	return err
}

// A journal shows the audit log to the front door.
type journal struct{ *audit.Log }

func (j journal) Read(ctx context.Context, q rpc.AuditQuery, f func(uint64, []byte) error) error {
	filter := audit.Filter{From: q.From, Since: q.After, Till: q.Before, Principal: q.Principal, To: j.Size(),
		Operation: kms.Operation(q.Operation), Object: q.Object}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		for r, err := range j.Records(ctx, filter) {
			if err == nil {
				err = f(r.Seq, r.Bytes)
			}
			if err != nil {
				return err
			}
		}
		if !q.Follow {
			return nil
		}
		for filter.From = filter.To + 1; filter.To < filter.From; filter.To = j.Size() {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
		}
	}
}

// startService runs a key service until the test ends.
func startService(t testing.TB) service {
	t.Helper()
	dir := t.TempDir()
	token, err := hsm.OpenSoftware(filepath.Join(dir, "token"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { token.Close() })
	policy, err := access.New(kms.Operations()...)
	if err != nil {
		t.Fatal(err)
	}
	var log *audit.Log
	cfg := kms.Config{
		Token: softToken{token}, Store: storetest.NewMemory(), Clock: wallClock{}, Authorizer: policy, Strict: true, Backups: folder{dir},
		OpenAudit: func(ctx context.Context, s crypto.Signer) (kms.Auditor, error) {
			log, err = audit.Open(ctx, audit.Config{Dir: filepath.Join(dir, "audit"), Signer: s})
			return log, err
		},
	}
	r, shares, err := recovery.Generate(2, 3, "test")
	if err != nil {
		t.Fatal(err)
	}
	destroyShares(shares)
	first, err := kms.Init(t.Context(), cfg, kms.InitRequest{Recipient: r.String(), FirstAdministrator: "person/admin"})
	if err != nil {
		t.Fatal(err)
	}
	svc, err := kms.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { svc.Close() })
	authority, err := identity.Open(t.Context(), identity.Config{Signer: svc.CASigner(), Blobs: svc, Names: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	s := service{endpoint: serve(t, svc, authority, policy, log)}
	pin := authority.Fingerprint()
	s.admin = connector.TokenFile{Endpoints: []string{s.endpoint}, CAFingerprint: hex.EncodeToString(pin[:]),
		Principal: first.Principal, Expires: first.Expires, Token: connector.NewSecretText(first.Text.Reveal())}
	return s
}

// serve opens the front door and returns its address.
func serve(t testing.TB, svc *kms.Service, a *identity.Authority, policy *access.Policy, log *audit.Log) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	door, err := rpc.NewServer(rpc.Config{Backend: rpc.NewBackend(svc), Identities: a, Records: log, Rules: policy,
		AuditLog: journal{log}, Endpoints: []string{l.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- door.Serve(l) }()
	door.SetServing(true)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		door.Close(ctx)
		if err := <-served; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String()
}
