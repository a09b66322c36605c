package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/rpc"
)

// connect enrols with the connector, as a host or a person does, and returns
// its client.
func (d *door) connect(t *testing.T, token, principal string, wait time.Duration) *connector.Client {
	t.Helper()
	root := d.authority.Roots()[0]
	id, err := connector.Enroll(t.Context(), connector.TokenFile{
		Endpoints: []string{d.address}, CAFingerprint: connector.Fingerprint(root), Principal: principal,
		Expires: time.Now().Add(time.Hour), Token: connector.NewSecretText(token),
	}, connector.EnrollOptions{Dir: filepath.Join(t.TempDir(), "id")})
	if err != nil {
		t.Fatal(err)
	}
	c, err := connector.NewClient(connector.Config{Identity: id, CallTimeout: wait})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); id.Close() })
	return c
}

// TestErrorsBothWays walks the error table of this side and that of the
// connector: every class comes out as it went in, and as no other.
func TestErrorsBothWays(t *testing.T) {
	d := openDoor(t)
	c := d.connect(t, "one-time-token", "host/db1", 300*time.Millisecond)
	admin := connector.NewAdmin(c)
	w, err := dek.ParseWrapped(wrapped(t, 1))
	if err != nil {
		t.Fatal(err)
	}
	rows := append(rpc.Classes(), rpc.Row{Err: errors.New("internal")})
	for _, row := range rows {
		want := row.Err
		if row.Reason == "" {
			want = dek.ErrUnavailable // nothing is known about the outcome
		}
		d.house.set(func(h *house) { h.fail = fmt.Errorf("act: %w: words", row.Err) })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second) // what is unavailable is tried again
		_, unwrapErr := c.Unwrap(ctx, w)
		_, keyErr := admin.RollKey(ctx, "r1", "v", "k")
		_, rewrapErr := admin.RewrapKey(ctx, "v", "k", nil)
		cancel()
		for name, got := range map[string]error{"unwrap": unwrapErr, "roll": keyErr, "rewrap": rewrapErr} {
			for _, other := range rpc.Classes() {
				if errors.Is(got, other.Err) != (other.Err == want) {
					t.Errorf("%v, %s: got %v, which is %v", row.Err, name, got, other.Err)
				}
			}
			if call := new(connector.CallError); !errors.As(got, &call) || call.Request == "" {
				t.Errorf("%v, %s: no request id in %v", row.Err, name, got)
			}
		}
	}
}

// TestExpiredIsNoDenial: a host whose certificate ran out keeps what it holds.
func TestExpiredIsNoDenial(t *testing.T) {
	d := openDoor(t)
	c := d.connect(t, "one-time-token", "host/db1", 2*time.Second)
	admin := connector.NewAdmin(c)
	if _, err := admin.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.clock.jump(8 * 24 * time.Hour)
	if _, err := admin.Status(t.Context()); !errors.Is(err, dek.ErrUnavailable) || errors.Is(err, dek.ErrDenied) {
		t.Errorf("got %v, want dek.ErrUnavailable", err)
	}
	d.clock.jump(0)
	if err := c.RenewIdentity(t.Context()); err != nil {
		t.Errorf("renew: %v", err)
	}
	d.house.set(func(h *house) { h.revoked["host/db1"] = true })
	if _, err := admin.Status(t.Context()); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("revoked: got %v, want dek.ErrDenied", err)
	}
}

// loopback is a source address of its own for each i.
func loopback(i int) net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 1, byte(i>>8), byte(i))}
}
