package recovery_test

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
	"github.com/keyward/keyward/dek/recovery"
)

const limitEnv = "KEYWARD_TEST_MEMLOCK"

// TestOutOfMemory runs a child whose locked memory is full but for 0, 1, 2, …
// keys: each function fails cleanly at each of its steps and loses no slot.
func TestOutOfMemory(t *testing.T) {
	if os.Getenv(limitEnv) != "" {
		fmt.Println(limitedChild())
		os.Exit(0)
	}
	self, err := os.Executable()
	check(t, err)
	cmd := exec.Command(self, "-test.run=^TestOutOfMemory$")
	cmd.Env = append(os.Environ(), limitEnv+"=1")
	out, err := cmd.Output()
	check(t, err)
	if got := strings.TrimSpace(string(out)); got != "ok" {
		t.Errorf("child says %s", got)
	}
}

func limitedChild() string {
	limit := unix.Rlimit{Cur: 16 << 10, Max: 16 << 10}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err.Error()
	}
	_, shares, err := recovery.Generate(2, 3, "x")
	if err != nil {
		return err.Error()
	}
	s, err := shares[0].Text()
	if err != nil {
		return err.Error()
	}
	if os.Geteuid() == 0 { // root may lock what it likes
		if err := syscall.Setresuid(65534, 65534, 65534); err != nil {
			return err.Error()
		}
	}
	calls := map[string]func() error{
		"Generate": func() error {
			_, shares, err := recovery.Generate(2, 3, "x")
			for _, s := range shares {
				s.Destroy()
			}
			return err
		},
		"Combine": func() error {
			p, err := recovery.Combine(shares)
			if p != nil {
				p.Destroy()
			}
			return err
		},
		"ParseShare": func() error {
			share, err := recovery.ParseShare(s)
			share.Destroy()
			return err
		},
	}
	var held []*dek.Key
	for k, err := dek.NewKey(); err == nil; k, err = dek.NewKey() {
		held = append(held, k)
	}
	for name, f := range calls {
		if msg := squeeze(held, f); msg != "" {
			return name + ": " + msg
		}
	}
	return "ok"
}

// squeeze calls f with room for 0, 1, 2, … keys until it succeeds.
func squeeze(held []*dek.Key, f func() error) string {
	for room := range 12 {
		before := dek.Memory().Keys
		err := f()
		if got := dek.Memory().Keys; got != before {
			return fmt.Sprintf("room for %d: %d slots in use, want %d", room, got, before)
		}
		if err == nil {
			if room == 0 {
				return "needed no memory"
			}
			for i := range room {
				if held[i], err = dek.NewKey(); err != nil {
					return err.Error()
				}
			}
			return ""
		}
		if !errors.Is(err, dek.ErrExhausted) {
			return fmt.Sprintf("room for %d: %v", room, err)
		}
		held[room].Destroy()
	}
	return "never succeeded"
}
