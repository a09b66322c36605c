package dek_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/keyward/keyward/dek"
)

func heapMemory(size int) ([]byte, dek.MemoryKind, error) {
	return bytes.Repeat([]byte{0xee}, size), dek.MemoryLocked, nil
}

func TestArenaReuse(t *testing.T) {
	a := dek.NewTestArena(heapMemory)
	first, err := a.Get()
	if err != nil {
		t.Fatal(err)
	}
	if *first != [dek.KeySize]byte{} {
		t.Error("a new slot is not zero")
	}
	copy(first[:], secretBytes())
	a.Put(first)
	if *first != [dek.KeySize]byte{} {
		t.Error("a returned slot is not wiped")
	}
	second, err := a.Get()
	if err != nil {
		t.Fatal(err)
	}
	if second != first {
		t.Error("a returned slot is not used again")
	}
}

func TestArenaGrowth(t *testing.T) {
	a := dek.NewTestArena(heapMemory)
	seen := make(map[*[dek.KeySize]byte]bool)
	for range 10_000 {
		s, err := a.Get()
		if err != nil {
			t.Fatal(err)
		}
		if seen[s] {
			t.Fatal("a slot was given twice")
		}
		seen[s] = true
	}
	if total := a.Total(); total > 1<<20 {
		t.Errorf("10,000 keys lock %d bytes, want at most 1 MiB", total)
	}
}

func TestArenaExhausted(t *testing.T) {
	left := 5 * 16 << 10
	a := dek.NewTestArena(func(size int) ([]byte, dek.MemoryKind, error) {
		if size > left {
			return nil, 0, fmt.Errorf("mlock: %w", syscall.ENOMEM)
		}
		left -= size
		return heapMemory(size)
	})
	var err error
	n := 0
	for ; err == nil; n++ {
		_, err = a.Get()
	}
	if n-1 != 5*16<<10/dek.KeySize {
		t.Errorf("%d keys fit, want all %d", n-1, 5*16<<10/dek.KeySize)
	}
	if !errors.Is(err, dek.ErrExhausted) || !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("error = %v, want ErrExhausted with its cause", err)
	}
	if !strings.Contains(err.Error(), "LimitMEMLOCK") {
		t.Errorf("error %q does not name the remedy", err)
	}
}

// TestMemoryProtected looks at the process from outside, as a debugger or a
// core dump would.
func TestMemoryProtected(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs /proc")
	}
	k := secretKey(t)
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	flags := vmFlags(string(smaps), k.Address())
	for _, want := range []string{"dd", "dc", "lo"} { // no dump, no copy on fork, locked
		if !strings.Contains(flags, " "+want) {
			t.Errorf("VmFlags of the arena are %q, want %s", flags, want)
		}
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	got := make([]byte, dek.KeySize)
	_, err = mem.ReadAt(got, int64(k.Address()))
	t.Logf("arena: %v; read through /proc/self/mem: %v", dek.Memory().Kind, err)
	if dek.Memory().Kind == dek.MemorySecret && err == nil {
		t.Error("memfd_secret memory can be read through /proc/self/mem")
	}
}

// vmFlags returns the VmFlags line of the mapping that holds address.
func vmFlags(smaps string, address uintptr) string {
	inside := false
	for line := range strings.Lines(smaps) {
		var from, to uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			inside = from <= address && address < to
		}
		if rest, ok := strings.CutPrefix(line, "VmFlags:"); ok && inside {
			return rest
		}
	}
	return ""
}
