package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// pluginTree is the plugin's folder, seen from this package.
const pluginTree = "../../plugins/mariadb"

// A database is one private server with a configuration directory, as a
// distribution sets one up.
type database struct {
	dir  string
	cmd  *exec.Cmd
	done chan struct{}
}

// databases is the key of a script's servers by directory.
type databases struct{}

// cmdMariaDB runs private servers: mariadb start DIR, stop DIR, query DIR
// STATEMENT (the first column of the first row goes to standard output; with
// "!" the statement must fail).
func cmdMariaDB(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: mariadb start|stop|query DIR [STATEMENT]")
	}
	all, _ := ts.Value(databases{}).(map[string]*database)
	t, _ := ts.Value(scriptT{}).(*testing.T)
	dir := ts.MkAbs(args[1])
	var err error
	switch args[0] {
	case "start":
		if all[dir] == nil {
			all[dir] = newDatabase(t, dir)
		}
		err = all[dir].start(t)
	case "stop":
		all[dir].stop(syscall.SIGTERM)
	case "query":
		var out string
		out, err = all[dir].query(args[2])
		fmt.Fprintln(ts.Stdout(), out)
	}
	if (err != nil) != neg {
		ts.Fatalf("mariadb %s: %v", args[0], err)
	}
}

func newDatabase(t *testing.T, dir string) *database {
	t.Helper()
	plugin, err := mariadbtest.BuildPlugin(t.Context(), pluginTree, "all")
	if err == nil {
		err = mariadbtest.InstallDB(t.Context(), filepath.Join(dir, "data"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "conf.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	abs, err := filepath.Abs(filepath.Dir(plugin))
	if err != nil {
		t.Fatal(err)
	}
	cnf := fmt.Sprintf("[mariadbd]\nuser=%[3]d\ndatadir=%[1]s/data\nsocket=%[1]s/s\npid-file=%[1]s/pid\nlog-error=%[1]s/error.log\n"+
		"plugin-dir=%[2]s\nskip-networking\nlog-bin=binlog\ninnodb-buffer-pool-size=16M\ninnodb-log-file-size=8M\nskip-name-resolve\n"+
		"loose-keyward-start-timeout=2\n!includedir %[1]s/conf.d\n", dir, abs, os.Geteuid())
	if os.Geteuid() == 0 {
		cnf = strings.Replace(cnf, "user=0", "user=root", 1)
	}
	if err := os.WriteFile(filepath.Join(dir, "my.cnf"), []byte(cnf), 0o600); err != nil {
		t.Fatal(err)
	}
	d := &database{dir: dir}
	t.Cleanup(func() { d.stop(syscall.SIGKILL) })
	return d
}

// start runs mariadbd until it answers or ends.
func (d *database) start(t *testing.T) error {
	d.cmd = exec.Command("mariadbd", "--defaults-file="+filepath.Join(d.dir, "my.cnf"))
	if err := d.cmd.Start(); err != nil {
		return err
	}
	d.done = make(chan struct{})
	go func() {
		_ = d.cmd.Wait() // how it ended is in its log
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := d.query("SELECT 1"); err == nil {
			return nil
		}
		select {
		case <-d.done:
			log, _ := os.ReadFile(filepath.Join(d.dir, "error.log")) // shown if it is there
			return fmt.Errorf("mariadbd ended: %s", log)
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func (d *database) stop(sig syscall.Signal) {
	if d == nil || d.done == nil {
		return
	}
	_ = d.cmd.Process.Signal(sig) // it may have ended by itself
	<-d.done
}

func (d *database) query(q string) (string, error) {
	c := mysql.NewConfig()
	c.User, c.Net, c.Addr, c.Logger = "root", "unix", filepath.Join(d.dir, "s"), &mysql.NopLogger{}
	conn, err := mysql.NewConnector(c)
	if err != nil {
		return "", err
	}
	db := sql.OpenDB(conn)
	defer db.Close()
	rows, err := db.Query(q)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	var s sql.NullString
	if rows.Next() {
		if err := rows.Scan(&s); err != nil {
			return "", err
		}
	}
	return s.String, rows.Err()
}

// cmdEndpid ends the process of a pid file: endpid FILE.
func cmdEndpid(ts *testscript.TestScript, neg bool, args []string) {
	pid, err := strconv.Atoi(strings.TrimSpace(ts.ReadFile(args[0])))
	if err == nil {
		err = endProcess(pid)
	}
	if (err != nil) != neg {
		ts.Fatalf("endpid %s: %v", args[0], err)
	}
}

// endSpawned ends an agent that a failed script left behind.
func endSpawned(pidFile string) {
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return
	}
	if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && ended(pid) != nil {
		_ = endProcess(pid) // the script has failed already
	}
}

// endProcess terminates a process that is not a child of this one and waits.
func endProcess(pid int) error {
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for ended(pid) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}

// ended reports nil when pid is gone or a zombie nobody waits for.
func ended(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	if _, rest, ok := strings.Cut(string(b), ") "); ok && rest[0] == 'Z' {
		return nil
	}
	return errors.New("it still runs")
}
