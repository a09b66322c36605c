//go:build linux && (amd64 || arm64 || riscv64)

package dek

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mapSecret maps size bytes, a multiple of the page size, that stay out of
// swap, core dumps and child processes. memfd_secret(2) (Linux 5.14, counted
// against RLIMIT_MEMLOCK) is tried first; kernels may have it switched off.
func mapSecret(size int) ([]byte, MemoryKind, error) {
	mem, err := mapMemfdSecret(size)
	if err == nil {
		return mem, MemorySecret, nil
	}
	mem, err = mapLocked(size)
	if err != nil {
		return nil, MemoryNone, err
	}
	return mem, MemoryLocked, nil
}

func mapMemfdSecret(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	defer func() { _ = unix.Close(fd) }() // the mapping keeps the pages
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, fmt.Errorf("memfd_secret: ftruncate: %w", err)
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: mmap: %w", err)
	}
	if err := keepPrivate(mem); err != nil {
		return nil, err
	}
	return mem, nil
}

func mapLocked(size int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Mlock(mem); err != nil {
		_ = unix.Munmap(mem)
		return nil, fmt.Errorf("mlock: %w", err)
	}
	if err := keepPrivate(mem); err != nil {
		return nil, err
	}
	return mem, nil
}

// keepPrivate keeps mem out of core dumps and forked children, or unmaps it.
func keepPrivate(mem []byte) error {
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		if err := unix.Madvise(mem, advice); err != nil {
			_ = unix.Munmap(mem)
			return fmt.Errorf("madvise: %w", err)
		}
	}
	return nil
}
