package dek

// SetSeals pretends that k has sealed n messages.
func (k *Key) SetSeals(n uint64) { k.seals.Store(n) }

// MaxSeals is the limit that Seal enforces.
const MaxSeals = maxSeals

// Address returns where the bytes of k lie.
func (k *Key) Address() uintptr { return uintptr(k.place) }

// TestArena is an arena over memory that a test can look at.
type TestArena struct{ a *arena }

// NewTestArena returns an arena that maps with f.
func NewTestArena(f func(int) ([]byte, MemoryKind, error)) TestArena {
	return TestArena{&arena{mapMemory: f}}
}

func (t TestArena) Get() (*[KeySize]byte, error) {
	s, err := t.a.get()
	return (*[KeySize]byte)(s), err
}

func (t TestArena) Put(b *[KeySize]byte) { t.a.put((*slot)(b)) }

// Total returns the bytes mapped.
func (t TestArena) Total() int { return t.a.total }
