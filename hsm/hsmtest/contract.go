package hsmtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // OAEP hash of SoftHSM 2.6.1
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
)

// A Token is what [Run] tests: the methods that every token of package hsm has.
type Token interface {
	Identity() hsm.Identity
	Capabilities() hsm.Capabilities
	GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error)
	FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error)
	DestroyPair(ctx context.Context, id dek.ObjectID) error
	Objects(ctx context.Context) ([]dek.ObjectID, error)
	DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error)
	GenerateSigner(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error)
	SignerPublic(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error)
	Sign(ctx context.Context, id dek.ObjectID, digest []byte) ([]byte, error)
	GenerateRoot(ctx context.Context, id dek.ObjectID) error
	SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error)
	OpenKey(ctx context.Context, root dek.ObjectID, b dek.Binding, sealed []byte) (*dek.Key, error)
	Health(ctx context.Context) error
	Close() error
}

var (
	_ Token = (*hsm.Token)(nil)
	_ Token = (*hsm.Software)(nil)
	_ Token = (*Fake)(nil)
)

// Run tests the contract on one token. Open returns the same token each time,
// as a service finds it after a restart: what was made before is there. Run
// never has it open twice. The parts of the contract that a token can't keep
// are those in its [hsm.Capabilities], no others.
func Run(t *testing.T, open func(t *testing.T) Token) {
	t.Helper()
	tok := open(t)
	c := &contract{tok: tok, key: newKey(t)}
	t.Run("identity", c.identity)
	t.Run("pair", c.pair)
	t.Run("decrypt", c.decrypt)
	t.Run("badCiphertext", c.badCiphertext)
	t.Run("concurrent", c.concurrent)
	t.Run("signer", c.signer)
	t.Run("root", c.root)
	t.Run("badInput", c.badInput)
	t.Run("context", c.context)
	t.Run("destroy", c.destroy)
	if err := tok.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	if err := tok.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := tok.Objects(t.Context()); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("use after close: got %v, want ErrUnavailable", err)
	}
	before := c.id
	c.tok = open(t)
	defer c.tok.Close()
	if got := c.tok.Identity(); got != before {
		t.Errorf("identity after reopening: got %+v, want %+v", got, before)
	}
	t.Run("reopened", c.reopened)
}

// contract carries what later parts need of earlier ones.
type contract struct {
	tok    Token
	id     hsm.Identity
	master dek.ObjectID
	pub    *rsa.PublicKey
	sign   dek.ObjectID
	sigPub crypto.PublicKey
	rootID dek.ObjectID
	sealed []byte
	key    *dek.Key
}

// NewID returns a random object id.
func NewID() dek.ObjectID {
	var id dek.ObjectID
	rand.Read(id[:])
	return id
}

// Encrypt makes the inner layer of a wrapped key.
func Encrypt(t testing.TB, pub *rsa.PublicKey, h crypto.Hash, plain []byte) []byte {
	t.Helper()
	c, err := rsa.EncryptOAEP(h.New(), rand.Reader, pub, plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newKey(t testing.TB) *dek.Key {
	t.Helper()
	k, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Destroy)
	return k
}

func encryptKey(t testing.TB, pub *rsa.PublicKey, h crypto.Hash, k *dek.Key) []byte {
	t.Helper()
	var c []byte
	if err := k.Use(func(b []byte) error { c = Encrypt(t, pub, h, b); return nil }); err != nil {
		t.Fatal(err)
	}
	return c
}

func wantClass(t testing.TB, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: got %v, want %v", what, err, class)
	}
}

func (c *contract) identity(t *testing.T) {
	c.id = c.tok.Identity()
	if c.id.Label == "" || c.id.Serial == "" || len(c.id.Fingerprint) != 64 {
		t.Errorf("identity: %+v", c.id)
	}
	if caps := c.tok.Capabilities(); len(caps.OAEP) == 0 || len(caps.RSABits) == 0 || caps.PreferredOAEP() == 0 {
		t.Errorf("capabilities: %+v", caps)
	}
	if err := c.tok.Health(t.Context()); err != nil {
		t.Errorf("health: %v", err)
	}
	ids, err := c.tok.Objects(t.Context())
	if err != nil || len(ids) != 0 {
		t.Errorf("objects of a new token: got %x, %v", ids, err)
	}
}

func (c *contract) pair(t *testing.T) {
	ctx := t.Context()
	c.master = NewID()
	_, err := c.tok.FindPair(ctx, c.master)
	wantClass(t, "find before", err, dek.ErrNotFound)
	_, err = c.tok.DecryptKey(ctx, c.master, c.tok.Capabilities().OAEP[0], make([]byte, 256))
	wantClass(t, "decrypt before", err, dek.ErrNotFound)
	pub, err := c.tok.GeneratePair(ctx, c.master, 2048)
	if err != nil {
		t.Fatalf("generate: %v", err)
	}
	if pub.N.BitLen() != 2048 || pub.E != 65537 {
		t.Errorf("public key of %d bits, e=%d", pub.N.BitLen(), pub.E)
	}
	c.pub = pub
	found, err := c.tok.FindPair(ctx, c.master)
	if err != nil || !found.Equal(pub) {
		t.Fatalf("find: %v", err)
	}
	_, err = c.tok.GeneratePair(ctx, c.master, 2048)
	wantClass(t, "generate again", err, dek.ErrExists)
	_, err = c.tok.GenerateSigner(ctx, c.master)
	wantClass(t, "signer with the same id", err, dek.ErrExists)
	wantClass(t, "root with the same id", c.tok.GenerateRoot(ctx, c.master), dek.ErrExists)
	ids, err := c.tok.Objects(ctx)
	if err != nil || !slices.Equal(ids, []dek.ObjectID{c.master}) {
		t.Errorf("objects: got %x, %v", ids, err)
	}
}

func (c *contract) decrypt(t *testing.T) {
	for _, h := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		k := newKey(t)
		got, err := c.tok.DecryptKey(t.Context(), c.master, h, encryptKey(t, c.pub, h, k))
		if !slices.Contains(c.tok.Capabilities().OAEP, h) {
			wantClass(t, "unsupported "+h.String(), err, dek.ErrPrecondition)
			continue
		}
		if err != nil {
			t.Fatalf("decrypt with %v: %v", h, err)
		}
		if !got.Equal(k) {
			t.Errorf("decrypt with %v: another key", h)
		}
		got.Destroy()
	}
}

// badCiphertext wants one answer for every cause, and a well token after it.
func (c *contract) badCiphertext(t *testing.T) {
	h := c.tok.Capabilities().OAEP[0]
	good := encryptKey(t, c.pub, h, newKey(t))
	mutate := func(f func(b []byte) []byte) []byte { return f(slices.Clone(good)) }
	tests := []struct {
		name  string
		inner []byte
	}{
		{"empty", nil},
		{"short", good[:len(good)-1]},
		{"long", mutate(func(b []byte) []byte { return append(b, 0) })},
		{"oversized", make([]byte, 100_000)},
		{"zero", make([]byte, len(good))},
		{"flipped first", mutate(func(b []byte) []byte { b[0] ^= 1; return b })},
		{"flipped last", mutate(func(b []byte) []byte { b[len(b)-1] ^= 1; return b })},
		{"not below modulus", mutate(func(b []byte) []byte { return slices.Repeat([]byte{0xff}, len(b)) })},
		{"31 bytes", Encrypt(t, c.pub, h, make([]byte, 31))},
		{"33 bytes", Encrypt(t, c.pub, h, make([]byte, 33))},
		{"no bytes", Encrypt(t, c.pub, h, nil)},
	}
	var text string
	for _, tt := range tests {
		k, err := c.tok.DecryptKey(t.Context(), c.master, h, tt.inner)
		wantClass(t, tt.name, err, dek.ErrAuth)
		if k != nil {
			t.Errorf("%s: key and error", tt.name)
		}
		if err != nil && text != "" && err.Error() != text {
			t.Errorf("%s: %q differs from %q: an oracle", tt.name, err, text)
		}
		if err != nil {
			text = err.Error()
		}
	}
	if err := c.tok.Health(t.Context()); err != nil {
		t.Errorf("health after bad ciphertexts: %v", err)
	}
}

func (c *contract) concurrent(t *testing.T) {
	h := c.tok.Capabilities().OAEP[0]
	k := newKey(t)
	inner := encryptKey(t, c.pub, h, k)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 4 {
				got, err := c.tok.DecryptKey(t.Context(), c.master, h, inner)
				if err != nil || !got.Equal(k) {
					t.Errorf("decrypt: %v", err)
				}
				got.Destroy()
			}
		})
	}
	wg.Wait()
}

func (c *contract) signer(t *testing.T) {
	ctx := t.Context()
	c.sign = NewID()
	_, err := c.tok.SignerPublic(ctx, c.sign)
	wantClass(t, "public before", err, dek.ErrNotFound)
	digest := sha256.Sum256([]byte("message"))
	_, err = c.tok.Sign(ctx, c.sign, digest[:])
	wantClass(t, "sign before", err, dek.ErrNotFound)
	if c.sigPub, err = c.tok.GenerateSigner(ctx, c.sign); err != nil {
		t.Fatalf("generate: %v", err)
	}
	if _, ec := c.sigPub.(*ecdsa.PublicKey); ec != c.tok.Capabilities().ECDSA {
		t.Errorf("signer is %T", c.sigPub)
	}
	c.checkSigner(t)
	_, err = c.tok.Sign(ctx, c.master, digest[:])
	wantClass(t, "sign with a master key", err, dek.ErrNotFound)
	_, err = c.tok.FindPair(ctx, c.sign)
	wantClass(t, "signer as a master key", err, dek.ErrNotFound)
	_, err = c.tok.DecryptKey(ctx, c.sign, c.tok.Capabilities().OAEP[0], make([]byte, 256))
	wantClass(t, "decrypt with a signer", err, dek.ErrNotFound)
}

func (c *contract) checkSigner(t *testing.T) {
	t.Helper()
	pub, err := c.tok.SignerPublic(t.Context(), c.sign)
	if err != nil {
		t.Fatalf("public: %v", err)
	}
	if k, ok := pub.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(c.sigPub) {
		t.Errorf("another public key")
	}
	digest := sha256.Sum256([]byte("message"))
	sig, err := c.tok.Sign(t.Context(), c.sign, digest[:])
	if err != nil {
		t.Fatalf("sign: %v", err)
	}
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(k, digest[:], sig) {
			t.Error("ECDSA signature does not verify")
		}
	case *rsa.PublicKey:
		if err := rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], sig); err != nil {
			t.Errorf("RSA signature: %v", err)
		}
	}
}

// Place is a binding for tests.
var place = dek.Binding{Purpose: dek.PurposeSealKey, Vault: "acme", Object: "seal", Version: 3}

func (c *contract) root(t *testing.T) {
	ctx := t.Context()
	c.rootID = NewID()
	_, err := c.tok.SealKey(ctx, c.rootID, place, c.key)
	wantClass(t, "seal before", err, dek.ErrNotFound)
	if err := c.tok.GenerateRoot(ctx, c.rootID); err != nil {
		t.Fatalf("generate: %v", err)
	}
	if c.sealed, err = c.tok.SealKey(ctx, c.rootID, place, c.key); err != nil {
		t.Fatalf("seal: %v", err)
	}
	again, err := c.tok.SealKey(ctx, c.rootID, place, c.key)
	if err != nil || slices.Equal(again, c.sealed) || len(again) > 2048 {
		t.Errorf("sealed twice: equal or too long (%d bytes), %v", len(again), err)
	}
	c.checkRoot(t)
	c.misplaced(t)
}

// misplaced wants sealed keys refused that are elsewhere, damaged or foreign.
func (c *contract) misplaced(t *testing.T) {
	ctx := t.Context()
	other := NewID()
	if err := c.tok.GenerateRoot(ctx, other); err != nil {
		t.Fatalf("generate: %v", err)
	}
	foreign, err := c.tok.SealKey(ctx, other, place, c.key)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	edit := func(f func(b *dek.Binding)) dek.Binding { b := place; f(&b); return b }
	tests := []struct {
		name   string
		place  dek.Binding
		sealed []byte
	}{
		{"other purpose", edit(func(b *dek.Binding) { b.Purpose = dek.PurposeBackup }), c.sealed},
		{"other vault", edit(func(b *dek.Binding) { b.Vault = "evil" }), c.sealed},
		{"moved border", edit(func(b *dek.Binding) { b.Vault, b.Object = "acmes", "eal" }), c.sealed},
		{"other version", edit(func(b *dek.Binding) { b.Version++ }), c.sealed},
		{"other root", place, foreign},
		{"empty", place, nil},
		{"oversized", place, make([]byte, 100_000)},
		{"truncated", place, c.sealed[:len(c.sealed)-1]},
		{"extended", place, append(slices.Clone(c.sealed), 0)},
	}
	for i := range c.sealed {
		if flipped := slices.Clone(c.sealed); i < 40 || i%16 == 0 {
			flipped[i] ^= 0x80
			tests = append(tests, struct {
				name   string
				place  dek.Binding
				sealed []byte
			}{"flipped", place, flipped})
		}
	}
	for _, tt := range tests {
		k, err := c.tok.OpenKey(ctx, c.rootID, tt.place, tt.sealed)
		wantClass(t, tt.name, err, dek.ErrAuth)
		if k != nil {
			t.Errorf("%s: key and error", tt.name)
		}
	}
	if err := c.tok.DestroyPair(ctx, other); err != nil {
		t.Errorf("destroy root: %v", err)
	}
}

func (c *contract) checkRoot(t *testing.T) {
	t.Helper()
	k, err := c.tok.OpenKey(t.Context(), c.rootID, place, c.sealed)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	defer k.Destroy()
	if !k.Equal(c.key) {
		t.Error("open: another key")
	}
}

func (c *contract) badInput(t *testing.T) {
	ctx := t.Context()
	_, err := c.tok.GeneratePair(ctx, NewID(), 1024)
	wantClass(t, "RSA-1024", err, dek.ErrInvalid)
	_, err = c.tok.GeneratePair(ctx, dek.ObjectID{}, 2048)
	wantClass(t, "zero id", err, dek.ErrInvalid)
	_, err = c.tok.GenerateSigner(ctx, dek.ObjectID{})
	wantClass(t, "zero id", err, dek.ErrInvalid)
	wantClass(t, "zero id", c.tok.GenerateRoot(ctx, dek.ObjectID{}), dek.ErrInvalid)
	_, err = c.tok.DecryptKey(ctx, c.master, crypto.MD5, make([]byte, 256))
	wantClass(t, "MD5", err, dek.ErrInvalid)
	_, err = c.tok.Sign(ctx, c.sign, make([]byte, 31))
	wantClass(t, "short digest", err, dek.ErrInvalid)
	_, err = c.tok.SealKey(ctx, c.rootID, dek.Binding{}, c.key)
	wantClass(t, "no purpose", err, dek.ErrInvalid)
	gone, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	gone.Destroy()
	_, err = c.tok.SealKey(ctx, c.rootID, place, gone)
	wantClass(t, "destroyed key", err, dek.ErrDestroyed)
}

func (c *contract) context(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	begin := time.Now()
	_, err := c.tok.GeneratePair(ctx, NewID(), 4096)
	wantClass(t, "ended context", err, dek.ErrUnavailable)
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("ended context: came back after %v", d)
	}
	if err := c.tok.Health(t.Context()); err != nil {
		t.Errorf("health: %v", err)
	}
}

func (c *contract) destroy(t *testing.T) {
	ctx := t.Context()
	id := NewID()
	pub, err := c.tok.GeneratePair(ctx, id, 2048)
	if err != nil {
		t.Fatal(err)
	}
	h := c.tok.Capabilities().OAEP[0]
	inner := encryptKey(t, pub, h, newKey(t))
	if k, err := c.tok.DecryptKey(ctx, id, h, inner); err != nil { // keeps its handle
		t.Fatal(err)
	} else {
		k.Destroy()
	}
	for _, what := range []string{"destroy", "destroy again"} {
		if err := c.tok.DestroyPair(ctx, id); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = c.tok.FindPair(ctx, id)
	wantClass(t, "find after", err, dek.ErrNotFound)
	_, err = c.tok.DecryptKey(ctx, id, h, inner)
	wantClass(t, "decrypt after", err, dek.ErrNotFound)
	ids, err := c.tok.Objects(ctx)
	if err != nil || slices.Contains(ids, id) || !slices.Contains(ids, c.master) {
		t.Errorf("objects after: %x, %v", ids, err)
	}
}

// reopened wants everything that was made to be there.
func (c *contract) reopened(t *testing.T) {
	pub, err := c.tok.FindPair(t.Context(), c.master)
	if err != nil || !pub.Equal(c.pub) {
		t.Fatalf("find: %v", err)
	}
	c.decrypt(t)
	c.checkSigner(t)
	c.checkRoot(t)
	ids, err := c.tok.Objects(t.Context())
	for _, id := range []dek.ObjectID{c.master, c.sign, c.rootID} {
		if !slices.Contains(ids, id) {
			t.Errorf("object %x is gone (%v)", id, err)
		}
	}
}
