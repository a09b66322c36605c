package mariadb_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// within runs f and complains if it takes longer than limit.
func within(t *testing.T, what string, limit time.Duration, f func()) {
	t.Helper()
	begin := time.Now()
	f()
	if took := time.Since(begin); took > limit {
		t.Errorf("%s took %v, want at most %v", what, took, limit)
	}
}

// hangAgent puts a socket in the agent's place that takes connections and
// never answers.
func (r *rig) hangAgent() {
	r.t.Helper()
	r.agent.Stop()
	os.Remove(r.agent.Path())
	l, err := net.Listen("unix", r.agent.Path())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { l.Close() })
	eventually(r.t, "disconnected", 5*time.Second, func() bool { return r.status("Keyward_connected") == "OFF" })
}

// TestUnknownKeyIDWhileHanging: the server asks for the newest version of a key
// id that was never there, under its own locks: it never waits for the agent.
func TestUnknownKeyIDWhileHanging(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--keyward-timeout=4")
	r.exec("CREATE DATABASE d")
	r.hangAgent()
	within(t, "refusing key id 99", 2*time.Second, func() {
		if _, err := r.DB().ExecContext(t.Context(), "CREATE TABLE d.t99 (id INT) ENCRYPTION_KEY_ID=99"); err == nil {
			t.Error("a table with an unknown key id was made")
		}
	})
}

// TestRefreshBlocksNobody: a forced refresh of a hanging agent takes the time
// of its own connection alone; new connections and variables go on.
func TestRefreshBlocksNobody(t *testing.T) {
	for _, q := range []string{"SET GLOBAL keyward_refresh = 1", "FLUSH KEYWARD_KEYS"} {
		t.Run(q, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, "--keyward-timeout=4")
			before := r.status("Keyward_agent_connects")
			r.agent.SetFault(func(mariadbtest.Request) mariadbtest.Fault { return mariadbtest.Fault{Hang: true} })
			done := make(chan error, 1)
			go func() {
				_, err := r.DB().Exec(q)
				done <- err
			}()
			eventually(t, "refresh under way", 3*time.Second, func() bool { return r.status("Keyward_agent_connects") > before })
			within(t, "beside the refresh", 2*time.Second, func() {
				db, err := r.Open("root", "")
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				for _, other := range []string{"SET GLOBAL keyward_revoke_grace = 1", "SHOW GLOBAL VARIABLES", "SHOW GLOBAL STATUS", "SET GLOBAL sort_buffer_size = 300000"} {
					if _, err := db.Exec(other); err != nil {
						t.Errorf("%s: %v", other, err)
					}
				}
			})
			if len(done) != 0 {
				t.Error("the refresh of a hanging agent had ended by then")
			}
			if err := <-done; err == nil || !strings.Contains(err.Error(), "no answer in time") {
				t.Errorf("refresh: %v", err)
			}
		})
	}
}

// TestRefreshIsBounded: many keys that an agent refuses slowly do not add up.
func TestRefreshIsBounded(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for id := uint32(100); id < 140; id++ {
		r.agent.Add(id, fmt.Sprintf("orders/k%d", id))
	}
	eventually(t, "key ids", 5*time.Second, func() bool { return r.status("Keyward_keys_held") == "43" })
	r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
		if q.Op != mariadbtest.OpGet {
			return mariadbtest.Fault{}
		}
		return mariadbtest.Fault{Delay: 200 * time.Millisecond, Class: mariadbtest.ClassUnavailable, Text: "KMS away"}
	})
	for id := uint32(100); id < 140; id++ {
		r.agent.Roll(id)
	}
	within(t, "FLUSH KEYWARD_KEYS", 2*time.Second, func() {
		if _, err := r.DB().ExecContext(t.Context(), "FLUSH KEYWARD_KEYS"); err == nil || !strings.Contains(err.Error(), "keys are still to come") {
			t.Errorf("FLUSH KEYWARD_KEYS: %v", err)
		}
	})
	r.agent.SetFault(nil)
	eventually(t, "the rolls", 10*time.Second, func() bool { return r.status("Keyward_keys_held") == "83" })
}

// TestFlappingAgent: an agent that breaks off each session soon does not fill
// the error log.
func TestFlappingAgent(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault {
		return mariadbtest.Fault{Close: q.Op == mariadbtest.OpWait}
	})
	eventually(t, "sessions", 20*time.Second, func() bool { return r.agent.Count(mariadbtest.Request{Op: mariadbtest.OpWait}) > 60 })
	if n := strings.Count(r.ErrorLog(), "closed by the agent"); n == 0 || n > 3 {
		t.Errorf("%d lines in the error log", n)
	}
}

// TestShutdownWhileFetching: while a key that is not held is being waited for,
// everything with held keys goes on, and a shutdown ends the wait in time.
func TestShutdownWhileFetching(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--innodb-encryption-threads=0", "--keyward-timeout=4")
	r.fill("t1", "")
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	r.stopClean()
	r.agent.Roll(7)
	r.agent.Hide(7, 1)
	missing := mariadbtest.Request{Op: mariadbtest.OpGet, KeyID: 7, Version: 1}
	r.agent.SetFault(func(q mariadbtest.Request) mariadbtest.Fault { return mariadbtest.Fault{Hang: q == missing} })
	asked := r.agent.Count(missing) // when it was listed
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.query("SELECT COUNT(*) FROM d.t1") // InnoDB opens one table after the other
	read := make(chan error, 1)
	go func() {
		_, err := r.DB().Exec("SELECT * FROM d.t7")
		read <- err
	}()
	eventually(t, "request", 3*time.Second, func() bool { return r.agent.Count(missing) > asked })
	for _, q := range []string{"FLUSH BINARY LOGS", "CREATE TABLE d.a (a INT) ENGINE=Aria", "INSERT INTO d.t1 VALUES (-1, '')", "SELECT COUNT(*) FROM d.t1"} {
		within(t, q, 2*time.Second, func() { r.exec(q) })
	}
	within(t, "shutdown", 10*time.Second, r.stopClean)
	if err := <-read; err == nil {
		t.Error("a table without its key was read")
	}
}
