//go:build linux && (amd64 || arm64 || riscv64)

package dek_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
)

const limitEnv = "KEYWARD_TEST_MEMLOCK"

// TestMemoryLimit runs a child that may lock 32 KiB: keys work up to the limit
// and end with the error that names the remedy; destroyed ones make room.
func TestMemoryLimit(t *testing.T) {
	if os.Getenv(limitEnv) != "" {
		fmt.Println(limitedChild())
		os.Exit(0)
	}
	self, err := os.Executable()
	check(t, err)
	cmd := exec.Command(self, "-test.run=^TestMemoryLimit$")
	cmd.Env = append(os.Environ(), limitEnv+"=1")
	out, err := cmd.CombinedOutput()
	check(t, err)
	if got := strings.TrimSpace(string(out)); got != "ok: 1024 keys" {
		t.Errorf("child says %s", got)
	}
}

func limitedChild() string {
	limit := unix.Rlimit{Cur: 32 << 10, Max: 32 << 10}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err.Error()
	}
	if os.Geteuid() == 0 { // root may lock what it likes
		if err := syscall.Setresuid(65534, 65534, 65534); err != nil {
			return err.Error()
		}
	}
	var held []*dek.Key
	var err error
	for len(held) <= 5000 {
		var k *dek.Key
		if k, err = dek.NewKey(); err != nil {
			break
		}
		held = append(held, k)
	}
	if !errors.Is(err, dek.ErrExhausted) || !strings.Contains(err.Error(), "LimitMEMLOCK=") {
		return fmt.Sprintf("%d keys, then %v", len(held), err)
	}
	held[0].Destroy()
	if _, err := dek.NewKey(); err != nil {
		return "destroyed key made no room: " + err.Error()
	}
	return fmt.Sprintf("ok: %d keys", len(held))
}
