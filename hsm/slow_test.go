package hsm_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// A slow device is not a hung one: the deadline is that of one call, however
// many stand before it in the child.
func TestSlowDevice(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, func(c *hsm.Config) { c.Deadline = time.Second; c.Workers = 1 })
	f.shim.Set(hsmtest.SlowDecrypt, 200)
	var wg sync.WaitGroup
	for range 8 { // the last one is answered after 1.6 s
		wg.Go(func() {
			if err := f.decrypt(t); err != nil {
				t.Errorf("decrypt: %v", err)
			}
		})
	}
	wg.Wait()
	if n := f.shim.Get(hsmtest.Inits); n != 1 {
		t.Errorf("%d starts, want 1", n)
	}
}

// Making a key takes its time; whoever asks for something else meanwhile waits
// and does not end it.
func TestAdminBehindGenerate(t *testing.T) {
	t.Parallel()
	f := openFaulty(t, func(c *hsm.Config) { c.Deadline = time.Second; c.GenerateDeadline = 20 * time.Second })
	f.shim.Set(hsmtest.SlowGenerate, 2000)
	id := hsmtest.NewID()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := f.GeneratePair(t.Context(), id, 2048); err != nil {
			t.Errorf("generate: %v", err)
		}
	})
	for range 3 {
		wg.Go(func() {
			if _, err := f.Objects(t.Context()); err != nil {
				t.Errorf("objects: %v", err)
			}
		})
	}
	wg.Wait()
	if n := f.shim.Get(hsmtest.Inits); n != 1 {
		t.Errorf("%d starts, want 1", n)
	}
}

// A module may start a daemon that outlives the child with its descriptors:
// neither the child's death nor Close may wait for it.
func TestModuleLeavesDaemon(t *testing.T) {
	t.Parallel()
	pids := filepath.Join(t.TempDir(), "pids")
	t.Cleanup(func() {
		b, err := os.ReadFile(pids)
		if err != nil {
			t.Error(err)
		}
		for _, line := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(line); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	f := openFaulty(t, func(c *hsm.Config) {
		c.Deadline = 10 * time.Second
		c.Child = append([]string{"/bin/sh", "-c", `sleep 300 & echo $! >>"$0"; exec "$@"`, pids}, c.Child...)
	})
	f.shim.Set(hsmtest.DieCount, 1)
	begin := time.Now()
	wantClass(t, "crash", f.decrypt(t), dek.ErrUnavailable)
	f.recovers(t, 5*time.Second)
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(begin); d > 9*time.Second {
		t.Errorf("took %v", d)
	}
}
