package mariadb_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// TestNothingInClear looks for the canary in every file of a server that wrote
// it to tables of three engines, to its binlog and to its redo log, and in the
// same files of a server without encryption, where the search must find it.
func TestNothingInClear(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	write := func(r *rig) (found int) {
		r.fill("i", "ENGINE=InnoDB")
		r.fill("a", "ENGINE=Aria")
		r.exec("FLUSH TABLES", "FLUSH BINARY LOGS", "SET GLOBAL innodb_max_dirty_pages_pct = 0")
		r.stopClean()
		r.files(func(_ string, b []byte) {
			if bytes.Contains(b, []byte(canary)) {
				found++
			}
		})
		return found
	}
	if n := write(r); n != 0 {
		t.Errorf("the canary is in %d files of the encrypted server", n)
	}
	r.files(func(path string, b []byte) {
		for _, id := range []uint32{1, 2, 7} {
			if bytes.Contains(b, r.agent.Key(id, 1)) {
				t.Errorf("key %d is in %s", id, path)
			}
		}
	})
	plain, c := prepared(t)
	c.Args = []string{"--log-bin=binlog"}
	if err := plain.tryStart(c); err != nil {
		t.Fatal(err)
	}
	if n := write(plain); n < 3 {
		t.Errorf("the canary is in %d files of the plain server: the search does not work", n)
	}
}

// TestRollOnIdleServer rolls twice without any statement to the server:
// announced within a second, every page on disk re-encrypted, old versions
// still held.
func TestRollOnIdleServer(t *testing.T) {
	r := newRig(t)
	r.fill("t1", "")
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	r.exec("FLUSH TABLES d.t1, d.t7 FOR EXPORT", "UNLOCK TABLES")
	if n := r.pageVersions("/d/"); n[1] == 0 || len(n) != 1 {
		t.Fatalf("pages by key version before: %v", n)
	}
	for _, version := range []uint32{3, 5} {
		r.agent.Roll(1)
		r.agent.Roll(7)
		took := eventually(t, "re-encryption", 20*time.Second, func() bool {
			n := r.pageVersions("/d/")
			return len(n) == 1 && n[version] > 0
		})
		t.Logf("version %d on every page after %v", version, took)
	}
	r.want("versions of 1", r.key(1, "VERSIONS"), "1,3,5")
	r.want("versions held", r.key(7, "VERSIONS_HELD"), "3")
	r.want("rolls", r.status("Keyward_rolls"), "4")
	behind := r.query("SELECT GROUP_CONCAT(name, ' ', min_key_version) FROM information_schema.innodb_tablespaces_encryption WHERE min_key_version < 5 AND encryption_scheme = 1")
	r.want("tablespaces behind", behind, "")
	r.checkTable("t1")
	r.checkTable("t7")
	r.stopClean()
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkTable("t1")
	r.checkTable("t7")
	r.stopClean()
}

// TestRollIsSeen measures the time from a roll to its announcement, and that a
// client can force it.
func TestRollIsSeen(t *testing.T) {
	r := newRig(t)
	r.agent.Roll(7)
	took := eventually(t, "announcement", time.Second, func() bool { return r.key(7, "LATEST_VERSION") == "3" })
	t.Logf("seen after %v", took)
	// without WAIT, by the two ways to ask for it
	for i, q := range []string{"FLUSH KEYWARD_KEYS", "SET GLOBAL keyward_refresh = 1"} {
		r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
			return mariadbtest.Fault{Hang: q.Op == mariadbtest.OpWait}
		})
		r.agent.Roll(7)
		r.exec(q)
		r.want(q, r.key(7, "LATEST_VERSION"), []string{"5", "7"}[i])
	}
	r.want("keyward_refresh", r.query("SELECT @@keyward_refresh"), "0")
	if _, err := r.DB().Exec("SET GLOBAL keyward_socket = '/x'"); err == nil {
		t.Error("keyward_socket can be changed at run time")
	}
}

// TestNewKeyID makes a keyring while the server runs.
func TestNewKeyID(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.exec("CREATE DATABASE d")
	if _, err := r.DB().Exec("CREATE TABLE d.t9 (id INT) ENCRYPTION_KEY_ID=9"); err == nil {
		t.Error("a table with an unknown key id was made")
	}
	r.agent.Add(9, "orders/new")
	r.agent.Add(70000, "orders/large")
	eventually(t, "key id 70000", time.Second, func() bool { return r.key(70000, "STATE") == "active" })
	r.fill("t9", "ENCRYPTION_KEY_ID=9")
	r.fill("t70000", "ENCRYPTION_KEY_ID=70000")
	r.checkTable("t9")
	r.checkTable("t70000")
}

// TestReport: what the server asked for reaches the agent.
func TestReport(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	r.exec("FLUSH TABLES d.t7 FOR EXPORT", "UNLOCK TABLES") // pages are written
	r.agent.Roll(7)                                         // ends the WAIT
	eventually(t, "report", 5*time.Second, func() bool {
		seen := map[mariadbtest.Use]bool{}
		for _, u := range r.agent.Uses() {
			seen[u] = true
		}
		return seen[mariadbtest.Use{KeyID: 1, Version: 1}] && seen[mariadbtest.Use{KeyID: 7, Version: 1}]
	})
}

// TestPrivilege: the table shows nothing to an account without PROCESS, and
// FLUSH needs RELOAD.
func TestPrivilege(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.exec("CREATE USER u@localhost IDENTIFIED BY 'u'")
	u, err := r.Open("u", "u")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	var rows int
	if err := u.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM information_schema.KEYWARD_KEYS").Scan(&rows); err != nil || rows != 0 {
		t.Errorf("a stranger sees %d rows, %v", rows, err)
	}
	if _, err := u.ExecContext(t.Context(), "FLUSH KEYWARD_KEYS"); err == nil {
		t.Error("a stranger may flush")
	}
	r.want("rows of root", r.query("SELECT COUNT(*) FROM information_schema.KEYWARD_KEYS"), "3")
}

// TestRollUnderTemporaryTables rolls while temporary tables that do not fit the
// buffer pool are in use (MDEV-34372: they were lost in some releases).
func TestRollUnderTemporaryTables(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--innodb-buffer-pool-size=6M")
	r.fill("t1", "")
	queries := []string{"CREATE TEMPORARY TABLE d.x (id INT PRIMARY KEY, v VARCHAR(500)) ENGINE=InnoDB",
		"INSERT INTO d.x SELECT seq, CONCAT('" + canary + "', REPEAT(seq, 60)) FROM d.seq_1_to_30000"}
	check := "SELECT IF(COUNT(*) = 30000, 1, (SELECT 1 UNION SELECT 2)) FROM d.x WHERE v LIKE '" + canary + "%'" // fails unless all are there
	conn, err := r.DB().Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 3 {
		for _, q := range append(queries, check) {
			if _, err := conn.ExecContext(t.Context(), q); err != nil {
				t.Fatalf("%s: %v", q, err)
			}
		}
		queries = []string{"UPDATE d.x SET v = CONCAT(v, 'x') WHERE id % 3 = 0"}
		want := fmt.Sprint(r.agent.Roll(1))
		eventually(t, "roll", 5*time.Second, func() bool { return r.key(1, "LATEST_VERSION") == want })
	}
}
