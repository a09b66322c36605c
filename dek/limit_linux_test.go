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
	out, err := cmd.Output()
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
	if msg := fullArena(held); msg != "" {
		return msg
	}
	return fmt.Sprintf("ok: %d keys", len(held))
}

// fullArena tries what needs memory while there is none, and then with room.
func fullArena(held []*dek.Key) string {
	k, from := held[0], secretBytes()
	calls := map[string]func() error{
		"KeyFrom": func() error { _, err := dek.KeyFrom(from); return err },
		"Clone":   func() error { _, err := k.Clone(); return err },
		"Seal":    func() error { _, err := k.Seal(place(), nil); return err },
	}
	for name, f := range calls {
		if err := f(); !errors.Is(err, dek.ErrExhausted) {
			return fmt.Sprintf("%s in a full arena: %v", name, err)
		}
	}
	if from[0] != 0 {
		return "KeyFrom in a full arena kept the bytes"
	}
	held[1].Destroy()
	if _, err := k.Seal(place(), nil); err != nil {
		return "destroyed key made no room: " + err.Error()
	}
	if n := dek.Memory().Keys; n != len(held) {
		return fmt.Sprintf("%d slots in use, want %d", n, len(held))
	}
	return ""
}
