package mariadb_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// A refusal is a way to spoil a start and what the error log says then.
type refusal struct {
	name    string
	spoil   func(*mariadbtest.Agent)
	want    string
	retries bool // keeps trying for keyward_start_timeout
}

func refusals() []refusal {
	always := func(f mariadbtest.Fault) func(*mariadbtest.Agent) {
		return func(a *mariadbtest.Agent) { a.SetFault(func(mariadbtest.Request) mariadbtest.Fault { return f }) }
	}
	on := func(op byte, f mariadbtest.Fault) func(*mariadbtest.Agent) {
		return func(a *mariadbtest.Agent) {
			a.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
				if q.Op == op {
					return f
				}
				return mariadbtest.Fault{}
			})
		}
	}
	kms := "keyring orders/system version 1: KMS kms1.example:7443 unreachable; remedy: keyward status"
	long := strings.Repeat("a long explanation ", 45) + "END-OF-IT"
	return []refusal{
		{"agent down", (*mariadbtest.Agent).Stop, "Is keyward-agent running (systemctl status keyward-agent)", true},
		{"KMS away at HELLO", on(mariadbtest.OpHello, mariadbtest.Fault{Class: mariadbtest.ClassUnavailable, Text: kms}), kms, true},
		{"KMS away at GET", on(mariadbtest.OpGet, mariadbtest.Fault{Class: mariadbtest.ClassUnavailable, Text: kms}), kms, true},
		{"denied at HELLO", on(mariadbtest.OpHello, mariadbtest.Fault{Class: mariadbtest.ClassDenied, Text: "instance orders: revoked"}), "instance orders: revoked", false},
		{"denied at the door", on(mariadbtest.OpHello, mariadbtest.Fault{Class: mariadbtest.ClassDenied, Text: "uid 0 has no instance",
			Mutate: func(b []byte) []byte { clear(b[5:9]); return b }}), "uid 0 has no instance", false},
		{"one keyring denied", func(a *mariadbtest.Agent) { a.SetState(7, mariadbtest.StateDenied) }, mariadbtest.DeniedText("orders/payroll", 1), false},
		{"long message", always(mariadbtest.Fault{Class: mariadbtest.ClassInternal, Text: long}), "END-OF-IT", false},
		{"hang", always(mariadbtest.Fault{Hang: true}), "no answer in time", false}, // HELLO may take it all,
		{"garbage", always(faults["garbage"]), "agent socket", true},
		{"list truncated", on(mariadbtest.OpList, faults["truncated"]), "closed by the agent", true},
		{"key of a wrong size", on(mariadbtest.OpGet, mariadbtest.Fault{Mutate: func(b []byte) []byte { b[17] = 16; return b }}), "malformed key", true},
	}
}

// TestStartRefused: without its keys a server does not start, says why in its
// own error log, and starts once the cause is gone.
func TestStartRefused(t *testing.T) {
	for _, tt := range refusals() {
		t.Run(tt.name, func(t *testing.T) {
			r, c := prepared(t)
			tt.spoil(r.agent)
			begin := time.Now()
			err := r.tryStart(c)
			if !errors.Is(err, mariadbtest.ErrExited) {
				t.Fatalf("start: %v, want %v", err, mariadbtest.ErrExited)
			}
			if took := time.Since(begin); took > 5*time.Second || tt.retries != strings.Contains(r.ErrorLog(), "trying again") {
				t.Errorf("took %v, retries wanted: %v", took, tt.retries)
			}
			log := strings.NewReplacer("\n", " ").Replace(r.ErrorLog())
			if !strings.Contains(log, tt.want) {
				t.Errorf("the error log does not say %q:\n%s", tt.want, r.ErrorLog())
			}
			r.agent.Stop()
			r.agent.SetFault(nil)
			r.agent.SetState(7, mariadbtest.StateActive)
			if err := r.agent.Start(); err != nil {
				t.Fatal(err)
			}
			if err := r.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.want("keys", r.status("Keyward_keys_held"), "3")
			r.stopClean()
		})
	}
}

// TestNoKeyring: an agent that has nothing for this server.
func TestNoKeyring(t *testing.T) {
	t.Parallel()
	r, c := prepared(t)
	r.agent.Stop()
	empty := mariadbtest.NewAgent(r.agent.Path())
	if err := empty.Start(); err != nil {
		t.Fatal(err)
	}
	defer empty.Stop()
	if err := r.tryStart(c); !errors.Is(err, mariadbtest.ErrExited) {
		t.Fatal(err)
	}
	if !strings.Contains(r.ErrorLog(), "keyward plugin prepare mariadb") {
		t.Error("the error log names no remedy")
	}
}

// TestAgentComesLate: a server that is started before its agent waits for it.
func TestAgentComesLate(t *testing.T) {
	t.Parallel()
	r, c := prepared(t, "--keyward-start-timeout=30")
	r.agent.Stop()
	started := make(chan error, 1)
	go func() { started <- r.tryStart(c) }()
	eventually(t, "first attempt", 10*time.Second, func() bool {
		b, _ := os.ReadFile(filepath.Join(r.dir, "s", "error.log"))
		return strings.Contains(string(b), "trying again")
	})
	if err := r.agent.Start(); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if n := r.agent.Count(mariadbtest.Request{Op: mariadbtest.OpHello, Cold: true}); n != 1 {
		t.Errorf("%d cold HELLOs, want 1", n)
	}
}

// TestOldVersionRetired: a server does not start without an old version, unless
// it is one that the KMS refuses and the DBA says so.
func TestOldVersionRetired(t *testing.T) {
	t.Parallel()
	r, c := prepared(t)
	r.agent.Roll(7)
	refuse := func(class uint16) {
		r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
			if q.KeyID == 7 && q.Version == 1 {
				return mariadbtest.Fault{Class: class, Text: "no version 1"}
			}
			return mariadbtest.Fault{}
		})
	}
	refuse(mariadbtest.ClassUnavailable)
	if err := r.tryStart(c); !errors.Is(err, mariadbtest.ErrExited) {
		t.Fatalf("started without a version that may be needed: %v", err)
	}
	refuse(mariadbtest.ClassDenied)
	if err := r.Start(t.Context()); !errors.Is(err, mariadbtest.ErrExited) {
		t.Fatalf("started without a version that is denied: %v", err)
	}
	if err := r.Start(t.Context(), "--keyward-require-old-keys=OFF"); err != nil {
		t.Fatal(err)
	}
	r.want("versions", r.key(7, "VERSIONS"), "3")
	r.want("warning", r.key(7, "LAST_ERROR"), "no version 1")
	r.agent.SetFault(nil)
	eventually(t, "version 1", 5*time.Second, func() bool { return r.key(7, "VERSIONS") == "1,3" })
}

// TestCBC: the other cipher, over a restart.
func TestCBC(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--keyward-cipher=cbc")
	r.fill("i", "")
	r.fill("a", "ENGINE=Aria")
	r.exec("FLUSH BINARY LOGS")
	r.stopClean()
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkTable("i")
	r.checkTable("a")
	r.stopClean()
}

// TestKilledServer: kill -9 during writes; everything committed is there.
func TestKilledServer(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--innodb-flush-log-at-trx-commit=1", "--sync-binlog=1")
	r.fill("t1", "")
	for i := range 3 {
		r.agent.Roll(1)
		r.exec("UPDATE d.t1 SET v = CONCAT('" + canary + "', id) WHERE id % 3 = 1")
		if err := r.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := r.Start(t.Context()); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		r.checkTable("t1")
		r.want("updated", r.query("SELECT COUNT(*) FROM d.t1 WHERE v = CONCAT('"+canary+"', id)"), "334")
	}
}

// TestMigration: a server encrypted by file_key_management with the same key
// goes on with this plugin, byte for byte, in both ciphers.
func TestMigration(t *testing.T) {
	t.Parallel()
	for _, cipher := range []string{"ctr", "cbc"} {
		t.Run(cipher, func(t *testing.T) {
			r, c := prepared(t, "--keyward-cipher="+cipher)
			ours := c.Args
			file := filepath.Join(r.dir, "keys")
			var lines []string
			for _, id := range []uint32{1, 2, 7} {
				lines = append(lines, keyLine(id, r.agent.Key(id, 1)))
			}
			if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			c.Args = []string{"--plugin-load-add=file_key_management", "--file-key-management-filename=" + file,
				"--file-key-management-encryption-algorithm=aes_" + cipher}
			for _, a := range ours {
				if !strings.Contains(a, "keyward") {
					c.Args = append(c.Args, a)
				}
			}
			if err := r.tryStart(c); err != nil {
				t.Fatal(err)
			}
			r.fill("i", "")
			r.fill("i7", "ENCRYPTION_KEY_ID=7")
			r.fill("a", "ENGINE=Aria")
			r.stopClean()
			c.Args = ours
			if err := r.tryStart(c); err != nil {
				t.Fatal(err)
			}
			for _, table := range []string{"i", "i7", "a"} {
				r.checkTable(table)
			}
			r.want("binlog", r.query("SELECT @@log_bin"), "1")
			r.stopClean()
		})
	}
}

// TestBackup backs up with mariadb-backup while the server runs, prepares and
// restores, each of which needs the plugin, and refuses to prepare without it.
func TestBackup(t *testing.T) {
	t.Parallel()
	program, err := exec.LookPath("mariadb-backup")
	if err != nil {
		if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	r := newRig(t)
	r.fill("i", "")
	r.fill("i7", "ENCRYPTION_KEY_ID=7")
	r.fill("a", "ENGINE=Aria")
	r.agent.Roll(1)
	eventually(t, "roll", time.Second, func() bool { return r.key(1, "LATEST_VERSION") == "3" })
	target := filepath.Join(r.dir, "backup")
	run := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), program, args...).CombinedOutput()
		return string(out), err
	}
	// prepare must be told to read the plugin's settings from the backup
	settings := "--defaults-file=" + filepath.Join(target, "backup-my.cnf")
	if out, err := run("--no-defaults", "--backup", "--target-dir="+target, "--socket="+r.Socket(), "--user=root"); err != nil {
		t.Fatalf("backup: %v\n%s", err, out)
	}
	r.agent.Stop()
	out, err := run(settings, "--prepare", "--target-dir="+target)
	if err == nil || !strings.Contains(out, "Is keyward-agent running") {
		t.Errorf("prepare without agent: %v\n%s", err, out)
	}
	if err := r.agent.Start(); err != nil {
		t.Fatal(err)
	}
	if out, err := run(settings, "--prepare", "--target-dir="+target); err != nil {
		t.Fatalf("prepare: %v\n%s", err, out)
	}
	r.stopClean()
	if err := os.RemoveAll(r.DataDir()); err != nil {
		t.Fatal(err)
	}
	if out, err := run("--no-defaults", "--copy-back", "--target-dir="+target, "--datadir="+r.DataDir()); err != nil {
		t.Fatalf("restore: %v\n%s", err, out)
	}
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"i", "i7", "a"} {
		r.checkTable(table)
	}
	r.stopClean()
}

// TestReadme starts a server with the configuration that README.md shows.
func TestReadme(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "```ini\n")
	snippet, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("README.md has no configuration")
	}
	r, c := prepared(t)
	c.Args = []string{"--log-bin=binlog"}
	for line := range strings.Lines(strings.ReplaceAll(snippet, "/run/keyward/agent.sock", r.agent.Path())) {
		name, value, ok := strings.Cut(line, "=")
		if ok && !strings.HasPrefix(line, "#") {
			c.Args = append(c.Args, "--"+strings.TrimSpace(name)+"="+strings.TrimSpace(value))
		}
	}
	if len(c.Args) < 11 {
		t.Fatalf("only %q", c.Args)
	}
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"innodb_encrypt_tables": "FORCE", "innodb_encrypt_log": "1", "encrypt_binlog": "1",
		"encrypt_tmp_files": "1", "aria_encrypt_tables": "1", "innodb_encryption_rotate_key_age": "1"} {
		r.want(name, r.query("SELECT @@"+name), want)
	}
	r.fill("t1", "")
	r.checkTable("t1")
	r.stopClean()
}

// TestInstallAtRunTime: a plain server becomes an encrypted one without a
// restart, and cannot lose the plugin while it is in use.
func TestInstallAtRunTime(t *testing.T) {
	t.Parallel()
	r, c := prepared(t)
	c.Args = []string{"--loose-keyward-socket=" + r.agent.Path()}
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	r.fill("t1", "")
	r.exec("INSTALL SONAME 'keyward_key_management'", "SET GLOBAL innodb_encryption_threads = 2", "SET GLOBAL innodb_encrypt_tables = ON",
		"CREATE TABLE d.t2 ENCRYPTED=YES SELECT * FROM d.t1")
	eventually(t, "encryption of the old table", 20*time.Second, func() bool {
		return r.query("SELECT COUNT(*) FROM information_schema.innodb_tablespaces_encryption WHERE name LIKE 'd/%' AND min_key_version = 1") == "2"
	})
	if _, err := r.DB().Exec("UNINSTALL SONAME 'keyward_key_management'"); err == nil {
		t.Log("UNINSTALL is accepted, and happens at the shutdown")
	}
	r.checkTable("t1")
	r.checkTable("t2")
	r.stopClean()
}

// TestShutdownDuringRoll stops the server while a roll is being announced and
// InnoDB woken.
func TestShutdownDuringRoll(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t1", "")
	for range 8 {
		r.agent.Roll(1)
		r.stopClean()
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.agent.Roll(1)
		eventually(t, "announcement", time.Second, func() bool { return r.key(1, "LATEST_VERSION") != "1" })
	}
	r.checkTable("t1")
}
