package hsmtest

import (
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"sync"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
)

// An Op names a method of a token for [Fake.Fail].
type Op int

// The operations that can fail on order.
const (
	OpGeneratePair Op = iota + 1
	OpFindPair
	OpDestroyPair
	OpObjects
	OpDecryptKey
	OpGenerateSigner
	OpSignerPublic
	OpSign
	OpGenerateRoot
	OpSealKey
	OpOpenKey
	OpHealth
)

// A Mode says what happened behind an error.
type Mode int

// The modes of a fault.
const (
	NotDone Mode = iota + 1 // the token was never asked
	Done                    // the token did it, the answer was lost
	Hangs                   // the token was asked and never answers; the call ends with its context
)

// A Fake is a software token in the test's own directory that fails on order
// and counts what it is asked. All methods may be called concurrently.
type Fake struct {
	soft *hsm.Software

	mu     sync.Mutex
	faults map[Op][]fault
	calls  map[Op]int
}

type fault struct {
	mode Mode
	err  error
}

// NewFake makes a fake; the test closes it at its end.
func NewFake(t testing.TB) *Fake {
	t.Helper()
	return OpenFake(t, t.TempDir()+"/fake")
}

// OpenFake opens the fake in dir, as after a restart.
func OpenFake(t testing.TB, dir string) *Fake {
	t.Helper()
	soft, err := hsm.OpenSoftware(dir)
	if err != nil {
		t.Fatalf("fake token: %v", err)
	}
	t.Cleanup(func() { soft.Close() })
	return &Fake{soft: soft, faults: map[Op][]fault{}, calls: map[Op]int{}}
}

// Fail makes one coming call of op fail in a mode; orders queue up. A nil err
// means dek.ErrUnavailable.
func (f *Fake) Fail(op Op, mode Mode, err error) {
	if err == nil {
		err = fmt.Errorf("%w: fault on order", dek.ErrUnavailable)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults[op] = append(f.faults[op], fault{mode, err})
}

// Calls returns how often op was called, failed calls included.
func (f *Fake) Calls(op Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// act runs do unless a fault says otherwise.
func (f *Fake) act(ctx context.Context, op Op, do func() error) error {
	f.mu.Lock()
	f.calls[op]++
	var now fault
	if q := f.faults[op]; len(q) > 0 {
		now, f.faults[op] = q[0], q[1:]
	}
	f.mu.Unlock()
	switch now.mode {
	case NotDone:
		return now.err
	case Done:
		if err := do(); err != nil {
			return err
		}
		return now.err
	case Hangs:
		<-ctx.Done()
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, context.Cause(ctx))
	}
	return do()
}

// get is act for methods with a result; a failed call has none.
func get[T any](ctx context.Context, f *Fake, op Op, do func() (T, error)) (T, error) {
	var v, zero T
	err := f.act(ctx, op, func() (err error) {
		v, err = do()
		return err
	})
	if err != nil {
		if k, ok := any(v).(*dek.Key); ok {
			k.Destroy()
		}
		return zero, err
	}
	return v, nil
}

// Identity and the other methods are those of the software token.
func (f *Fake) Identity() hsm.Identity { return f.soft.Identity() }

// Capabilities is as in [hsm.Software].
func (f *Fake) Capabilities() hsm.Capabilities { return f.soft.Capabilities() }

// GeneratePair is as in [hsm.Software], with faults.
func (f *Fake) GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error) {
	return get(ctx, f, OpGeneratePair, func() (*rsa.PublicKey, error) { return f.soft.GeneratePair(ctx, id, bits) })
}

// FindPair is as in [hsm.Software], with faults.
func (f *Fake) FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error) {
	return get(ctx, f, OpFindPair, func() (*rsa.PublicKey, error) { return f.soft.FindPair(ctx, id) })
}

// DestroyPair is as in [hsm.Software], with faults.
func (f *Fake) DestroyPair(ctx context.Context, id dek.ObjectID) error {
	return f.act(ctx, OpDestroyPair, func() error { return f.soft.DestroyPair(ctx, id) })
}

// Objects is as in [hsm.Software], with faults.
func (f *Fake) Objects(ctx context.Context) ([]dek.ObjectID, error) {
	return get(ctx, f, OpObjects, func() ([]dek.ObjectID, error) { return f.soft.Objects(ctx) })
}

// DecryptKey is as in [hsm.Software], with faults.
func (f *Fake) DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error) {
	return get(ctx, f, OpDecryptKey, func() (*dek.Key, error) { return f.soft.DecryptKey(ctx, id, h, inner) })
}

// GenerateSigner is as in [hsm.Software], with faults.
func (f *Fake) GenerateSigner(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	return get(ctx, f, OpGenerateSigner, func() (crypto.PublicKey, error) { return f.soft.GenerateSigner(ctx, id) })
}

// SignerPublic is as in [hsm.Software], with faults.
func (f *Fake) SignerPublic(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	return get(ctx, f, OpSignerPublic, func() (crypto.PublicKey, error) { return f.soft.SignerPublic(ctx, id) })
}

// Sign is as in [hsm.Software], with faults.
func (f *Fake) Sign(ctx context.Context, id dek.ObjectID, digest []byte) ([]byte, error) {
	return get(ctx, f, OpSign, func() ([]byte, error) { return f.soft.Sign(ctx, id, digest) })
}

// GenerateRoot is as in [hsm.Software], with faults.
func (f *Fake) GenerateRoot(ctx context.Context, id dek.ObjectID) error {
	return f.act(ctx, OpGenerateRoot, func() error { return f.soft.GenerateRoot(ctx, id) })
}

// SealKey is as in [hsm.Software], with faults.
func (f *Fake) SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error) {
	return get(ctx, f, OpSealKey, func() ([]byte, error) { return f.soft.SealKey(ctx, root, b, k) })
}

// OpenKey is as in [hsm.Software], with faults.
func (f *Fake) OpenKey(ctx context.Context, root dek.ObjectID, b dek.Binding, sealed []byte) (*dek.Key, error) {
	return get(ctx, f, OpOpenKey, func() (*dek.Key, error) { return f.soft.OpenKey(ctx, root, b, sealed) })
}

// Health is as in [hsm.Software], with faults.
func (f *Fake) Health(ctx context.Context) error {
	return f.act(ctx, OpHealth, func() error { return f.soft.Health(ctx) })
}

// Close is as in [hsm.Software].
func (f *Fake) Close() error { return f.soft.Close() }
