//go:build unix && !(linux && (amd64 || arm64 || riscv64))

package dek

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mapSecret maps size bytes that stay out of swap. These systems have no
// portable way to keep one mapping out of a core dump: core dumps are switched
// off for the whole process by the programs.
func mapSecret(size int) ([]byte, MemoryKind, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, MemoryNone, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Mlock(mem); err != nil {
		_ = unix.Munmap(mem)
		return nil, MemoryNone, fmt.Errorf("mlock: %w", err)
	}
	return mem, MemoryLocked, nil
}
