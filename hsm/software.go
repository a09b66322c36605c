package hsm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"

	"github.com/keyward/keyward/dek"
)

// A Software token keeps its keys in one directory and works with crypto/*
// inside this process. It is for trying out and for tests: whoever reads the
// directory has every key (they are sealed under a file key that lies beside
// them, which stops accidents, not thieves), and parsed private keys lie on the
// Go heap. Everything else, durability included, it does like a good token.
//
// All methods may be called concurrently. One process at a time may open a
// directory.
type Software struct {
	files    *softwareFiles
	identity Identity

	mu     sync.RWMutex
	closed bool
	rsa    map[dek.ObjectID]*rsa.PrivateKey
	signer map[dek.ObjectID]*ecdsa.PrivateKey
	root   map[dek.ObjectID]*dek.Key
}

// OpenSoftware opens the software token in dir and makes it if dir is absent or
// empty. It wraps ErrPrecondition if another process has dir open or if others
// may read it, and ErrCorrupt if files of the token are damaged or missing.
func OpenSoftware(dir string) (*Software, error) {
	files, err := openSoftwareFiles(dir)
	if err != nil {
		return nil, fmt.Errorf("open software token %s: %w", dir, err)
	}
	s := &Software{
		files:  files,
		rsa:    map[dek.ObjectID]*rsa.PrivateKey{},
		signer: map[dek.ObjectID]*ecdsa.PrivateKey{},
		root:   map[dek.ObjectID]*dek.Key{},
	}
	if err := s.loadIdentity(); err != nil {
		files.close()
		return nil, fmt.Errorf("open software token %s: %w", dir, err)
	}
	return s, nil
}

// loadIdentity finds or makes the pair behind Identity.Fingerprint.
func (s *Software) loadIdentity() error {
	ids, err := s.files.list(kindIdentity)
	if err != nil {
		return err
	}
	if len(ids) > 1 {
		return fmt.Errorf("%w: %d identity files; keep the right one", dek.ErrCorrupt, len(ids))
	}
	var key *ecdsa.PrivateKey
	if len(ids) == 1 {
		key, err = s.readSigner(kindIdentity, ids[0])
	} else {
		var id dek.ObjectID
		rand.Read(id[:])
		key, err = s.makeSigner(kindIdentity, id)
	}
	if err != nil {
		return err
	}
	fp, err := Fingerprint(key.Public())
	if err != nil {
		return err
	}
	s.identity = Identity{Label: "software", Serial: s.files.serial, Model: "software", Manufacturer: "Keyward", Fingerprint: fp}
	return nil
}

// Identity returns what names this token; it never changes.
func (s *Software) Identity() Identity { return s.identity }

// Capabilities returns what this token can do: everything.
func (s *Software) Capabilities() Capabilities {
	return Capabilities{
		OAEP:    []crypto.Hash{crypto.SHA1, crypto.SHA256},
		RSABits: append([]int(nil), rsaSizes...),
		AESGCM:  true, ECDSA: true, Origin: true, Survives: true,
	}
}

// ready refuses calls after Close or with an ended context.
func (s *Software) ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return fmt.Errorf("%w: token closed", dek.ErrUnavailable)
	}
	return nil
}

// GeneratePair makes the master key id, RSA of 2048, 3072 or 4096 bits, and
// returns its public half once it is on disk. It wraps ErrExists if any object
// has that id, ErrInvalid for other sizes or a zero id.
func (s *Software) GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error) {
	if err := errors.Join(checkBits(bits), checkID(id)); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if err := s.files.free(id); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, fmt.Errorf("%w: generate RSA-%d: %w", dek.ErrUnavailable, bits, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: encode key: %w", dek.ErrInvalid, err)
	}
	defer clear(der)
	if err := s.write(kindMaster, id, der); err != nil {
		return nil, err
	}
	return &key.PublicKey, nil
}

// write makes an object's file; Close waits for it. Nothing is kept in memory:
// the first use reads the file, under the lock that DestroyPair takes.
func (s *Software) write(kind objectKind, id dek.ObjectID, plain []byte) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return errClosed()
	}
	return s.files.write(kind, id, plain)
}

// load returns what kept has under id, or reads and keeps it. The lock is held
// while the file is read, so that what is destroyed meanwhile is not kept.
func load[T any](s *Software, kept map[dek.ObjectID]T, id dek.ObjectID, read func() (T, error)) (T, error) {
	s.mu.RLock()
	v, ok := kept[id]
	s.mu.RUnlock()
	if ok {
		return v, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := kept[id]; ok {
		return v, nil
	}
	if s.closed {
		var zero T
		return zero, errClosed()
	}
	v, err := read()
	if err == nil {
		kept[id] = v
	}
	return v, err
}

// FindPair returns the public half of master key id after a self-test. It wraps
// ErrNotFound if there is none and ErrCorrupt if its file is damaged.
func (s *Software) FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.master(id)
	if err != nil {
		return nil, err
	}
	return &key.PublicKey, nil
}

// master returns the parsed master key id, from memory or from its file.
func (s *Software) master(id dek.ObjectID) (*rsa.PrivateKey, error) {
	return load(s, s.rsa, id, func() (*rsa.PrivateKey, error) {
		der, err := s.files.read(kindMaster, id)
		if err != nil {
			return nil, err
		}
		defer clear(der)
		parsed, err := x509.ParsePKCS8PrivateKey(der) // validates the key, too
		key, ok := parsed.(*rsa.PrivateKey)
		if err != nil || !ok {
			return nil, fmt.Errorf("%w: master key %x in the software token", dek.ErrCorrupt, id)
		}
		return key, nil
	})
}

// DestroyPair removes the object id, whatever Keyward kind it has, and returns
// nil once its file is gone, also if there was none. Blocks of the file may
// live on in the storage below it.
func (s *Software) DestroyPair(ctx context.Context, id dek.ObjectID) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed()
	}
	if err := s.files.remove(id); err != nil {
		return err
	}
	delete(s.rsa, id)
	delete(s.signer, id)
	if k := s.root[id]; k != nil {
		k.Destroy()
		delete(s.root, id)
	}
	return nil
}

// Objects returns the ids of all master keys, signers and roots, sorted.
func (s *Software) Objects(ctx context.Context) ([]dek.ObjectID, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	return s.files.list(kindMaster, kindSigner, kindRoot)
}

// DecryptKey decrypts one RSA-OAEP ciphertext (empty label, hash h for label
// and MGF1) to a 32-byte key, which the caller destroys. It wraps ErrAuth for
// every kind of bad ciphertext, ErrNotFound if there is no master key id.
func (s *Software) DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error) {
	if err := checkHash(h); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.master(id)
	if err != nil {
		return nil, err
	}
	plain, err := rsa.DecryptOAEP(h.New(), nil, key, inner, nil)
	if err != nil || len(plain) != dek.KeySize {
		clear(plain)
		return nil, errCiphertext()
	}
	return dek.KeyFrom(plain)
}

// GenerateSigner makes the ECDSA P-256 signer id and returns its public half.
// It wraps ErrExists if any object has that id.
func (s *Software) GenerateSigner(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if err := s.files.free(id); err != nil {
		return nil, err
	}
	key, err := s.makeSigner(kindSigner, id)
	if err != nil {
		return nil, err
	}
	return key.Public(), nil
}

func (s *Software) makeSigner(kind objectKind, id dek.ObjectID) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("%w: generate signer: %w", dek.ErrUnavailable, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("%w: encode key: %w", dek.ErrInvalid, err)
	}
	defer clear(der)
	if err := s.write(kind, id, der); err != nil {
		return nil, err
	}
	return key, nil
}

// readSigner parses the file of a signer or of the identity pair.
func (s *Software) readSigner(kind objectKind, id dek.ObjectID) (*ecdsa.PrivateKey, error) {
	der, err := s.files.read(kind, id)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	key, ok := parsed.(*ecdsa.PrivateKey)
	if err != nil || !ok {
		return nil, fmt.Errorf("%w: signer %x in the software token", dek.ErrCorrupt, id)
	}
	return key, nil
}

// loadSigner returns signer id; the identity pair must not sign for callers.
func (s *Software) loadSigner(id dek.ObjectID) (*ecdsa.PrivateKey, error) {
	return load(s, s.signer, id, func() (*ecdsa.PrivateKey, error) { return s.readSigner(kindSigner, id) })
}

// SignerPublic returns the public half of signer id: *ecdsa.PublicKey, or on
// tokens without EC *rsa.PublicKey. It wraps ErrNotFound if there is none.
func (s *Software) SignerPublic(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.loadSigner(id)
	if err != nil {
		return nil, err
	}
	return key.Public(), nil
}

// Sign signs a SHA-256 digest with signer id: ECDSA as ASN.1 (on tokens without
// EC: RSA PKCS #1 v1.5). It wraps ErrInvalid for other digest sizes.
func (s *Software) Sign(ctx context.Context, id dek.ObjectID, digest []byte) ([]byte, error) {
	if err := checkDigest(digest); err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.loadSigner(id)
	if err != nil {
		return nil, err
	}
	sig, err := ecdsa.SignASN1(rand.Reader, key, digest)
	if err != nil {
		return nil, fmt.Errorf("%w: sign: %w", dek.ErrUnavailable, err)
	}
	return sig, nil
}

// GenerateRoot makes the root key id. It wraps ErrExists if any object has it.
func (s *Software) GenerateRoot(ctx context.Context, id dek.ObjectID) error {
	if err := checkID(id); err != nil {
		return err
	}
	if err := s.ready(ctx); err != nil {
		return err
	}
	if err := s.files.free(id); err != nil {
		return err
	}
	key, err := dek.NewKey()
	if err != nil {
		return err
	}
	defer key.Destroy()
	return key.Use(func(b []byte) error { return s.write(kindRoot, id, b) })
}

func (s *Software) loadRoot(id dek.ObjectID) (*dek.Key, error) {
	return load(s, s.root, id, func() (*dek.Key, error) {
		b, err := s.files.read(kindRoot, id)
		if err != nil {
			return nil, err
		}
		key, err := dek.KeyFrom(b)
		if errors.Is(err, dek.ErrInvalid) {
			return nil, fmt.Errorf("%w: root %x in the software token", dek.ErrCorrupt, id)
		}
		return key, err
	})
}

// SealKey seals k for the place b under root. The result is at most 2048 bytes.
// It wraps ErrNotFound if there is no such root.
func (s *Software) SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.loadRoot(root)
	if err != nil {
		return nil, err
	}
	var sealed []byte
	err = k.Use(func(plain []byte) error {
		sealed, err = key.Seal(b, plain)
		return closedUnderway(err)
	})
	if err != nil {
		return nil, err
	}
	return append(sealHeader(algSoftware, root), sealed...), nil
}

// OpenKey opens what SealKey sealed under root for the same b. It wraps ErrAuth,
// with no hint why, for anything else.
func (s *Software) OpenKey(ctx context.Context, root dek.ObjectID, b dek.Binding, sealed []byte) (*dek.Key, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	key, err := s.loadRoot(root)
	if err != nil {
		return nil, err
	}
	alg, _, payload, err := splitSealed(root, sealed)
	if err != nil || alg != algSoftware {
		return nil, errSealed()
	}
	plain, err := key.Open(b, payload)
	if errors.Is(err, dek.ErrDestroyed) {
		return nil, closedUnderway(err) // says nothing about what was sealed
	}
	if err != nil || len(plain) != dek.KeySize {
		clear(plain)
		return nil, errSealed()
	}
	return dek.KeyFrom(plain)
}

// closedUnderway turns the answer of a key of the token's own that Close or
// DestroyPair has wiped meanwhile into one for callers.
func closedUnderway(err error) error {
	if errors.Is(err, dek.ErrDestroyed) {
		return fmt.Errorf("%w: the key of the token was closed or destroyed meanwhile", dek.ErrUnavailable)
	}
	return err
}

// Health reports whether the directory is still there and ours.
func (s *Software) Health(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	return s.files.check()
}

// Close waits for files that are being written, wipes the roots and releases
// the directory. Calls under way may fail, wrapping ErrUnavailable. It may be
// called twice.
func (s *Software) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	for _, k := range s.root {
		k.Destroy()
	}
	clear(s.rsa)
	clear(s.signer)
	clear(s.root)
	return s.files.close()
}
