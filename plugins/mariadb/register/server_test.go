package register_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
	"github.com/keyward/keyward/plugins/mariadb/register"
)

// A rig is a private server with the plugin at hand and a scripted agent.
type rig struct {
	*register.Server
	server *mariadbtest.Server
	agent  *mariadbtest.Agent
}

func newRig(t *testing.T, args ...string) rig {
	t.Helper()
	plugin, err := mariadbtest.BuildPlugin(t.Context(), "..", "all")
	if err != nil {
		skipOrFail(t, err)
	}
	dir, err := os.MkdirTemp("", "kw") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := mariadbtest.NewAgent(filepath.Join(dir, "agent.sock"))
	a.Add(1, "shop/system")
	a.Add(2, "shop/temp")
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	s, err := mariadbtest.Start(t.Context(), mariadbtest.Config{Dir: filepath.Join(dir, "s"), Plugins: []string{plugin},
		Args: append([]string{"--loose-keyward-socket=" + a.Path(), "--log-bin=binlog", "--loose-keyward-start-timeout=1"}, args...)})
	if err != nil {
		skipOrFail(t, err)
	}
	t.Cleanup(func() {
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.ErrorLog())
		}
	})
	db, err := register.Dial(t.Context(), register.Login{Socket: s.Socket()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return rig{db, s, a}
}

// skipOrFail skips for people who lack a program and fails where all must run.
func skipOrFail(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") != "1" && (errors.Is(err, mariadbtest.ErrMissing) || strings.Contains(err.Error(), "BuildPlugin")) {
		t.Skip(err)
	}
	t.Fatal(err)
}

// TestInstallAndProve loads the plugin into a running server, proves it and
// follows a roll to its end.
func TestInstallAndProve(t *testing.T) {
	r := newRig(t)
	for i, want := range []bool{true, false} {
		made, err := r.Install(t.Context(), register.DefaultPluginFile)
		if err != nil || made != want {
			t.Fatalf("install %d: got %v, %v, want %v", i+1, made, err, want)
		}
	}
	if v, ok, err := r.Variable(t.Context(), "KEYWARD_SOCKET"); err != nil || !ok || v != r.agent.Path() {
		t.Errorf("KEYWARD_SOCKET: got %q, %v, %v, want %q", v, ok, err, r.agent.Path())
	}
	p, err := r.Prove(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !p.Files || !p.Control || p.KeyID != 1 || p.Version != 1 || p.FileBytes == 0 {
		t.Errorf("proof: got %+v", p)
	}
	var left int
	if err := r.server.DB().QueryRow("SELECT COUNT(*) FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = 'keyward_proof'").Scan(&left); err != nil || left != 0 {
		t.Errorf("the proof left %d schemas behind (%v)", left, err)
	}
	checkParts(t, r, map[string]bool{"InnoDB tables": false, "redo log": false, "binary log": false})
	if err := r.EncryptNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkParts(t, r, map[string]bool{"InnoDB tables": true, "Aria tables": true, "redo log": false, "binary log": false})
	awaitAll(t, r, 1)
	if p, err := r.Prove(t.Context()); err != nil || !p.Control {
		t.Errorf("proof on a server that refuses unencrypted tables: got %+v, %v", p, err)
	}
	if got := r.agent.Roll(1); got != 3 {
		t.Fatalf("roll: got server version %d, want 3", got)
	}
	awaitAll(t, r, 3)
}

func checkParts(t *testing.T, r rig, want map[string]bool) {
	t.Helper()
	parts, err := r.Parts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(parts) != 7 {
		t.Errorf("got %d parts, want 7: %+v", len(parts), parts)
	}
	for _, p := range parts {
		if now, ok := want[p.Name]; ok && now != p.Now {
			t.Errorf("%s encrypted: got %v, want %v", p.Name, p.Now, now)
		}
		if !p.Now && p.How == "" {
			t.Errorf("%s: nothing says how it becomes encrypted", p.Name)
		}
	}
}

// awaitAll waits until every space has reached a version.
func awaitAll(t *testing.T, r rig, target uint32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		spaces, err := r.Spaces(ctx)
		if err != nil {
			t.Fatal(err)
		}
		p := register.Measure(spaces, 1, target)
		if p.Spaces > 1 && p.Done == p.Spaces && p.Plain == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("version %d was not reached: %+v", target, p)
		case <-tick.C:
		}
	}
}

// TestInstallRefused: no agent, another plugin, no such file.
func TestInstallRefused(t *testing.T) {
	r := newRig(t)
	r.agent.Stop()
	if _, err := r.Install(t.Context(), register.DefaultPluginFile); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("no agent: got %v, want %v", err, dek.ErrPrecondition)
	}
	if _, err := r.Install(t.Context(), "no_such_plugin.so"); !errors.Is(err, dek.ErrPrecondition) {
		t.Errorf("no file: got %v, want %v", err, dek.ErrPrecondition)
	}
	for _, name := range []string{"", "../x.so", "x'; DROP DATABASE mysql", "a b.so"} {
		if _, err := r.Install(t.Context(), name); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%q: got %v, want %v", name, err, dek.ErrInvalid)
		}
	}
}

func TestInstallBesideAnother(t *testing.T) {
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(keys, []byte("1;"+strings.Repeat("ab", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, "--plugin-load-add=file_key_management", "--file-key-management-filename="+keys)
	if _, err := r.Install(t.Context(), register.DefaultPluginFile); !errors.Is(err, dek.ErrExists) {
		t.Errorf("got %v, want %v", err, dek.ErrExists)
	}
	refusedWhole(t, r)
}

// refusedWhole: the whole registration refuses before it touches anything, the
// one-time token included.
func refusedWhole(t *testing.T, r rig) {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	token := connector.TokenFile{Endpoints: []string{"127.0.0.1:1"}, CAFingerprint: strings.Repeat("ab", 32), Principal: "host/shop",
		Expires: time.Now().Add(time.Hour), Instance: "shop", Kind: "mariadb", Vault: "shop", Keyrings: []string{"system"},
		Token: connector.NewSecretText("spent-never")}
	if err := errors.Join(token.Save(in("token")), os.Mkdir(in("conf.d"), 0o700)); err != nil {
		t.Fatal(err)
	}
	_, err := register.Run(t.Context(), register.Config{TokenFile: in("token"), Login: register.Login{Socket: r.server.Socket()},
		ServerUser: strconv.Itoa(os.Geteuid()), ConfigDir: in("conf.d"), PluginFile: register.DefaultPluginFile, AgentConfig: in("a/agent.json"),
		AgentState: in("a/state"), HostSecretFile: in("secret/host"), AgentSocket: in("sock"), Start: register.StartNone})
	if !errors.Is(err, dek.ErrExists) || !strings.Contains(err.Error(), "file_key_management") {
		t.Errorf("got %v, want %v that names the other plugin", err, dek.ErrExists)
	}
	for _, name := range []string{"a", "secret", "sock", "conf.d/90-keyward.cnf"} {
		if _, err := os.Stat(in(name)); err == nil {
			t.Errorf("%s was made", name)
		}
	}
}

// TestProofFinds: without a plugin nothing is proved, a schema of somebody
// else's is left alone, and the search does find a row that lies in clear.
func TestProofFinds(t *testing.T) {
	r := newRig(t)
	if _, err := r.Prove(t.Context()); err == nil {
		t.Error("a server without a plugin was proved")
	}
	for _, q := range []string{"CREATE DATABASE keyward_proof", "CREATE TABLE keyward_proof.mine (a INT)"} {
		if _, err := r.server.DB().Exec(q); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Prove(t.Context()); !errors.Is(err, dek.ErrExists) {
		t.Errorf("foreign schema: got %v, want %v", err, dek.ErrExists)
	}
	if _, err := r.server.DB().Exec("SELECT a FROM keyward_proof.mine"); err != nil {
		t.Errorf("the foreign table is gone: %v", err)
	}
}
