package mariadb_test

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/keyward/keyward/plugins/mariadb/mariadbtest"
)

// startAs starts the scripted agent on a socket of another account: the kernel
// tells those who connect who called listen.
func startAs(t *testing.T, a *mariadbtest.Agent, uid uintptr) {
	t.Helper()
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its account
		// of this thread alone, which setresuid(3) and package syscall are not
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); e != 0 {
			started <- e
			return
		}
		started <- a.Start()
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
}

// TestImpostor: a socket of a stranger, who could put it where the agent's
// belongs, gets no question and gives no key.
func TestImpostor(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as another account")
	}
	const nobody = 65534
	r, c := prepared(t)
	r.agent.Stop()
	if err := os.Chmod(r.dir, 0o777); err != nil { //nolint:gosec // the mistake that is tested
		t.Fatal(err)
	}
	startAs(t, r.agent, nobody)
	if err := r.tryStart(c); !errors.Is(err, mariadbtest.ErrExited) {
		t.Fatalf("start with an impostor: %v", err)
	}
	if !strings.Contains(r.ErrorLog(), "answered by account 65534") {
		t.Error("the error log does not tell")
	}
	if n := r.agent.Count(mariadbtest.Request{Op: mariadbtest.OpHello, Cold: true}); n != 0 {
		t.Errorf("%d HELLOs to an impostor", n)
	}
	// the agent's own account: it owns the directory, nobody else may write there
	if err := errors.Join(os.Chown(r.dir, nobody, nobody), os.Chmod(r.dir, 0o755)); err != nil { //nolint:gosec // as an agent's directory is
		t.Fatal(err)
	}
	if err := r.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.stopClean()
	// ... but a directory that others may write to proves nothing
	if err := os.Chmod(r.dir, 0o775); err != nil { //nolint:gosec // the mistake that is tested
		t.Fatal(err)
	}
	if err := r.Start(t.Context()); !errors.Is(err, mariadbtest.ErrExited) {
		t.Errorf("start with a socket in a directory of many: %v", err)
	}
}
