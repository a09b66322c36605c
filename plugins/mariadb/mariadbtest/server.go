// Package mariadbtest runs private MariaDB servers and a scripted Keyward
// agent, for tests, benchmarks and the demo. A server has its own data
// directory, socket, error log and plugin directory; nothing of the system's
// own server is read or touched. It works as root and as any other account.
package mariadbtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"
)

// ErrMissing is wrapped when a program that a server needs is not installed.
var ErrMissing = errors.New("mariadbtest: MariaDB is not installed (apt install mariadb-server mariadb-backup)")

// ErrExited is wrapped by Start when mariadbd ended before it was ready. The
// reason is in the server's ErrorLog.
var ErrExited = errors.New("mariadbtest: mariadbd ended before it was ready")

const (
	systemPlugins = "/usr/lib/mysql/plugin"
	// startLimit bounds one server start when ctx has no nearer deadline.
	startLimit = 90 * time.Second
	pollEvery  = 10 * time.Millisecond
)

// A Config describes one server. The zero value of every field but Dir is
// usable.
type Config struct {
	// Dir holds data, socket, log and plugins. It is made if absent; its path
	// must be short enough for a Unix socket (some 90 bytes).
	Dir string
	// Template, a directory made by InstallDB, is copied to Dir/data if that
	// does not exist yet. Empty: InstallDB is run.
	Template string
	// Plugins are shared libraries to offer beside the system's own, by path.
	Plugins []string
	// Args are further arguments of mariadbd ("--innodb-encrypt-tables=ON").
	// They come last and win.
	Args []string
	// Env are further environment variables of mariadbd ("LD_PRELOAD=...").
	Env []string
	// TCP makes it listen on a free port of 127.0.0.1. Default: socket only.
	TCP bool
}

// A Server is a running mariadbd. Its methods may be called concurrently.
type Server struct {
	// Dir is Config.Dir.
	Dir string
	// Port is the TCP port, 0 without TCP.
	Port int

	config Config
	cmd    *exec.Cmd
	db     *sql.DB
	done   chan struct{} // closed when the process is gone
	mu     sync.Mutex
	state  error // of the process, after done
}

// InstallDB makes a data directory (about 20 MB, 3 s) for use as Template.
// root has no password and may connect by socket and TCP.
func InstallDB(ctx context.Context, dir string) error {
	program, err := lookup("mariadb-install-db")
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, program, "--no-defaults", "--datadir="+dir, "--user="+account(),
		"--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
		"--innodb-log-file-size=8M", "--innodb-fast-shutdown=1").CombinedOutput()
	if err != nil {
		return fmt.Errorf("mariadbtest: mariadb-install-db: %w: %s", err, tail(out))
	}
	return nil
}

// Start runs a server and returns when it answers a query. If the server ends
// before, the error wraps ErrExited and the Server is returned too, for its
// ErrorLog.
func Start(ctx context.Context, c Config) (*Server, error) {
	s := &Server{Dir: c.Dir, config: c}
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	return s, s.Start(ctx)
}

// Start runs the server again after Stop, Kill or a failed start, on the same
// data. Extra arguments hold for this run only.
func (s *Server) Start(ctx context.Context, extra ...string) error {
	args, err := s.args()
	if err != nil {
		return err
	}
	program, err := lookup("mariadbd")
	if err != nil {
		return err
	}
	cmd := exec.Command(program, append(args, extra...)...)
	cmd.Env = append(os.Environ(), s.config.Env...)
	cmd.Dir = s.Dir
	// A group of its own, so that a terminal's ^C reaches the caller alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("mariadbtest: %w", err)
	}
	done := make(chan struct{})
	s.mu.Lock()
	s.cmd, s.done = cmd, done
	s.mu.Unlock()
	go func() {
		err := cmd.Wait()
		s.mu.Lock()
		s.state = err
		s.mu.Unlock()
		close(done)
	}()
	return s.waitReady(ctx)
}

func (s *Server) prepare(ctx context.Context) error {
	for _, d := range []string{s.Dir, s.PluginDir(), filepath.Join(s.Dir, "tmp")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("mariadbtest: %w", err)
		}
	}
	if err := s.linkPlugins(); err != nil {
		return err
	}
	if _, err := os.Stat(s.DataDir()); err == nil {
		return nil
	}
	if s.config.Template == "" {
		return InstallDB(ctx, s.DataDir())
	}
	return CopyDir(s.config.Template, s.DataDir())
}

// CopyDir copies a data directory, byte for byte, as a thief or a careful
// backup would. dst must not exist.
func CopyDir(src, dst string) error {
	if err := os.CopyFS(dst, os.DirFS(src)); err != nil {
		return fmt.Errorf("mariadbtest: copy %s: %w", src, err)
	}
	return nil
}

func (s *Server) linkPlugins() error {
	system, err := filepath.Glob(filepath.Join(systemPlugins, "*.so"))
	if err != nil {
		return err
	}
	for _, p := range append(system, s.config.Plugins...) {
		abs, err := filepath.Abs(p)
		if err != nil {
			return err
		}
		link := filepath.Join(s.PluginDir(), filepath.Base(p))
		os.Remove(link)
		if err := os.Symlink(abs, link); err != nil {
			return fmt.Errorf("mariadbtest: %w", err)
		}
	}
	return nil
}

func (s *Server) args() ([]string, error) {
	args := []string{"--no-defaults", "--datadir=" + s.DataDir(), "--socket=" + s.Socket(),
		"--pid-file=" + filepath.Join(s.Dir, "pid"), "--log-error=" + s.logPath(), "--tmpdir=" + filepath.Join(s.Dir, "tmp"),
		"--plugin-dir=" + s.PluginDir(), "--user=" + account(), "--skip-name-resolve",
		"--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M", "--aria-pagecache-buffer-size=8M",
		"--key-buffer-size=1M", "--max-connections=64", "--performance-schema=OFF"}
	if !s.config.TCP {
		return append(append(args, "--skip-networking"), s.config.Args...), nil
	}
	if s.Port == 0 {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		s.Port = port
	}
	args = append(args, "--bind-address=127.0.0.1", "--port="+strconv.Itoa(s.Port))
	return append(args, s.config.Args...), nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("mariadbtest: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func (s *Server) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	db, err := s.Open("root", "")
	if err != nil {
		return err
	}
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if err := db.PingContext(ctx); err == nil {
			s.mu.Lock()
			s.db = db
			s.mu.Unlock()
			return nil
		}
		select {
		case <-s.done:
			db.Close()
			return fmt.Errorf("%w: %w", ErrExited, s.exit())
		case <-ctx.Done():
			db.Close()
			return errors.Join(fmt.Errorf("mariadbtest: mariadbd not ready: %w", ctx.Err()), s.Kill())
		case <-tick.C:
		}
	}
}

// Open is a pool of connections of another account; the caller closes it.
func (s *Server) Open(user, password string) (*sql.DB, error) {
	c := mysql.NewConfig()
	c.User, c.Passwd, c.Net, c.Addr = user, password, "unix", s.Socket()
	c.InterpolateParams = true
	c.Logger = &mysql.NopLogger{}
	connector, err := mysql.NewConnector(c)
	if err != nil {
		return nil, fmt.Errorf("mariadbtest: %w", err)
	}
	return sql.OpenDB(connector), nil
}

// DB is a pool of connections as root. It ends with the server.
func (s *Server) DB() *sql.DB {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.db
}

// PID is the process id of the newest run.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd.Process.Pid
}

// Done is closed when the newest run has ended.
func (s *Server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

// Stop shuts the server down cleanly and returns how it ended: nil is exit
// status 0.
func (s *Server) Stop(ctx context.Context) error {
	if err := s.signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-s.Done():
		return s.exit()
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("mariadbtest: mariadbd does not stop: %w", ctx.Err()), s.Kill())
	}
}

// Kill ends the server with SIGKILL and waits for the end. It is no error if
// it has ended already.
func (s *Server) Kill() error {
	if err := s.signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-s.Done()
	return nil
}

func (s *Server) signal(sig syscall.Signal) error {
	s.mu.Lock()
	cmd, db := s.cmd, s.db
	s.db = nil
	s.mu.Unlock()
	if db != nil {
		db.Close()
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("mariadbtest: %w", err)
	}
	return nil
}

func (s *Server) exit() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

// Socket is the path of the client socket.
func (s *Server) Socket() string { return filepath.Join(s.Dir, "sock") }

// DataDir is the data directory.
func (s *Server) DataDir() string { return filepath.Join(s.Dir, "data") }

// PluginDir holds links to the system's plugins and Config.Plugins.
func (s *Server) PluginDir() string { return filepath.Join(s.Dir, "plugin") }

func (s *Server) logPath() string { return filepath.Join(s.Dir, "error.log") }

// ErrorLog is what all runs have written to the error log, "" if it cannot be
// read.
func (s *Server) ErrorLog() string {
	b, err := os.ReadFile(s.logPath())
	if err != nil {
		return ""
	}
	return string(b)
}

func account() string {
	if os.Geteuid() == 0 {
		return "root"
	}
	return strconv.Itoa(os.Geteuid())
}

// lookup finds a program where Debian puts servers, too.
func lookup(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin"} {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode()&0o111 != 0 {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: no %s", ErrMissing, name)
}

func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}
