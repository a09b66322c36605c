package mariadb_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// faults are the ways in which an agent can fail to answer a request rightly.
var faults = map[string]mariadbtest.Fault{
	"denied":      {Class: mariadbtest.ClassDenied, Text: "no"},
	"unavailable": {Class: mariadbtest.ClassUnavailable, Text: "KMS away"},
	"not found":   {Class: mariadbtest.ClassNotFound, Text: "gone"},
	"slow":        {Delay: 200 * time.Millisecond},
	"hang":        {Hang: true},
	"closed":      {Close: true},
	"truncated":   {Mutate: func(b []byte) []byte { return b[:len(b)-3] }},
	"oversized": {Mutate: func(b []byte) []byte {
		binary.BigEndian.PutUint32(b, 1<<24)
		return b
	}},
	"undersized": {Mutate: func(b []byte) []byte {
		binary.BigEndian.PutUint32(b, 4)
		return b
	}},
	"wrong sequence": {Mutate: func(b []byte) []byte { b[8]++; return b }},
	"wrong op":       {Mutate: func(b []byte) []byte { b[4] = 0x84; return b }},
	"garbage": {Mutate: func(b []byte) []byte {
		for i := range b {
			b[i] = byte(i*37 + 11)
		}
		return b
	}},
	"trailing byte": {Mutate: func(b []byte) []byte {
		binary.BigEndian.PutUint32(b, binary.BigEndian.Uint32(b)+1)
		return append(b, 0)
	}},
}

// operations are what makes the server ask for keys. Each may be run many
// times; n is unique.
var operations = []struct {
	name string
	sql  func(n int) []string
}{
	{"binlog rotation", func(int) []string { return []string{"FLUSH BINARY LOGS"} }},
	{"aria table", func(n int) []string {
		return []string{fmt.Sprintf("CREATE TABLE d.a%d ENGINE=Aria SELECT * FROM d.t1", n), fmt.Sprintf("FLUSH TABLE d.a%d", n), fmt.Sprintf("DROP TABLE d.a%d", n)}
	}},
	{"temporary tables", func(n int) []string {
		return []string{fmt.Sprintf("CREATE TEMPORARY TABLE d.x%d ENGINE=InnoDB SELECT * FROM d.t1", n),
			fmt.Sprintf("SELECT COUNT(*) FROM d.x%d", n), fmt.Sprintf("DROP TEMPORARY TABLE d.x%d", n),
			"SET STATEMENT sort_buffer_size=65536, tmp_memory_table_size=0 FOR SELECT COUNT(*) FROM (SELECT DISTINCT v, id FROM d.t1 ORDER BY v DESC) y"}
	}},
	{"page flush", func(n int) []string {
		return []string{fmt.Sprintf("UPDATE d.t1 SET v = CONCAT(v, %d) WHERE id %% 7 = 0", n%10),
			"UPDATE d.t7 SET v = CONCAT(LEFT(v, 300), 'x')", "FLUSH TABLES d.t1, d.t7 FOR EXPORT", "UNLOCK TABLES"}
	}},
	{"new tablespace", func(n int) []string {
		return []string{fmt.Sprintf("CREATE TABLE d.n%d (id INT PRIMARY KEY) ENCRYPTION_KEY_ID=7", n),
			fmt.Sprintf("INSERT INTO d.n%d SELECT seq FROM d.seq_1_to_100", n), fmt.Sprintf("FLUSH TABLES d.n%d FOR EXPORT", n), "UNLOCK TABLES", fmt.Sprintf("DROP TABLE d.n%d", n)}
	}},
}

// session runs queries on one connection: temporary tables and locks are its
// own.
func (r *rig) session(queries ...string) {
	r.t.Helper()
	conn, err := r.DB().Conn(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	for _, q := range queries {
		if _, err := conn.ExecContext(r.t.Context(), q); err != nil {
			r.t.Fatalf("%s: %v", q, err)
		}
	}
}

// TestFaultMatrix lets get_latest's source (LIST) and get_key's source (GET)
// fail separately, in every way, right after a roll, and then does everything
// that needs keys. Nothing may fail, the binlog stays on, and when the agent
// is well again the roll is seen.
func TestFaultMatrix(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t1", "")
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	pid, n := r.PID(), 0
	ops := map[string]byte{"LIST": mariadbtest.OpList, "GET": mariadbtest.OpGet}
	for source, op := range ops {
		for name, fault := range faults {
			r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
				if q.Op == op {
					return fault
				}
				return mariadbtest.Fault{}
			})
			asked := mariadbtest.Request{Op: op}
			version := r.agent.Roll(1)
			r.agent.Roll(7)
			if op == mariadbtest.OpGet {
				asked.KeyID, asked.Version = 1, version
			}
			eventually(t, "request", 10*time.Second, func() bool { return r.agent.Count(asked) > 0 })
			for _, o := range operations {
				n++
				r.session(o.sql(n)...)
			}
			r.want(source+" "+name+": binlog", r.query("SELECT @@log_bin"), "1")
			r.agent.SetFault(nil)
			want := fmt.Sprint(version)
			eventually(t, source+" "+name+": roll", 10*time.Second, func() bool { return r.key(1, "LATEST_VERSION") == want && r.key(7, "LATEST_VERSION") == want })
		}
	}
	r.exec("FLUSH BINARY LOGS", "DELETE FROM d.t7 WHERE id = 1")
	r.want("binlog events", r.query("SELECT COUNT(*) > 0 FROM d.t7"), "1")
	if r.PID() != pid {
		t.Error("the server was restarted")
	}
	r.want("failed get_key calls", r.status("Keyward_key_failures"), "0")
	r.stopClean()
	if strings.Contains(r.ErrorLog(), "[ERROR] InnoDB") || strings.Contains(r.ErrorLog(), "Turning logging off") {
		t.Error("errors in the log")
	}
}

// TestMissingVersion: the agent does not list a version that a table needs and
// refuses it. The table is unreadable, the server lives, nothing hangs; after a
// restart with the version back the table is read. Without re-encryption: two
// threads that read the same page without its key make InnoDB 10.11.19 abort
// (fil0crypt.cc, "end_lsn > state->end_lsn"), which is why a start without a
// listed version is refused.
func TestMissingVersion(t *testing.T) {
	for name, fault := range faults {
		if name == "slow" {
			continue // answers in the end
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "--innodb-encryption-threads=0")
			r.fill("t1", "")
			r.fill("t7", "ENCRYPTION_KEY_ID=7")
			r.stopClean()
			r.agent.Roll(7)
			r.agent.Hide(7, 1)
			r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
				if q == (mariadbtest.Request{Op: mariadbtest.OpGet, KeyID: 7, Version: 1}) {
					return fault
				}
				return mariadbtest.Fault{}
			})
			if err := r.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			if _, err := r.DB().ExecContext(t.Context(), "SELECT * FROM d.t7"); err == nil {
				t.Error("a table without its key was read")
			}
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("that took %v", took)
			}
			r.checkTable("t1")
			r.exec("FLUSH BINARY LOGS")
			if !strings.Contains(r.ErrorLog(), "key id 7 version 1") {
				t.Error("the error log does not name the version")
			}
			r.agent.SetFault(nil)
			r.stopClean()
			if err := r.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.checkTable("t7")
		})
	}
}

// TestAgentKilledUnderLoad kills, restarts and hangs the agent while four
// clients write: no statement may fail.
func TestAgentKilledUnderLoad(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t1", "")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var done atomic.Int64
	failed := make(chan error, 4)
	for w := range 4 {
		go func() {
			failed <- func() error {
				for i := 0; ctx.Err() == nil; i++ {
					q := fmt.Sprintf("REPLACE INTO d.t1 VALUES (%d, REPEAT('%s', 20))", 100000+w*1000+i%500, canary)
					if i%50 == 0 {
						q = "FLUSH BINARY LOGS"
					}
					if _, err := r.DB().Exec(q); err != nil {
						return fmt.Errorf("%s: %w", q, err)
					}
					done.Add(1)
				}
				return nil
			}()
		}()
	}
	for i := range 20 {
		before := done.Load()
		r.agent.Stop()
		eventually(t, "writes without agent", 10*time.Second, func() bool { return done.Load() > before+40 })
		if err := r.agent.Start(); err != nil {
			t.Fatal(err)
		}
		if i%4 == 0 {
			r.agent.SetFault(func(mariadbtest.Request) mariadbtest.Fault { return mariadbtest.Fault{Hang: true} })
			r.agent.Roll(1)
			eventually(t, "writes with a hung agent", 10*time.Second, func() bool { return done.Load() > before+80 })
			r.agent.SetFault(nil)
		}
	}
	cancel()
	for range 4 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d statements", done.Load())
	version := fmt.Sprint(r.agent.Roll(1))
	eventually(t, "roll after all that", 10*time.Second, func() bool { return r.key(1, "LATEST_VERSION") == version })
	r.want("connected", r.status("Keyward_connected"), "ON")
	r.stopClean()
}

// TestStatusWithoutAgent: age and error are shown while the agent is away.
func TestStatusWithoutAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.agent.Stop()
	eventually(t, "disconnected", 5*time.Second, func() bool { return r.status("Keyward_connected") == "OFF" })
	r.want("state", r.key(1, "STATE"), "unreachable")
	eventually(t, "age", 5*time.Second, func() bool { return r.status("Keyward_refresh_age") != "0" })
	if e := r.key(7, "LAST_ERROR"); !strings.Contains(e, r.agent.Path()) {
		t.Errorf("last error %q does not name the socket", e)
	}
	for _, q := range []string{"FLUSH KEYWARD_KEYS", "SET GLOBAL keyward_refresh=1"} {
		begin := time.Now()
		if _, err := r.DB().Exec(q); err == nil {
			t.Errorf("%s succeeds without agent", q)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("%s took %v", q, took)
		}
	}
	if err := r.agent.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "connected again", 10*time.Second, func() bool { return r.status("Keyward_connected") == "ON" })
	r.want("state", r.key(1, "STATE"), "active")
	r.agent.SetState(1, mariadbtest.StateStale)
	eventually(t, "stale", time.Second, func() bool { return r.key(1, "STATE") == "stale" })
}
