package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"
)

// A server is one private mariadbd: own data directory, socket and port.
type server struct {
	s    *stage
	name string
	dir  string // holds data, my.cnf, conf.d, mysqld.sock and error.log
	port int
	proc *process
	db   *sql.DB
}

// newServer makes a data directory. conf.d is where registration writes.
func (s *stage) newServer(ctx context.Context, name string) (*server, error) {
	v := &server{s: s, name: name, dir: s.path(name)}
	var err error
	if v.port, err = freePort(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(v.dir, "conf.d"), 0o755); err != nil {
		return nil, err
	}
	cnf := fmt.Sprintf(`[mariadbd]
user=%[4]s
datadir=%[1]s/data
socket=%[1]s/mysqld.sock
pid-file=%[1]s/mysqld.pid
log-error=%[1]s/error.log
port=%[2]d
bind-address=127.0.0.1
plugin-dir=%[3]s
tmpdir=%[1]s/tmp
innodb-buffer-pool-size=64M
innodb-log-file-size=32M
innodb-flush-log-at-trx-commit=1
sync-binlog=1
log-bin=binlog
server-id=1
skip-name-resolve
performance-schema=OFF
!includedir %[1]s/conf.d
`, v.dir, v.port, s.so, s.user)
	if err := os.WriteFile(v.cnf(), []byte(cnf), 0o644); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(v.dir, "tmp"), 0o755); err != nil {
		return nil, err
	}
	_, err = s.quiet(ctx, nil, "mariadb-install-db", "--no-defaults", "--user="+s.user,
		"--datadir="+v.data(), "--auth-root-authentication-method=normal", "--skip-test-db")
	return v, err
}

func (v *server) cnf() string    { return filepath.Join(v.dir, "my.cnf") }
func (v *server) data() string   { return filepath.Join(v.dir, "data") }
func (v *server) socket() string { return filepath.Join(v.dir, "mysqld.sock") }
func (v *server) errlog() string { return filepath.Join(v.dir, "error.log") }

// start starts mariadbd and waits until it answers.
func (v *server) start(ctx context.Context) error {
	p, err := v.s.start(v.name, nil, "mariadbd", "--defaults-file="+v.cnf())
	if err != nil {
		return err
	}
	v.proc = p
	cfg := mysql.NewConfig()
	cfg.User, cfg.Net, cfg.Addr = "root", "unix", v.socket()
	cfg.MultiStatements = true
	cfg.Logger = &mysql.NopLogger{} // a killed server is part of the show
	conn, err := mysql.NewConnector(cfg)
	if err != nil {
		return err
	}
	v.db = sql.OpenDB(conn)
	if err := await(ctx, p, 60*time.Second, func() error { return v.db.PingContext(ctx) }); err != nil {
		return fmt.Errorf("%w: %s", err, tail(v.errlog(), 6))
	}
	return nil
}

// stop shuts down cleanly.
func (v *server) stop() { v.end(syscall.SIGTERM) }

// kill is kill -9.
func (v *server) kill() { v.end(syscall.SIGKILL) }

func (v *server) end(sig syscall.Signal) {
	if v.db != nil {
		_ = v.db.Close() // the server is going away; nothing depends on it
	}
	v.proc.stop(sig)
}

// refusesStart starts mariadbd and returns the newest line of its own error
// log with all words, provided that the start failed.
func (v *server) refusesStart(ctx context.Context, words ...string) (string, error) {
	from := size(v.errlog())
	p, err := v.s.start(v.name, nil, "mariadbd", "--defaults-file="+v.cnf())
	if err != nil {
		return "", err
	}
	defer p.stop(syscall.SIGKILL)
	select {
	case <-p.done:
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(60 * time.Second):
		return "", fmt.Errorf("mariadbd did not end within 60 s; its log: %s", tail(v.errlog(), 4))
	}
	if p.err == nil {
		return "", fmt.Errorf("mariadbd ended with status 0")
	}
	return grepFile(v.errlog(), from, words...)
}

func (v *server) exec(ctx context.Context, query string, args ...any) error {
	_, err := v.db.ExecContext(ctx, query, args...)
	return err
}

// count returns the one number a query yields.
func (v *server) count(ctx context.Context, query string, args ...any) (int, error) {
	var n sql.NullInt64
	err := v.db.QueryRowContext(ctx, query, args...).Scan(&n)
	return int(n.Int64), err
}

// wantCount compares the number a query yields.
func (v *server) wantCount(ctx context.Context, want int, query string, args ...any) error {
	got, err := v.count(ctx, query, args...)
	if err == nil && got != want {
		err = fmt.Errorf("got %d, want %d: %s", got, want, query)
	}
	return err
}
