//go:build linux && (amd64 || arm64 || riscv64)

package dek_test

import (
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/keyward/keyward/dek"
)

// TestMapLocked: the fallback is locked and out of dumps and children too.
func TestMapLocked(t *testing.T) {
	mem, err := dek.MapLocked(os.Getpagesize())
	if err != nil {
		t.Fatal(err)
	}
	mem[0] = 1
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	flags := vmFlags(string(smaps), uintptr(unsafe.Pointer(&mem[0])))
	for _, want := range []string{"dd", "dc", "lo"} {
		if !strings.Contains(flags, " "+want) {
			t.Errorf("VmFlags are %q, want %s", flags, want)
		}
	}
}
