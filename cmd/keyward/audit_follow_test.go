package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"path/filepath"
	"testing"
	"time"
)

// TestAuditFollow: records that exist come first, then each as it is made;
// an interrupt is no failure.
func TestAuditFollow(t *testing.T) {
	dir := t.TempDir()
	s := startService(t)
	token, admin, ada := filepath.Join(dir, "token"), filepath.Join(dir, "admin"), filepath.Join(dir, "ada")
	if err := s.admin.Save(token); err != nil {
		t.Fatal(err)
	}
	must := func(args ...string) {
		t.Helper()
		if status, _, errs := command(t, args...); status != 0 {
			t.Fatalf("%v: %s", args, errs)
		}
	}
	must("--identity", admin, "enrol", "--token-file", token)
	must("--identity", admin, "token", "create", "person/ada", "-o", filepath.Join(dir, "ada.token"))
	must("--identity", admin, "role", "grant", "auditor", "person/ada", "--scope", "/")
	must("--identity", ada, "enrol", "--token-file", filepath.Join(dir, "ada.token"))
	must("--identity", admin, "vault", "create", "before")

	ctx, interrupt := context.WithTimeout(t.Context(), 30*time.Second)
	defer interrupt()
	r, w := io.Pipe()
	var errs bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		ended <- run(ctx, []string{"--identity", ada, "--json", "audit", "follow", "--operation", "vault.create"}, nil, w, &errs)
		w.Close()
	}()
	lines := bufio.NewScanner(r)
	outcome := func(object string) {
		t.Helper()
		for lines.Scan() {
			var rec recordLine
			if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
				t.Fatalf("%v: %s", err, lines.Text())
			}
			if rec.Operation != "vault.create" {
				t.Errorf("a record of %s", rec.Operation)
			}
			if rec.Phase == "outcome" && rec.Object == object {
				return
			}
		}
		t.Fatalf("no record of %s: %s", object, &errs)
	}
	outcome("/vaults/before")
	must("--identity", admin, "vault", "create", "after")
	outcome("/vaults/after")
	interrupt()
	for lines.Scan() {
	}
	if status := <-ended; status != 0 || errs.Len() > 0 {
		t.Errorf("interrupted: exit status %d, %q", status, &errs)
	}
}
