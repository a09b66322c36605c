package main

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
)

// TestFollowAudit reads the log of the running service: a limit gives the
// newest records, and who follows gets each later one once and in order.
func TestFollowAudit(t *testing.T) {
	in := newInstallation(t, nil, nil)
	auditor := in.auditor("ada")
	var newest []uint64
	err := auditor.ReadAudit(in.ctx(), connector.AuditFilter{Limit: 5}, func(r connector.AuditRecord) error {
		newest = append(newest, r.Sequence)
		return nil
	})
	if err != nil || len(newest) != 5 {
		t.Fatalf("the newest 5: got %v, %v", newest, err)
	}
	status, err := in.officer.Status(in.ctx())
	if err != nil || newest[4]+5 < status.AuditSize || newest[0]+4 != newest[4] {
		t.Errorf("the newest 5 of %d: got %v, %v", status.AuditSize, newest, err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	type record struct{ Phase, Object string }
	seen, ended := make(chan record, 100), make(chan error, 1)
	go func() {
		last := uint64(0)
		ended <- auditor.ReadAudit(ctx, connector.AuditFilter{Operation: "vault.create", Follow: true}, func(r connector.AuditRecord) error {
			if r.Sequence <= last {
				t.Errorf("record %d after %d", r.Sequence, last)
			}
			last = r.Sequence
			var rec record
			if err := json.Unmarshal(r.Line, &rec); err != nil {
				return err
			}
			seen <- rec
			return nil
		})
	}()
	for _, name := range []string{"v", "one", "two", "three"} { // v was there before
		if name != "v" {
			if _, err := in.officer.CreateVault(in.ctx(), name); err != nil {
				t.Fatal(err)
			}
		}
		for _, phase := range []string{"intent", "outcome"} {
			select {
			case got := <-seen:
				if want := (record{phase, "/vaults/" + name}); got != want {
					t.Fatalf("got %+v, want %+v", got, want)
				}
			case err := <-ended:
				t.Fatalf("it ended: %v", err)
			}
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("after it was cancelled: %v", err)
	}
}

// auditor enrols a person who may read the log.
func (in *installation) auditor(name string) *connector.Admin {
	in.t.Helper()
	id, err := connector.LoadIdentity(in.path("admin"), "")
	if err != nil {
		in.t.Fatal(err)
	}
	c, err := connector.NewClient(connector.Config{Identity: id})
	if err != nil {
		in.t.Fatal(err)
	}
	in.t.Cleanup(func() { _ = c.Close(); id.Close() })
	admin := connector.NewAdmin(c)
	token, err := admin.CreateToken(in.ctx(), "person/"+name, time.Hour)
	if err == nil {
		err = admin.AddGrant(in.ctx(), connector.Grant{Principal: "person/" + name, Role: "auditor", Scope: "/"})
	}
	if err != nil {
		in.t.Fatal(err)
	}
	return connector.NewAdmin(in.enrol(name, admin.TokenFile(token, connector.Instance{})))
}
