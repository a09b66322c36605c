package mariadb_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// keyLine is a line of file_key_management's key file.
func keyLine(id uint32, key []byte) string { return fmt.Sprintf("%d;%s", id, hex.EncodeToString(key)) }

func denyAll(a *mariadbtest.Agent) {
	for _, id := range []uint32{1, 2, 7} {
		a.SetState(id, mariadbtest.StateDenied)
	}
}

func allowAll(a *mariadbtest.Agent) {
	for _, id := range []uint32{1, 2, 7} {
		a.SetState(id, mariadbtest.StateActive)
	}
}

// TestDenied: access taken away while the server runs. It neither aborts nor
// loses its binlog, announces nothing new, cannot be restarted, and is well
// again without a restart when access is back.
func TestDenied(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t1", "")
	r.fill("t7", "ENCRYPTION_KEY_ID=7")
	denyAll(r.agent)
	eventually(t, "denial", time.Second, func() bool { return r.key(1, "STATE") == "denied" })
	r.want("denied ids", r.status("Keyward_denied_key_ids"), "3")
	r.agent.Roll(1)
	r.agent.Roll(7)
	eventually(t, "refresh", 5*time.Second, func() bool {
		_, err := r.DB().ExecContext(t.Context(), "SET GLOBAL keyward_refresh = 1")
		return err == nil
	})
	r.want("latest", r.key(1, "LATEST_VERSION"), "1")
	for i, o := range operations {
		r.session(o.sql(i)...)
	}
	r.want("binlog", r.query("SELECT @@log_bin"), "1")
	if e := r.key(1, "LAST_ERROR"); !strings.Contains(e, "denied") {
		t.Errorf("last error %q", e)
	}
	allowAll(r.agent)
	eventually(t, "roll", time.Second, func() bool { return r.key(1, "LATEST_VERSION") == "3" && r.key(7, "STATE") == "active" })
	r.checkTable("t7")
	denyAll(r.agent)
	eventually(t, "denial", time.Second, func() bool { return r.key(7, "STATE") == "denied" })
	r.stopClean()
	if err := r.Start(t.Context()); !errors.Is(err, mariadbtest.ErrExited) {
		t.Fatalf("restart while denied: %v", err)
	}
	if !strings.Contains(r.ErrorLog(), mariadbtest.DeniedText("orders/system", 3)) {
		t.Error("the error log does not carry the agent's message")
	}
	allowAll(r.agent)
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkTable("t1")
	r.stopClean()
}

// TestInstanceRevoked: a restarted agent refuses the instance as a whole.
func TestInstanceRevoked(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.fill("t1", "")
	r.agent.Stop()
	r.agent.SetFault(func(mariadbtest.Request) mariadbtest.Fault {
		return mariadbtest.Fault{Class: mariadbtest.ClassDenied, Text: "instance orders: revoked"}
	})
	if err := r.agent.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "denial", 10*time.Second, func() bool { return r.key(1, "STATE") == "denied" })
	r.want("last error", r.key(1, "LAST_ERROR"), "instance orders: revoked")
	for i, o := range operations[:3] {
		r.session(o.sql(i)...)
	}
	r.agent.SetFault(nil)
	eventually(t, "recovery", 10*time.Second, func() bool { return r.key(1, "STATE") == "active" })
	r.stopClean()
}

// TestOnRevokeShutdown: with keyward_on_revoke=shutdown the server ends itself
// cleanly after the grace time, not before, and not because the agent is away.
func TestOnRevokeShutdown(t *testing.T) {
	t.Parallel()
	r := newRig(t, "--keyward-on-revoke=shutdown", "--keyward-revoke-grace=3600")
	r.fill("t1", "")
	r.agent.Stop()
	eventually(t, "disconnected", 5*time.Second, func() bool { return r.status("Keyward_connected") == "OFF" })
	if err := r.agent.Start(); err != nil {
		t.Fatal(err)
	}
	denyAll(r.agent)
	eventually(t, "denial", 10*time.Second, func() bool { return r.key(1, "STATE") == "denied" })
	r.checkTable("t1") // within the grace time
	r.exec("SET GLOBAL keyward_revoke_grace = 0.2")
	select {
	case <-r.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the server still runs")
	}
	if !strings.Contains(r.ErrorLog(), "keyward_on_revoke=shutdown") || !strings.Contains(r.ErrorLog(), "Shutdown complete") {
		t.Error("not a clean shutdown with its reason")
	}
	allowAll(r.agent)
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkTable("t1")
	r.stopClean()
}
