package register_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/plugins/mariadb/register"
)

func TestLoginRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	const secret = "s3cret-of-the-dba"
	for _, c := range []struct {
		name  string
		login register.Login
		want  error
	}{
		{"socket", register.Login{Socket: "/run/s"}, nil},
		{"DSN", register.Login{DSNFile: write("good", "root:"+secret+"@unix(/run/s)/\n", 0o600)}, nil},
		{"neither", register.Login{}, dek.ErrInvalid},
		{"both", register.Login{Socket: "/run/s", DSNFile: "x"}, dek.ErrInvalid},
		{"absent DSN file", register.Login{DSNFile: filepath.Join(dir, "absent")}, dek.ErrInvalid},
		{"readable DSN file", register.Login{DSNFile: write("open", "root:"+secret+"@unix(/run/s)/", 0o644)}, dek.ErrInvalid},
		{"no DSN", register.Login{DSNFile: write("bad", secret, 0o600)}, dek.ErrInvalid},
		{"a directory", register.Login{DSNFile: dir}, dek.ErrInvalid},
		{"a large file", register.Login{DSNFile: write("large", strings.Repeat("x", register.MaxDSNBytes+1), 0o600)}, dek.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := register.CheckLogin(c.login)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("the error shows what is in the DSN file")
			}
		})
	}
}

func TestDialWithoutServer(t *testing.T) {
	_, err := register.Dial(t.Context(), register.Login{Socket: filepath.Join(t.TempDir(), "none")})
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("got %v, want %v", err, dek.ErrUnavailable)
	}
}

func TestMeasure(t *testing.T) {
	spaces := []register.Space{
		{Name: "innodb_system", Encrypted: true, KeyID: 1, Oldest: 3, Newest: 3},
		{Name: "shop/orders", Encrypted: true, KeyID: 1, Oldest: 1, Newest: 3},
		{Name: "shop/pay", Encrypted: true, KeyID: 7, Oldest: 1, Newest: 1},
		{Name: "shop/plain", KeyID: 1},
	}
	for _, c := range []struct {
		name        string
		key, target uint32
		want        register.Progress
	}{
		{"under way", 1, 3, register.Progress{Spaces: 2, Done: 1, Plain: 1, Oldest: 1, Behind: []string{"shop/orders"}}},
		{"done", 1, 1, register.Progress{Spaces: 2, Done: 2, Plain: 1, Oldest: 1}},
		{"another key", 7, 1, register.Progress{Spaces: 1, Done: 1, Plain: 1, Oldest: 1}},
		{"no such key", 9, 1, register.Progress{Plain: 1}},
	} {
		got := register.Measure(spaces, c.key, c.target)
		if got.Spaces != c.want.Spaces || got.Done != c.want.Done || got.Plain != c.want.Plain || got.Oldest != c.want.Oldest ||
			strings.Join(got.Behind, ",") != strings.Join(c.want.Behind, ",") {
			t.Errorf("%s: got %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestCnfValues(t *testing.T) {
	for v, want := range map[string]error{
		"/run/keyward/agent.sock": nil,
		"agent.sock":              dek.ErrInvalid,
		"/run/a b":                dek.ErrInvalid,
		"/run/a#b":                dek.ErrInvalid,
		"/run/a\nplugin_load=x":   dek.ErrInvalid,
		"/run/'a":                 dek.ErrInvalid,
	} {
		if err := register.CheckCnfValue("socket", v); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", v, err, want)
		}
	}
}

// TestStages: the first stage demands nothing of the server, the final one
// all of it.
func TestStages(t *testing.T) {
	first, final := string(register.FirstStage("/run/a", "shop")), string(register.FinalStage("keyward_key_management.so", "/run/a", "shop"))
	for _, line := range []string{"plugin_load_add", "innodb_encrypt", "encrypt_binlog"} {
		if strings.Contains(first, line) {
			t.Errorf("the first stage demands %s", line)
		}
		if !strings.Contains(final, line) {
			t.Errorf("the final stage lacks %s", line)
		}
	}
	want, err := os.ReadFile("testdata/90-keyward.cnf")
	if err != nil {
		t.Fatal(err)
	}
	if final != string(want) {
		t.Errorf("final stage: got\n%s\nwant\n%s", final, want)
	}
}

func TestWriteFile(t *testing.T) {
	p := filepath.Join(t.TempDir(), "f")
	for _, c := range []struct {
		content string
		changed bool
	}{{"a", true}, {"a", false}, {"b", true}} {
		changed, err := register.WriteFile(p, []byte(c.content), 0o640)
		if err != nil || changed != c.changed {
			t.Errorf("write %q: got %v, %v, want %v", c.content, changed, err, c.changed)
		}
		st, err := os.Stat(p)
		if err != nil || st.Mode().Perm() != 0o640 {
			t.Errorf("mode: got %v, %v", st.Mode(), err)
		}
	}
	if _, err := register.WriteFile(filepath.Join(t.TempDir(), "absent", "f"), nil, 0o600); err == nil {
		t.Error("written into a directory that is not there")
	}
}

func TestParseStartMode(t *testing.T) {
	for _, s := range []string{"auto", "systemd", "spawn", "none"} {
		if m, err := register.ParseStartMode(s); err != nil || string(m) != s {
			t.Errorf("%s: got %v, %v", s, m, err)
		}
	}
	if _, err := register.ParseStartMode("docker"); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("got %v, want %v", err, dek.ErrInvalid)
	}
}

// TestPidFile: a pid file is believed only if its process runs our agent.
func TestPidFile(t *testing.T) {
	a := register.TestAgent{Config: "/etc/no-agent-of-this-test.json", State: t.TempDir()}
	for _, text := range []string{"", "x", "0", "1", "-5", "99999999", "4194304000"} {
		if err := os.WriteFile(filepath.Join(a.State, "agent.pid"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if pid := a.Running(); pid != 0 {
			t.Errorf("%q: got pid %d of somebody else", text, pid)
		}
	}
}

// TestSpawnFails: an agent that ends at once is reported with its last words.
func TestSpawnFails(t *testing.T) {
	dir := t.TempDir()
	a := register.TestAgent{Mode: register.StartSpawn, Program: script(t, dir, "agent", "echo 'agent: no identity here' >&2; exit 1"),
		Config: "/x", State: dir, Socket: filepath.Join(dir, "s")}
	_, _, err := a.Start(t.Context(), false)
	if !errors.Is(err, dek.ErrPrecondition) || !strings.Contains(err.Error(), "no identity here") {
		t.Errorf("got %v, want %v with the agent's words", err, dek.ErrPrecondition)
	}
}

func script(t *testing.T, dir, name, text string) string {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestSystemd runs against a systemctl that notes what it is asked.
func TestSystemd(t *testing.T) {
	dir := t.TempDir()
	asked := filepath.Join(dir, "asked")
	script(t, dir, "systemctl", `echo "$@" >> `+asked+`
case "$1" in
cat) exec cat `+dir+`/keyward-agent.service 2>/dev/null ;;
is-active) test -e `+dir+`/active ;;
restart) touch `+dir+`/active ;;
esac`)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := register.TestAgent{Mode: register.StartSystemd, Program: "/usr/bin/keyward-agent", Config: "/etc/keyward/agent.json",
		State: dir, Socket: filepath.Join(dir, "s"), Units: dir}
	for _, c := range []struct {
		name    string
		changed bool
		made    bool
		asked   string
	}{
		{"no unit yet", true, true, "cat keyward-agent.service\ndaemon-reload\nenable keyward-agent.service\nrestart keyward-agent.service\n"},
		{"nothing changed", false, false, "cat keyward-agent.service\nis-active --quiet keyward-agent.service\n"},
		{"new configuration", true, true, "cat keyward-agent.service\nenable keyward-agent.service\nrestart keyward-agent.service\n"},
	} {
		if err := os.RemoveAll(asked); err != nil {
			t.Fatal(err)
		}
		made, _, err := a.Start(t.Context(), c.changed)
		got, rerr := os.ReadFile(asked)
		if err != nil || rerr != nil || made != c.made || string(got) != c.asked {
			t.Errorf("%s: got %v, %v, asked\n%s", c.name, made, err, got)
		}
	}
	unit, err := os.ReadFile(filepath.Join(dir, "keyward-agent.service"))
	if err != nil || !strings.Contains(string(unit), "ExecStart=/usr/bin/keyward-agent --config /etc/keyward/agent.json\n") {
		t.Errorf("unit: got %v\n%s", err, unit)
	}
	a.Config = "/etc/keyward/another.json"
	if _, _, err := a.Start(t.Context(), true); !errors.Is(err, dek.ErrExists) {
		t.Errorf("unit of another agent: got %v, want %v", err, dek.ErrExists)
	}
	a.Config = "/etc/keyward/a b.json"
	if _, _, err := a.Start(t.Context(), true); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("blank in a path: got %v, want %v", err, dek.ErrInvalid)
	}
}

// TestLastWords: what the plugin said last is quoted whole, however many lines
// the server made of it.
func TestLastWords(t *testing.T) {
	const old = "0 [ERROR] mariadbd: keyward: old news\n"
	for _, c := range []struct{ name, log, want string }{
		{"one line", "0 [ERROR] mariadbd: keyward: cannot start: denied\n0 [ERROR] Plugin 'keyward' init function returned error.\n", "cannot start: denied"},
		{"three lines", "0 [Warning] mariadbd: keyward: trying\n0 [ERROR] mariadbd: keyward: cannot start: no answer from\n0 [ERROR] mariadbd: keyward: ... kms1:7443: start\n0 [ERROR] mariadbd: keyward: ... it\n",
			"cannot start: no answer from kms1:7443: start it"},
		{"nothing new", "", "see the server's error log"},
		{"other words", "0 [Note] ready\n", "see the server's error log"},
	} {
		log := filepath.Join(t.TempDir(), "error.log")
		if err := os.WriteFile(log, []byte(old+c.log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := register.LastWords(log, int64(len(old))); !strings.Contains(got, c.want) || strings.Contains(got, "old news") || strings.Contains(got, "...") {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
