package mariadb_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// A stack is everything real: the three programs as processes, a software
// token, the plugin in a server.
type stack struct {
	*rig
	endpoint   string
	kms, agent *exec.Cmd
}

func (s *stack) bin(name string) string { return filepath.Join(s.dir, "bin", name) }

// newStack runs a key service, has the officer prepare and the DBA register a
// server, and restarts that with everything encrypted.
func newStack(t *testing.T) *stack {
	t.Helper()
	r, c := prepared(t)
	r.agent.Stop() // the scripted one has no part in this
	s := &stack{rig: r, endpoint: freeAddress(t)}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(s.dir, "bin")+"/", "../../cmd/keyward", "../../cmd/keyward-kms", "../../cmd/keyward-agent")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	s.startKMS()
	s.keyward("admin", "enrol", "--token-file", filepath.Join(s.dir, "kms/admin.token"))
	s.keyward("admin", "token", "create", "person/olga", "-o", filepath.Join(s.dir, "olga.token"))
	s.keyward("admin", "role", "grant", "crypto-officer", "person/olga", "--scope", "/")
	s.keyward("olga", "enrol", "--token-file", filepath.Join(s.dir, "olga.token"))
	s.keyward("olga", "plugin", "prepare", "mariadb", "shop", "--bits", "2048", "--keyring", "1=system", "--keyring", "2=temp", "--keyring", "7=payroll",
		"-o", filepath.Join(s.dir, "shop.token"))
	encrypted := c.Args
	c.Args = []string{"--loose-keyward-socket=" + r.agent.Path()}
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	s.register()
	s.stopClean()
	c.Args = append(encrypted, "--keyward-start-timeout=8") // the agent asks the key service for 5 s
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	return s
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// run starts a program that ends with the test at the latest.
func (s *stack) run(name string, args ...string) (*exec.Cmd, *bufio.Reader) {
	s.t.Helper()
	cmd := exec.Command(s.bin(name), args...)
	log, err := os.OpenFile(filepath.Join(s.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { s.end(cmd) })
	return cmd, bufio.NewReader(out)
}

// end kills a program, as a crash would, and waits.
func (s *stack) end(cmd *exec.Cmd) {
	if cmd.ProcessState == nil {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()         // killed
	}
}

func (s *stack) startKMS() {
	s.t.Helper()
	cmd, out := s.run("keyward-kms", "dev", "--dir", filepath.Join(s.dir, "kms"), "--listen", s.endpoint)
	if line, err := out.ReadString('\n'); err != nil || !strings.HasPrefix(line, "serving on") {
		log, _ := os.ReadFile(filepath.Join(s.dir, "keyward-kms.log")) // shown if it is there
		s.t.Fatalf("keyward-kms: %q, %v\n%s", line, err, log)
	}
	s.kms = cmd
}

func (s *stack) startAgent() {
	s.t.Helper()
	s.agent, _ = s.run("keyward-agent", "--config", filepath.Join(s.dir, "a/agent.json"))
}

// keyward runs the command line as somebody and returns what it prints.
func (s *stack) keyward(who string, args ...string) string {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), s.bin("keyward"), append([]string{"--identity", filepath.Join(s.dir, who)}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("keyward %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// register is the DBA's one command; the agent it starts is replaced by one
// whose process is ours to kill.
func (s *stack) register() {
	s.t.Helper()
	in := func(name string) string { return filepath.Join(s.dir, name) }
	if err := os.Mkdir(in("conf.d"), 0o755); err != nil {
		s.t.Fatal(err)
	}
	out := s.keyward("dba", "plugin", "register", "mariadb", "--token-file", in("shop.token"), "--server-socket", s.Socket(),
		"--server-user", strconv.Itoa(os.Geteuid()), "--server-config-dir", in("conf.d"), "--agent-config", in("a/agent.json"),
		"--agent-state", in("a/state"), "--host-secret-file", in("secret/host"), "--socket", s.rig.agent.Path(), "--start-agent", "spawn")
	if !strings.Contains(out, "its row is not in its file, and is in the file of an unencrypted table") {
		s.t.Errorf("register proved nothing:\n%s", out)
	}
	b, err := os.ReadFile(in("a/state/agent.pid"))
	if err != nil {
		s.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "end of the agent", 5*time.Second, func() bool {
		_, err := net.Dial("unix", s.rig.agent.Path())
		return err != nil
	})
	s.startAgent()
	s.await("connected to the new agent", func() string { return s.status("Keyward_agent_connects") }, "2")
}

func (s *stack) state() string  { return s.key(1, "STATE") }
func (s *stack) latest() string { return s.key(1, "LATEST_VERSION") }

func (s *stack) await(what string, get func() string, want string) time.Duration {
	s.t.Helper()
	return eventually(s.t, what+" = "+want, 15*time.Second, func() bool { return get() == want })
}

// work does what needs keys of every kind; the binlog must stay on.
func (s *stack) work(n int) {
	s.t.Helper()
	for i, o := range operations {
		s.session(o.sql(100*n + i)...)
	}
	s.want("binlog", s.query("SELECT @@log_bin"), "1")
}

// refused starts the stopped server and expects a refusal whose reason in the
// server's own error log has every one of words.
func (s *stack) refused(words ...string) {
	s.t.Helper()
	before := len(s.ErrorLog())
	if err := s.Start(s.t.Context()); !errors.Is(err, mariadbtest.ErrExited) {
		s.t.Fatalf("start: %v, want %v", err, mariadbtest.ErrExited)
	}
	log := s.ErrorLog()[before:]
	for _, w := range words {
		if !strings.Contains(log, w) {
			s.t.Errorf("the error log does not say %q", w)
		}
	}
	for line := range strings.Lines(log) {
		if strings.Contains(line, "cannot start") {
			s.t.Log(strings.TrimSpace(line))
		}
	}
}

func (s *stack) mustStart() {
	s.t.Helper()
	if err := s.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// TestStack is the life of a server with every part real: rolls, a dead agent,
// a dead key service, a disabled key, a backup.
func TestStack(t *testing.T) {
	t.Parallel()
	s := newStack(t)
	s.fill("t1", "")
	s.fill("t7", "ENCRYPTION_KEY_ID=7")
	pid := s.PID()
	s.rolls()
	s.agentDies()
	s.disabled()
	s.want("server", fmt.Sprint(s.PID()), fmt.Sprint(pid))
	s.kmsDies()
	s.backup()
	s.checkTable("t1")
	s.checkTable("t7")
	s.stopClean()
}

func (s *stack) rolls() {
	s.keyward("olga", "keyring", "roll", "shop/system")
	s.t.Logf("roll seen after %v", s.await("version", s.latest, "3"))
	eventually(s.t, "re-encryption", 20*time.Second, func() bool {
		n := s.pageVersions("/d/t1")
		return len(n) == 1 && n[3] > 0
	})
	s.want("tables of another key", fmt.Sprint(s.pageVersions("/d/t7")[3]), "0")
	s.keyward("olga", "key", "roll", "shop/master")
	s.keyward("olga", "key", "rewrap", "shop/master")
	s.work(1)
	s.want("version after a roll of the master key", s.latest(), "3")
}

func (s *stack) agentDies() {
	s.end(s.agent)
	s.await("state", s.state, "unreachable")
	s.work(2)
	s.startAgent()
	s.await("state", s.state, "active")
}

// disabled: nothing new is handed out, no restart, and the running server goes
// on; enabled: all is well without a restart.
func (s *stack) disabled() {
	s.keyward("olga", "key", "disable", "shop/master")
	took := s.await("state", s.state, "denied")
	s.t.Logf("denied after %v", took)
	s.work(3)
	s.keyward("olga", "key", "enable", "shop/master")
	s.await("state", s.state, "active")
	s.keyward("olga", "keyring", "roll", "shop/system")
	s.await("version", s.latest, "5")
}

// kmsDies: the running server goes on; a start is refused in words, here and
// when the key is disabled; the service back, all is well.
func (s *stack) kmsDies() {
	s.end(s.kms)
	s.await("state", s.state, "stale")
	s.work(4)
	s.stopClean()
	s.refused("shop/system key 1 version 5", "no answer from "+s.endpoint, "start the key service")
	s.startKMS()
	s.mustStart()
	s.checkTable("t1")
	s.keyward("olga", "key", "disable", "shop/master")
	s.stopClean()
	s.refused("shop/system key 1 version 5", s.endpoint, "refuses", "ask the security officer")
	s.keyward("olga", "key", "enable", "shop/master")
	s.mustStart()
}

func (s *stack) backup() {
	program, err := exec.LookPath("mariadb-backup")
	if err != nil {
		s.t.Fatal(err)
	}
	target := filepath.Join(s.dir, "backup")
	for _, args := range [][]string{
		{"--no-defaults", "--backup", "--target-dir=" + target, "--socket=" + s.Socket(), "--user=root"},
		{"--defaults-file=" + filepath.Join(target, "backup-my.cnf"), "--prepare", "--target-dir=" + target},
		{"--no-defaults", "--copy-back", "--target-dir=" + target, "--datadir=" + s.DataDir()},
	} {
		if args[1] == "--copy-back" {
			s.stopClean()
			if err := os.RemoveAll(s.DataDir()); err != nil {
				s.t.Fatal(err)
			}
		}
		if out, err := exec.CommandContext(s.t.Context(), program, args...).CombinedOutput(); err != nil {
			s.t.Fatalf("mariadb-backup %s: %v\n%s", args[1], err, out)
		} else if bytes.Contains(out, []byte(canary)) {
			s.t.Error("a row in its output")
		}
	}
	s.mustStart()
}
