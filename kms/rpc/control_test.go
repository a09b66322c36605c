package rpc_test

import (
	"context"
	"errors"

	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/kmspb"
	"github.com/keyward/keyward/kms/rpc"
)

func TestControlSocket(t *testing.T) {
	d := openDoor(t)
	conn := d.local(t)
	if _, s := exchange(t, conn, kmspb.Admin_Backup_FullMethodName, nil); s.Code() != codes.OK {
		t.Fatal(s)
	}
	if c, _ := d.house.seen(); c.Principal != access.LocalRoot || c.Serial != "" || !strings.HasPrefix(c.Remote, "unix:uid=") {
		t.Errorf("caller: got %+v", c)
	}
	for _, m := range rpc.Methods() {
		_, s := exchange(t, conn, m.Name(), encode(t, good(t)[m.Name()]))
		admin := strings.Contains(m.Name(), ".Admin/") || strings.Contains(m.Name(), "health")
		if (s.Code() == codes.OK) != admin {
			t.Errorf("%s: got %v", m.Name(), s)
		}
	}
	info, err := os.Stat(d.socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: got %v, %v, want 0600", info.Mode(), err)
	}
}

func TestControlSocketRefusesOtherUsers(t *testing.T) {
	d := openDoor(t)
	policy, err := access.New()
	if err != nil {
		t.Fatal(err)
	}
	s, err := rpc.NewServer(rpc.Config{
		Backend: rpc.NewBackend(d.house), Identities: d.authority, Records: d.ledger, Rules: policy, AuditLog: d.house,
		Endpoints: []string{"127.0.0.1:1"}, Registerer: prometheus.NewRegistry(), ControlUser: func(uint32) bool { return false },
	})
	if err != nil {
		t.Fatal(err)
	}
	d.socket = filepath.Join(t.TempDir(), "control")
	l, err := rpc.ListenControl(d.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.ServeControl(l) }()
	if _, st := exchange(t, d.local(t), kmspb.Admin_GetStatus_FullMethodName, nil); st.Code() != codes.Unavailable {
		t.Errorf("got %v, want no connection", st)
	}
	if d.house.calls.Load() != 0 {
		t.Error("another user reached the service")
	}
	if e := d.ledger.take(); len(e) == 0 || !strings.HasPrefix(e[0].Remote, "unix:uid=") || e[0].Result != "denied" {
		t.Errorf("records: got %+v", e)
	}
	s.Close(context.Background())
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestListenControl(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "control")
	l, err := rpc.ListenControl(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rpc.ListenControl(path); !errors.Is(err, dek.ErrExists) {
		t.Errorf("while another serves: got %v, want dek.ErrExists", err)
	}
	l.SetUnlinkOnClose(false) // as a process that was killed
	_ = l.Close()
	again, err := rpc.ListenControl(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	_ = again.Close()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := rpc.ListenControl(file); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("a file: got %v, want dek.ErrInvalid", err)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Error("the file is gone")
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil { // whatever the umask
		t.Fatal(err)
	}
	if _, err := rpc.ListenControl(filepath.Join(open, "control")); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("a directory that all can write to: got %v, want dek.ErrInvalid", err)
	}
	if _, err := rpc.ListenControl(filepath.Join(dir, "absent", "control")); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("no directory: got %v, want dek.ErrInvalid", err)
	}
}

// TestNewServerFailsClosed: what is missing stops the start.
func TestNewServerFailsClosed(t *testing.T) {
	d := openDoor(t)
	policy, err := access.New()
	if err != nil {
		t.Fatal(err)
	}
	good := rpc.Config{
		Backend: rpc.NewBackend(d.house), Identities: d.authority, Records: d.ledger, Rules: policy,
		AuditLog: d.house, Endpoints: []string{"kms.example:7443"},
	}
	tests := []struct {
		name string
		edit func(*rpc.Config)
	}{
		{"no backend", func(c *rpc.Config) { c.Backend = rpc.Backend{} }},
		{"one area missing", func(c *rpc.Config) { c.Backend.Grants = nil }},
		{"no identities", func(c *rpc.Config) { c.Identities = nil }},
		{"no records", func(c *rpc.Config) { c.Records = nil }},
		{"no rules", func(c *rpc.Config) { c.Rules = nil }},
		{"no log", func(c *rpc.Config) { c.AuditLog = nil }},
		{"no endpoint", func(c *rpc.Config) { c.Endpoints = nil }},
		{"endpoint without port", func(c *rpc.Config) { c.Endpoints = []string{"kms.example"} }},
		{"a rule missing", func(c *rpc.Config) { c.Rules = noRules{} }},
		{"metrics twice", func(c *rpc.Config) { c.Registerer = d.registry }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := good
			tt.edit(&c)
			if s, err := rpc.NewServer(c); !errors.Is(err, dek.ErrInvalid) || s != nil {
				t.Errorf("got %v, want dek.ErrInvalid", err)
			}
		})
	}
	s, err := rpc.NewServer(good)
	if err != nil {
		t.Fatal(err)
	}
	s.Close(context.Background())
	if err := s.Serve(mustListen(t, "127.0.0.1:0")); err != nil {
		t.Errorf("Serve after Close: %v", err)
	}
}

type noRules struct{}

func (noRules) Known(op kms.Operation) bool { return op != "key.roll" }
