package dek

import (
	"fmt"
	"sync"
)

// Chunk sizes of the arena, in bytes. The first chunk fits the 64 KiB
// RLIMIT_MEMLOCK of an old default; later ones grow with the arena, so that
// 10,000 keys take eight mappings and under 1 MiB of locked memory.
const (
	minChunkBytes = 16 << 10
	maxChunkBytes = 256 << 10
)

// A slot is the place of one key inside the arena.
type slot [KeySize]byte

// An arena hands out fixed slots of memory that is never swapped, never part
// of a core dump and, where the kernel has memfd_secret(2), absent from the
// kernel's own direct map. It grows in chunks and never shrinks: an unmapped
// page could be mapped again while a stray pointer still looks at it.
type arena struct {
	mapMemory func(size int) (mem []byte, kind MemoryKind, err error)

	mu    sync.Mutex
	free  []*slot
	total int // bytes mapped
	inUse int // slots handed out
	kind  MemoryKind
}

// keys is the one arena of the process. It is package state because the
// limit it lives under, RLIMIT_MEMLOCK, belongs to the process too.
var keys = &arena{mapMemory: mapSecret}

// A MemoryKind says what protects the arena.
type MemoryKind int

const (
	// MemoryNone is the state before the first key.
	MemoryNone MemoryKind = iota
	// MemorySecret is memfd_secret(2): other processes, root's ptrace and the
	// kernel's direct map do not see the pages.
	MemorySecret
	// MemoryLocked is anonymous memory under mlock(2) and MADV_DONTDUMP.
	MemoryLocked
)

// String returns the name used in status output.
func (k MemoryKind) String() string {
	switch k {
	case MemorySecret:
		return "memfd_secret"
	case MemoryLocked:
		return "mlock"
	default:
		return "none"
	}
}

// MemoryStats describes the arena that holds the bytes of every Key.
type MemoryStats struct {
	Kind  MemoryKind // the weakest protection of any chunk
	Keys  int        // slots in use: keys, and subkeys of keys that sealed
	Bytes int        // locked memory, counted against RLIMIT_MEMLOCK
}

// Memory reports the state of the key arena, for metrics and status. It may
// be called concurrently with everything else.
func Memory() MemoryStats {
	keys.mu.Lock()
	defer keys.mu.Unlock()
	return MemoryStats{Kind: keys.kind, Keys: keys.inUse, Bytes: keys.total}
}

// get returns a zeroed slot.
func (a *arena) get() (*slot, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.free) == 0 {
		if err := a.grow(); err != nil {
			return nil, err
		}
	}
	s := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.inUse++
	return s, nil
}

// put wipes s and takes it back.
func (a *arena) put(s *slot) {
	clear(s[:])
	a.mu.Lock()
	defer a.mu.Unlock()
	a.free = append(a.free, s)
	a.inUse--
}

// grow maps one more chunk; a.mu is held.
func (a *arena) grow() error {
	size := min(max(a.total, minChunkBytes), maxChunkBytes)
	mem, kind, err := a.mapMemory(size)
	if err != nil && size > minChunkBytes {
		size = minChunkBytes // the last kilobytes under the limit
		mem, kind, err = a.mapMemory(size)
	}
	if err != nil {
		return fmt.Errorf("%w: lock %d bytes of memory for keys beside %d held: %w; raise the memory lock limit (LimitMEMLOCK= in the unit, ulimit -l in a shell)",
			ErrExhausted, size, a.total, err)
	}
	clear(mem) // every page is faulted in here, not under a caller
	a.total += len(mem)
	a.kind = max(a.kind, kind)
	for len(mem) >= KeySize {
		a.free = append(a.free, (*slot)(mem[:KeySize]))
		mem = mem[KeySize:]
	}
	return nil
}
