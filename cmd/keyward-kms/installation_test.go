package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
)

// An installation is a key service on a private token, with an officer and
// one instance enrolled.
type installation struct {
	t       testing.TB
	dir     string
	env     []string
	addr    string
	program *program
	officer *connector.Admin
	host    *connector.Client
	ring    connector.Keyring
}

// newInstallation makes one; cfg nil is the software token.
func newInstallation(t testing.TB, cfg *hsm.Config, more map[string]any) *installation {
	t.Helper()
	in := &installation{t: t, dir: t.TempDir(), addr: freeAddr(t)}
	c := map[string]any{"state_dir": filepath.Join(in.dir, "state"), "listen": []string{in.addr},
		"backup_dir": filepath.Join(in.dir, "backup")}
	if cfg == nil {
		c["software_token"] = filepath.Join(in.dir, "token")
	} else {
		c["token"] = map[string]any{"module": cfg.Module, "uri": cfg.TokenURI, "pin_file": cfg.PINFile}
		in.env = cfg.Env
	}
	for k, v := range more {
		c[k] = v
	}
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in.config(), b, 0o600); err != nil {
		t.Fatal(err)
	}
	init := startProgram(t, in.dir, in.env, "init", "--config", in.config(), "--admin-token-file", in.path("admin.token"))
	<-init.done
	in.start()
	in.people()
	return in
}

func (in *installation) path(name string) string { return filepath.Join(in.dir, name) }
func (in *installation) config() string          { return in.path("kms.json") }

// ctx bounds one call of a test.
func (in *installation) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	in.t.Cleanup(cancel)
	return ctx
}

func (in *installation) start() {
	in.t.Helper()
	in.startWith("serve", "--config", in.config())
}

// startWith starts the program and waits until it listens.
func (in *installation) startWith(args ...string) {
	in.t.Helper()
	in.program = startProgram(in.t, in.dir, in.env, args...)
	deadline := time.Now().Add(30 * time.Second)
	for {
		c, err := net.Dial("tcp", in.addr)
		if err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-in.program.done:
			in.t.Fatalf("keyward-kms ended: %s", in.log())
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			in.t.Fatalf("keyward-kms does not listen: %s", in.log())
		}
	}
}

func (in *installation) kill() { in.program.end(syscall.SIGKILL) }

func (in *installation) log() string {
	b, err := os.ReadFile(in.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-3000):])
}

// enrol redeems a token file.
func (in *installation) enrol(name string, t connector.TokenFile) *connector.Client {
	in.t.Helper()
	id, err := connector.Enroll(in.ctx(), t, connector.EnrollOptions{Dir: in.path(name)})
	if err != nil {
		in.t.Fatalf("enrol %s: %v\n%s", name, err, in.log())
	}
	c, err := connector.NewClient(connector.Config{Identity: id})
	if err != nil {
		in.t.Fatal(err)
	}
	in.t.Cleanup(func() { _ = c.Close() })
	return c
}

// people enrols administrator, officer and host, and makes the first keys.
func (in *installation) people() {
	in.t.Helper()
	must := func(err error) {
		in.t.Helper()
		if err != nil {
			in.t.Fatalf("%v\n%s", err, in.log())
		}
	}
	first, err := connector.ReadTokenFile(in.path("admin.token"))
	must(err)
	admin := connector.NewAdmin(in.enrol("admin", first))
	token, err := admin.CreateToken(in.ctx(), "person/olga", time.Hour)
	must(err)
	must(admin.AddGrant(in.ctx(), connector.Grant{Principal: "person/olga", Role: "crypto officer", Scope: "/"}))
	in.officer = connector.NewAdmin(in.enrol("olga", admin.TokenFile(token, connector.Instance{})))
	_, err = in.officer.CreateVault(in.ctx(), "v")
	must(err)
	_, err = in.officer.CreateKey(in.ctx(), connector.NewKey{RequestID: "k", Vault: "v", Name: "master", Bits: 2048})
	must(err)
	in.ring, err = in.officer.CreateKeyring(in.ctx(), connector.NewKeyring{RequestID: "r", Vault: "v", Name: "ring", MasterKey: "master", ServerKey: 1})
	must(err)
	db, token, err := in.officer.PrepareInstance(in.ctx(), connector.NewInstance{RequestID: "i", Kind: "mariadb", Name: "db", Vault: "v", Keyrings: []string{"ring"}})
	must(err)
	in.host = in.enrol("host", in.officer.TokenFile(token, db))
}

// unwrapAll opens the instance and unwraps every version of its keyring.
func (in *installation) unwrapAll() error {
	opened, err := in.host.OpenInstance(in.ctx(), "db", true, nil)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	for _, r := range opened.Keyrings {
		for _, v := range r.Versions {
			w, err := dek.ParseWrapped(v.Wrapped)
			if err != nil {
				return fmt.Errorf("version %d (%s): %w", v.Version, v.State, err)
			}
			k, err := in.host.Unwrap(in.ctx(), w)
			if err != nil {
				return fmt.Errorf("unwrap version %d: %w", v.Version, err)
			}
			k.Destroy()
		}
	}
	return nil
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
