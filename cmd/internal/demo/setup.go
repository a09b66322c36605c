package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/keyward/keyward/connector"
)

// A demo is the cast: the stage, the servers and what later acts need of
// earlier ones.
type demo struct {
	*stage
	port    int      // of the key service
	softhsm []string // environment that points at the token
	kms     *process
	agent   *process
	metrics string // address of the agent's figures
	db      *server
	secrets [][]byte // what no stolen file may hold: PIN, DEKs, rows
	rows    int      // rows acknowledged in shop.orders
}

const softhsmModule = "/usr/lib/softhsm/libsofthsm2.so"

func (d *demo) setUp(ctx context.Context) error {
	if err := d.makeToken(ctx, "token"); err != nil {
		return err
	}
	out, err := d.run(ctx, nil, "keyward", "recovery", "generate", "--shares", "5", "--threshold", "3",
		"--label", "demo", "--out", d.path("recovery"))
	if err != nil {
		return err
	}
	d.show(out, 4)
	if err := d.writeConfig(); err != nil {
		return err
	}
	out, err = d.run(ctx, d.softhsm, "keyward-kms", "init", "--config", d.path("kms.json"),
		"--admin-token-file", d.path("admin.token"))
	if err != nil {
		return err
	}
	d.show(out, 8)
	if err := d.startKMS(ctx); err != nil {
		return err
	}
	err = d.people(ctx)
	d.check("administrator, officer and auditor are enrolled, one role each", err)
	return err
}

// makeToken initialises a fresh SoftHSM token with a random PIN.
func (d *demo) makeToken(ctx context.Context, dir string) error {
	if err := os.MkdirAll(d.path(dir), 0o700); err != nil {
		return err
	}
	conf := d.path(dir + ".conf")
	text := fmt.Sprintf("directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", d.path(dir))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	d.softhsm = []string{"SOFTHSM2_CONF=" + conf}
	raw := make([]byte, 12)
	if _, err := rand.Read(raw); err != nil {
		return err
	}
	pin := hex.EncodeToString(raw)
	if err := os.WriteFile(d.path("pin"), []byte(pin+"\n"), 0o600); err != nil {
		return err
	}
	d.secrets = append(d.secrets, []byte(pin))
	// softhsm2-util has no other way to take a PIN than its arguments; with
	// your own token you do this step with your vendor's tool.
	_, err := d.quiet(ctx, d.softhsm, "softhsm2-util", "--init-token", "--free", "--label", "keyward",
		"--so-pin", pin+"so", "--pin", pin)
	return err
}

func (d *demo) writeConfig() error {
	if d.port == 0 {
		port, err := freePort()
		if err != nil {
			return err
		}
		d.port = port
	}
	cfg := map[string]any{
		"state_dir":               d.path("kms"),
		"audit_dir":               d.path("kms", "audit"),
		"listen":                  []string{fmt.Sprintf("127.0.0.1:%d", d.port)},
		"names":                   []string{"127.0.0.1", "localhost"},
		"token":                   map[string]any{"module": softhsmModule, "uri": "pkcs11:token=keyward", "pin_file": d.path("pin")},
		"backup_dir":              d.path("backup"),
		"recovery_recipient_file": d.path("recovery", "recipient.txt"),
	}
	b, err := json.MarshalIndent(cfg, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(d.path("kms.json"), b, 0o600)
}

func (d *demo) startKMS(ctx context.Context) error {
	p, err := d.start("keyward-kms", d.softhsm, "keyward-kms", "serve", "--config", d.path("kms.json"))
	if err != nil {
		return err
	}
	d.kms = p
	return await(ctx, p, 30*time.Second, dials("tcp", d.endpoint()))
}

func (d *demo) endpoint() string { return fmt.Sprintf("127.0.0.1:%d", d.port) }

// people enrols the administrator, who makes one-time tokens for the others.
func (d *demo) people(ctx context.Context) error {
	if _, err := d.run(ctx, nil, "keyward", "--identity", d.path("admin"), "enrol",
		"--token-file", d.path("admin.token")); err != nil {
		return err
	}
	for _, p := range []struct{ name, role string }{{"olga", "crypto-officer"}, {"ada", "auditor"}} {
		token := d.path(p.name + ".token")
		steps := [][]string{
			{"keyward", "--identity", d.path("admin"), "token", "create", "person/" + p.name, "-o", token},
			{"keyward", "--identity", d.path("admin"), "role", "grant", p.role, "person/" + p.name, "--scope", "/"},
			{"keyward", "--identity", d.path(p.name), "enrol", "--token-file", token},
		}
		for _, args := range steps {
			if _, err := d.run(ctx, nil, args...); err != nil {
				return err
			}
		}
	}
	_, err := d.quiet(ctx, nil, "keyward", "--identity", d.path("admin"), "role", "grant", "crypto-officer", "person/admin", "--scope", "/")
	if err == nil {
		return fmt.Errorf("strict mode let the administrator become crypto officer")
	}
	d.say("strict mode: %s", lastLines(err.Error(), 1))
	return nil
}

// officer runs a command as the crypto officer.
func (d *demo) officer(ctx context.Context, args ...string) (string, error) {
	return d.run(ctx, nil, append([]string{"keyward", "--identity", d.path("olga")}, args...)...)
}

func (d *demo) register(ctx context.Context) error {
	out, err := d.officer(ctx, "plugin", "prepare", "mariadb", "shop", "-o", d.path("shop.token"))
	d.check("the officer prepares vault, master key, keyrings and grants", err)
	if err != nil {
		return err
	}
	d.show(out, 12)
	if d.db, err = d.newServer(ctx, "db"); err != nil {
		return err
	}
	if err := d.db.start(ctx); err != nil {
		return err
	}
	out, err = d.run(ctx, nil, "keyward", "plugin", "register", "mariadb",
		"--token-file", d.path("shop.token"), "--server-socket", d.db.socket(),
		"--server-config-dir", d.path("db", "conf.d"), "--agent-config", d.path("agent", "agent.json"),
		"--agent-state", d.path("agent", "state"), "--host-secret-file", d.path("hostsecret", "secret"),
		"--socket", d.path("run", "agent.sock"), "--server-user", d.user, "--start-agent", "spawn")
	d.check("the DBA registers the server; an encrypted table proves it", err)
	if err != nil {
		return err
	}
	d.show(out, 14)
	_, again := d.quiet(ctx, nil, "keyward", "plugin", "register", "mariadb", "--token-file", d.path("shop.token"),
		"--server-socket", d.db.socket(), "--server-config-dir", d.mkdir("mallory"), "--agent-config", d.path("mallory", "agent.json"),
		"--agent-state", d.path("mallory", "state"), "--host-secret-file", d.path("mallory.secret"),
		"--socket", d.path("mallory", "agent.sock"), "--server-user", d.user, "--start-agent", "none")
	d.check("the token file is spent: a second enrolment is refused", refused(again, "denied"))
	if err := d.adoptAgent(ctx); err != nil {
		return err
	}
	return d.restartEncrypted(ctx)
}

// adoptAgent replaces the agent that registration started by one that this
// program can kill and restart.
func (d *demo) adoptAgent(ctx context.Context) error {
	b, err := os.ReadFile(d.path("agent", "state", "agent.pid"))
	if err != nil {
		return err
	}
	var pid int
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &pid); err != nil {
		return fmt.Errorf("agent.pid: %w", err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return err
	}
	if err := await(ctx, nil, 10*time.Second, func() error {
		if syscall.Kill(pid, 0) == nil {
			return fmt.Errorf("agent %d is still there", pid)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := d.exposeMetrics(); err != nil {
		return err
	}
	return d.startAgent(ctx)
}

// exposeMetrics has the agent show its figures on a loopback port, as an
// operator with Prometheus would.
func (d *demo) exposeMetrics() error {
	name := d.path("agent", "agent.json")
	c, err := connector.ReadAgentFile(name)
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	d.metrics = fmt.Sprintf("127.0.0.1:%d", port)
	c.MetricsListen = d.metrics
	b, err := c.Encode()
	if err != nil {
		return err
	}
	return os.WriteFile(name, b, 0o600)
}

func (d *demo) startAgent(ctx context.Context) error {
	p, err := d.start("keyward-agent", nil, "keyward-agent", "--config", d.path("agent", "agent.json"))
	if err != nil {
		return err
	}
	d.agent = p
	return await(ctx, p, 10*time.Second, dials("unix", d.path("run", "agent.sock")))
}

// restartEncrypted restarts the server with the written configuration, which
// switches on what only a start can: redo log, binlog, temporary files, Aria.
func (d *demo) restartEncrypted(ctx context.Context) error {
	d.db.stop()
	if err := d.db.start(ctx); err != nil {
		return err
	}
	for _, v := range []string{"innodb_encrypt_tables", "innodb_encrypt_log", "innodb_encrypt_temporary_tables",
		"encrypt_tmp_files", "encrypt_tmp_disk_tables", "encrypt_binlog", "aria_encrypt_tables"} {
		var on string
		err := d.db.db.QueryRowContext(ctx, "SELECT @@"+v).Scan(&on)
		if err == nil && (on == "0" || on == "OFF") {
			err = fmt.Errorf("%s is %s", v, on)
		}
		if err != nil {
			d.check("everything the server writes is set to be encrypted", err)
			return err
		}
	}
	d.check("everything the server writes is set to be encrypted: tables, redo log, temporary files, binlog, Aria", nil)
	return nil
}

// refused turns the expected failure of a command into success; its message
// must hold words, so that it failed for the right reason.
func refused(err error, words string) error {
	if err == nil {
		return fmt.Errorf("it was not refused")
	}
	if !strings.Contains(err.Error(), words) {
		return fmt.Errorf("refused without the words %q: %w", words, err)
	}
	return nil
}
