package mariadb_test

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// canary is in every row: no file may hold it in clear.
const canary = "PAYROLL-4711-CANARY"

// template is a data directory and the plugin, made once for all tests.
var template = sync.OnceValues(func() (out struct{ dir, plugin string }, err error) {
	// go test remembers a result until a file that was read changes: make's
	// reading does not count
	for _, pattern := range []string{"src/*", "test/*", "Makefile"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			return out, err
		}
		for _, f := range files {
			if _, err := os.ReadFile(f); err != nil {
				return out, err
			}
		}
	}
	ctx := context.Background()
	if out.plugin, err = mariadbtest.BuildPlugin(ctx, ".", "all"); err != nil {
		return out, err
	}
	if out.dir, err = os.MkdirTemp("", "kwtemplate"); err != nil {
		return out, err
	}
	return out, mariadbtest.InstallDB(ctx, filepath.Join(out.dir, "data"))
})

func TestMain(m *testing.M) {
	code := m.Run()
	if t, _ := template(); t.dir != "" {
		os.RemoveAll(t.dir)
	}
	os.Exit(code)
}

// A rig is one scripted agent and one server that uses it.
type rig struct {
	*mariadbtest.Server
	t     *testing.T
	dir   string
	agent *mariadbtest.Agent
}

// newDir is a directory whose path is short enough for sockets.
func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newAgent(t *testing.T, dir string) *mariadbtest.Agent {
	t.Helper()
	a := mariadbtest.NewAgent(filepath.Join(dir, "agent.sock"))
	a.Add(1, "orders/system")
	a.Add(2, "orders/temporary")
	a.Add(7, "orders/payroll")
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Stop)
	return a
}

// prepared is a rig whose server does not run yet; start it with tryStart.
func prepared(t *testing.T, args ...string) (*rig, mariadbtest.Config) {
	t.Helper()
	made, err := template()
	if errors.Is(err, mariadbtest.ErrMissing) && os.Getenv("KEYWARD_REQUIRE_INTEGRATION") != "1" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: newDir(t)}
	r.agent = newAgent(t, r.dir)
	all := append(mariadbtest.EncryptionArgs(r.agent.Path()), "--log-bin=binlog", "--sync-binlog=0",
		"--innodb-flush-log-at-trx-commit=2", "--keyward-timeout=0.3", "--keyward-start-timeout=1")
	return r, mariadbtest.Config{Dir: filepath.Join(r.dir, "s"), Template: filepath.Join(made.dir, "data"),
		Plugins: []string{made.plugin}, Args: append(all, args...)}
}

// tryStart starts the server and returns Start's error.
func (r *rig) tryStart(c mariadbtest.Config) error {
	r.t.Helper()
	s, err := mariadbtest.Start(r.t.Context(), c)
	if s == nil {
		r.t.Fatal(err)
	}
	r.Server = s
	r.t.Cleanup(func() {
		s.Kill()
		if r.t.Failed() {
			r.t.Log("error log:\n", s.ErrorLog())
		}
	})
	return err
}

func newRig(t *testing.T, args ...string) *rig {
	t.Helper()
	r, c := prepared(t, args...)
	if err := r.tryStart(c); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) exec(queries ...string) {
	r.t.Helper()
	for _, q := range queries {
		if _, err := r.DB().ExecContext(r.t.Context(), q); err != nil {
			r.t.Fatalf("%s: %v", q, err)
		}
	}
}

// query returns the first column of the first row, "" for NULL or no row.
func (r *rig) query(q string, args ...any) string {
	r.t.Helper()
	rows, err := r.DB().QueryContext(r.t.Context(), q, args...)
	if err != nil {
		r.t.Fatalf("%s: %v", q, err)
	}
	defer rows.Close()
	var s sql.NullString
	if rows.Next() {
		if err := rows.Scan(&s); err != nil {
			r.t.Fatalf("%s: %v", q, err)
		}
	}
	return s.String
}

func (r *rig) status(name string) string {
	r.t.Helper()
	return r.query("SELECT variable_value FROM information_schema.global_status WHERE variable_name = ?", name)
}

// key returns a column of KEYWARD_KEYS.
func (r *rig) key(id int, column string) string {
	r.t.Helper()
	return r.query("SELECT "+column+" FROM information_schema.KEYWARD_KEYS WHERE key_id = ?", id)
}

func (r *rig) want(what, got, want string) {
	r.t.Helper()
	if got != want {
		r.t.Errorf("%s = %q, want %q", what, got, want)
	}
}

// fill makes a table with the canary in rows and returns how many.
func (r *rig) fill(table, options string) {
	r.t.Helper()
	r.exec("CREATE DATABASE IF NOT EXISTS d",
		"CREATE TABLE d."+table+" (id INT PRIMARY KEY, v VARCHAR(500)) "+options,
		"INSERT INTO d."+table+" SELECT seq, CONCAT('"+canary+"', REPEAT(seq, 60)) FROM d.seq_1_to_1000")
}

func (r *rig) checkTable(table string) {
	r.t.Helper()
	rows := r.query("SELECT COUNT(*) FROM d."+table+" WHERE v LIKE CONCAT(?, '%')", canary)
	var a, b, c, verdict string
	if err := r.DB().QueryRowContext(r.t.Context(), "CHECK TABLE d."+table+" EXTENDED").Scan(&a, &b, &c, &verdict); err != nil {
		r.t.Fatal(err)
	}
	if rows != "1000" || verdict != "OK" {
		r.t.Errorf("%s: %s rows, CHECK TABLE %s", table, rows, verdict)
	}
}

// stopClean stops the server and expects exit status 0.
func (r *rig) stopClean() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	if err := r.Stop(ctx); err != nil {
		r.t.Fatalf("shutdown: %v", err)
	}
}

// eventually polls until ok, and returns how long it took.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(begin) > limit {
			t.Fatalf("%s: not within %v", what, limit)
		}
		<-tick.C
	}
	return time.Since(begin)
}

// files calls f with every file under the data directory.
func (r *rig) files(f func(path string, b []byte)) {
	r.t.Helper()
	err := filepath.Walk(r.DataDir(), func(p string, st os.FileInfo, err error) error {
		if err != nil || !st.Mode().IsRegular() {
			return nil // a file that the server removed meanwhile
		}
		b, err := os.ReadFile(p)
		if err == nil {
			f(p, b)
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// pageVersions counts the encrypted InnoDB pages on disk by key version, of
// files whose path contains part.
func (r *rig) pageVersions(part string) map[uint32]int {
	const page, keyVersion = 16384, 0 // FIL_PAGE_FCRC32_KEY_VERSION
	n := map[uint32]int{}
	r.files(func(p string, b []byte) {
		if !strings.HasSuffix(p, ".ibd") || !strings.Contains(p, part) {
			return
		}
		for at := page; at+page <= len(b); at += page {
			if v := binary.BigEndian.Uint32(b[at+keyVersion:]); v != 0 {
				n[v]++
			}
		}
	})
	return n
}
