package dek

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync/atomic"
	"unsafe"
)

// KeySize is the size of every Key in bytes: AES-256.
const KeySize = 32

// redacted is all that any printer, logger or encoder gets from a Key.
const redacted = "dek.Key(redacted)"

// errNotSerialisable answers every attempt to encode a Key.
var errNotSerialisable = errors.New("dek: a key can't be serialised")

// destroyed is the bit of Key.state that Destroy sets; the bits below it count
// the running uses.
const destroyed = 1 << 62

// A Key is one 256-bit key. Its bytes live in locked memory (see Memory) and
// leave it only inside Use; it can't be printed, logged, encoded or copied.
// Whoever made a Key destroys it, on every path; a Key that the garbage
// collector finds undestroyed is wiped then, but later than promised.
//
// All methods may be called concurrently.
//
// What Go can't promise: AES key schedules, HMAC states and plaintexts made
// during a call lie on the ordinary heap and stack until that memory is used
// again. Programs therefore switch core dumps and ptrace off as well.
type Key struct {
	_ noCopy

	state   atomic.Int64   // destroyed bit | number of running uses
	seals   atomic.Uint64  // messages sealed under this key, all purposes
	place   unsafe.Pointer // *slot, valid until wipe: see slot()
	subkeys atomic.Pointer[subkeys]
	cleanup runtime.Cleanup
}

// slot returns the key's place in the arena. The field is no *slot, because
// fmt follows a typed pointer, methods or not, when a verb does not suit it:
// a Key reached as a value (by reflection, or a copy) would be printed.
func (k *Key) slot() *slot { return (*slot)(k.place) }

// NewKey returns a random key from the system's approved generator. It wraps
// ErrExhausted if no more memory can be locked; the text names the limit.
func NewKey() (*Key, error) {
	k, err := newKey()
	if err != nil {
		return nil, err
	}
	rand.Read(k.slot()[:]) // never fails: crypto/rand.Read ends the program instead
	return k, nil
}

// KeyFrom moves b, exactly KeySize bytes, into a new Key and wipes b, also on
// error. It wraps ErrInvalid for another length and ErrExhausted as NewKey.
func KeyFrom(b []byte) (*Key, error) {
	defer clear(b)
	if len(b) != KeySize {
		return nil, fmt.Errorf("%w: a key has %d bytes, not %d", ErrInvalid, KeySize, len(b))
	}
	k, err := newKey()
	if err != nil {
		return nil, err
	}
	copy(k.slot()[:], b)
	return k, nil
}

// newKey returns a Key of zero bytes.
func newKey() (*Key, error) {
	s, err := keys.get()
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	k := &Key{place: unsafe.Pointer(s)}
	// A forgotten Destroy must not use up the arena for the life of the process.
	k.cleanup = runtime.AddCleanup(k, keys.put, s)
	return k, nil
}

// Use calls f with the key's bytes and returns its error. The bytes are valid
// only until f returns: f must not keep, append to or change them. Use does
// not allocate, uses may nest and run side by side. It returns ErrDestroyed
// after Destroy.
func (k *Key) Use(f func(b []byte) error) error {
	if !k.acquire() {
		return ErrDestroyed
	}
	defer k.release()
	return f(k.slot()[:])
}

// Clone returns a second Key with the same bytes, destroyed on its own. It
// returns ErrDestroyed after Destroy and wraps ErrExhausted as NewKey.
func (k *Key) Clone() (*Key, error) {
	if !k.acquire() {
		return nil, ErrDestroyed
	}
	defer k.release()
	c, err := newKey()
	if err != nil {
		return nil, err
	}
	*c.slot() = *k.slot()
	return c, nil
}

// Equal reports in constant time whether both keys hold the same bytes. A
// destroyed or nil key equals nothing.
func (k *Key) Equal(o *Key) bool {
	if k == nil || o == nil || !k.acquire() {
		return false
	}
	defer k.release()
	if !o.acquire() {
		return false
	}
	defer o.release()
	return subtle.ConstantTimeCompare(k.slot()[:], o.slot()[:]) == 1
}

// Destroy ends the key: no use begins after it returns, and the bytes are
// wiped at once or, if uses are running, by the last of them as it ends. So
// Destroy never blocks and may be called inside Use. It may be called any
// number of times, and on nil.
func (k *Key) Destroy() {
	if k == nil {
		return
	}
	if old := k.state.Or(destroyed); old == 0 {
		k.wipe()
	}
}

// acquire begins a use. After Destroy no count is ever raised again, so the
// count reaches zero exactly once and wipe runs exactly once.
func (k *Key) acquire() bool {
	for {
		s := k.state.Load()
		if s >= destroyed {
			return false
		}
		if k.state.CompareAndSwap(s, s+1) {
			return true
		}
	}
}

// release ends a use.
func (k *Key) release() {
	if k.state.Add(-1) == destroyed {
		k.wipe()
	}
}

// wipe gives the memory back; it runs once.
func (k *Key) wipe() {
	k.cleanup.Stop()
	keys.put(k.slot())
	k.place = nil
	if subs := k.subkeys.Load(); subs != nil {
		subs.wipe()
	}
	runtime.KeepAlive(k) // the cleanup must not have run before Stop
}

// Format prints a fixed text for every verb.
func (*Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue logs a fixed text.
func (*Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText refuses: JSON, XML and other encoders get an error.
func (*Key) MarshalText() ([]byte, error) { return nil, errNotSerialisable }

// MarshalBinary refuses, as MarshalText does.
func (*Key) MarshalBinary() ([]byte, error) { return nil, errNotSerialisable }

// GobEncode refuses, as MarshalText does.
func (*Key) GobEncode() ([]byte, error) { return nil, errNotSerialisable }

// noCopy makes vet report copies of the struct that holds it.
type noCopy struct{}

func (*noCopy) Lock()   {}
func (*noCopy) Unlock() {}
