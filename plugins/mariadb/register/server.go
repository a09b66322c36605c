package register

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"

	"github.com/keyward/keyward/dek"
)

// maxDSNBytes bounds a DSN file; a longer one is not a DSN.
const maxDSNBytes = 8192

// dialTimeout bounds the connect to the server; it stands on the same host.
const dialTimeout = 10 * time.Second

// A Login says how to reach a MariaDB server. Exactly one of Socket and
// DSNFile is set. No password is ever part of it: over the socket the server
// authenticates the operating system's user (unix_socket), a DSN stays in its
// file.
type Login struct {
	Socket  string // path of the server's Unix socket
	User    string // user for Socket; empty: root
	DSNFile string // file of mode 0600 that holds a go-sql-driver DSN
}

// A Server is a connection to a MariaDB server. It may be used concurrently.
type Server struct {
	db *sql.DB
}

// Facts are what the server says of itself.
type Facts struct {
	Version   string
	DataDir   string // as the server sees it
	PluginDir string
	ErrorLog  string // empty: stderr
	Binlog    bool
}

// Dial connects and checks that the other side is a MariaDB server.
// dek.ErrInvalid: the login or its file is not usable; dek.ErrUnavailable: no
// answer; dek.ErrDenied: the server refuses the user.
func Dial(ctx context.Context, l Login) (*Server, error) {
	cfg, err := l.config()
	if err != nil {
		return nil, err
	}
	c, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, fmt.Errorf("%w: the server's DSN can't be used", dek.ErrInvalid)
	}
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(4)
	s := &Server{db: db}
	f, err := s.Facts(ctx)
	if err == nil && !strings.Contains(f.Version, "MariaDB") {
		err = fmt.Errorf("%w: the server at %s is %s, not MariaDB", dek.ErrInvalid, l.where(), f.Version)
	}
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("connect to the server at %s: %w", l.where(), classify(err))
	}
	return s, nil
}

// Close ends the connection.
func (s *Server) Close() error { return s.db.Close() }

// where names the server without anything from a DSN.
func (l Login) where() string {
	if l.DSNFile != "" {
		return "the DSN of " + l.DSNFile
	}
	return l.Socket
}

func (l Login) config() (*mysql.Config, error) {
	if (l.Socket == "") == (l.DSNFile == "") {
		return nil, fmt.Errorf("%w: give either the server's socket or a DSN file", dek.ErrInvalid)
	}
	cfg := mysql.NewConfig()
	if l.DSNFile != "" {
		text, err := readPrivate(l.DSNFile, maxDSNBytes)
		if err != nil {
			return nil, err
		}
		// The driver's error may quote the DSN, so it is not passed on.
		cfg, err = mysql.ParseDSN(strings.TrimSpace(string(text)))
		clear(text)
		if err != nil {
			return nil, fmt.Errorf("%w: DSN file %s: want user:password@unix(/path)/ or user:password@tcp(host:port)/", dek.ErrInvalid, l.DSNFile)
		}
	} else {
		cfg.Net, cfg.Addr, cfg.User = "unix", l.Socket, l.User
		if cfg.User == "" {
			cfg.User = "root"
		}
	}
	cfg.Timeout = dialTimeout
	cfg.Logger = &mysql.NopLogger{}
	return cfg, nil
}

// readPrivate reads a small file that no one but its owner may read.
func readPrivate(path string, maxBytes int64) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxBytes {
		return nil, fmt.Errorf("%w: %s is not a regular file of at most %d bytes", dek.ErrInvalid, path, maxBytes)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%w: %s may be read by others (mode %04o): chmod 600 %s", dek.ErrInvalid, path, st.Mode().Perm(), path)
	}
	return os.ReadFile(path)
}

// classify turns the driver's errors into classes.
func classify(err error) error {
	var me *mysql.MySQLError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &me) && (me.Number == 1045 || me.Number == 1698 || me.Number == 1227):
		return fmt.Errorf("%w: %w", dek.ErrDenied, err)
	case errors.As(err, &me), errors.Is(err, dek.ErrInvalid):
		return err
	}
	return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
}

// Facts asks the server about itself.
func (s *Server) Facts(ctx context.Context) (Facts, error) {
	var f Facts
	var log sql.NullString
	err := s.db.QueryRowContext(ctx, "SELECT @@version, @@datadir, @@plugin_dir, @@log_error, @@log_bin").
		Scan(&f.Version, &f.DataDir, &f.PluginDir, &log, &f.Binlog)
	f.ErrorLog = log.String
	return f, err
}

// soname is what may follow INSTALL SONAME: a bare file name, so that neither
// quoting nor a path can go wrong.
var soname = regexp.MustCompile(`^[A-Za-z0-9_]{1,60}(\.so)?$`)

// A PluginState says what stands in the server's one place for an encryption
// plugin.
type PluginState struct {
	Loaded bool   // ours is active
	Other  string // name of another encryption plugin, empty: none
}

// Plugin looks for the encryption plugin of the file named library.
func (s *Server) Plugin(ctx context.Context, library string) (PluginState, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT PLUGIN_NAME, PLUGIN_STATUS, COALESCE(PLUGIN_LIBRARY, '')
		FROM information_schema.PLUGINS WHERE PLUGIN_TYPE = 'ENCRYPTION'`)
	if err != nil {
		return PluginState{}, classify(err)
	}
	defer rows.Close()
	var st PluginState
	for rows.Next() {
		var name, status, lib string
		if err := rows.Scan(&name, &status, &lib); err != nil {
			return PluginState{}, err
		}
		if status != "ACTIVE" {
			continue
		}
		if strings.TrimSuffix(lib, ".so") == strings.TrimSuffix(library, ".so") {
			st.Loaded = true
		} else {
			st.Other = name
		}
	}
	return st, rows.Err()
}

// Install loads the plugin from its file in the server's plugin directory. It
// does nothing when it is loaded. dek.ErrExists: another encryption plugin is
// in its place; dek.ErrPrecondition: the server can't load it, its error log
// says why.
func (s *Server) Install(ctx context.Context, library string) (installed bool, err error) {
	if !soname.MatchString(library) {
		return false, fmt.Errorf("%w: plugin file %q: give its bare name, such as %s", dek.ErrInvalid, library, DefaultPluginFile)
	}
	st, err := s.Plugin(ctx, library)
	switch {
	case err != nil:
		return false, err
	case st.Other != "":
		return false, fmt.Errorf("%w: the server uses the encryption plugin %s, and can't have two", dek.ErrExists, st.Other)
	case st.Loaded:
		return false, nil
	}
	if _, err := s.db.ExecContext(ctx, "INSTALL SONAME '"+library+"'"); err != nil {
		return false, fmt.Errorf("%w: the server did not load %s: %w", dek.ErrPrecondition, library, err)
	}
	return true, nil
}

// Variable returns a global variable, and false if the server has none of
// that name.
func (s *Server) Variable(ctx context.Context, name string) (string, bool, error) {
	var v sql.NullString
	err := s.db.QueryRowContext(ctx,
		"SELECT GLOBAL_VALUE FROM information_schema.SYSTEM_VARIABLES WHERE VARIABLE_NAME = ?", name).Scan(&v)
	if errors.Is(err, sql.ErrNoRows) {
		return "", false, nil
	}
	return v.String, err == nil, classify(err)
}
