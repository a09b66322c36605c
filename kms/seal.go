package kms

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/keyward/keyward/dek"
)

// recordHead is what stands before the sealed part of a record: format
// version, system seal key version, change counter.
const recordHead = 1 + 4 + 8

// A sum is the digest of a set of records: the sum modulo 2^256 of one HMAC
// per record (MSet-Add-Hash of Clarke et al., ASIACRYPT 2003). Adding and
// taking away a record costs the same however many there are. It is only ever
// stored sealed.
type sum [4]uint64

func sumFrom(b []byte) (s sum) {
	for i := range s {
		s[i] = binary.BigEndian.Uint64(b[len(b)-8*(i+1):])
	}
	return s
}

func (s sum) bytes() []byte {
	b := make([]byte, 0, 32)
	for _, w := range slices.Backward(s[:]) {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	return b
}

func (s sum) add(o sum) (r sum) {
	var carry uint64
	for i := range s {
		r[i], carry = bits.Add64(s[i], o[i], carry)
	}
	return r
}

func (s sum) sub(o sum) (r sum) {
	var borrow uint64
	for i := range s {
		r[i], borrow = bits.Sub64(s[i], o[i], borrow)
	}
	return r
}

// A sealer seals the records of one installation under its system seal key
// and computes their terms in the digest. It is used under the writer's lock.
type sealer struct {
	installation string
	keys         map[dek.Version]*dek.Key // every version; the Service destroys them
	current      dek.Version
	digest       []byte // HMAC key of the terms, from the oldest version
	used         uint64 // seals of the current version so far, never under-counted
}

// newSealer takes keys over. The digest key comes from the oldest version, so
// that rolling the seal key does not touch the digest.
func newSealer(installation string, keys map[dek.Version]*dek.Key, used uint64) (*sealer, error) {
	s := &sealer{installation: installation, keys: keys, used: used}
	oldest := dek.Version(0)
	for v := range keys {
		s.current = max(s.current, v)
		if oldest == 0 || v < oldest {
			oldest = v
		}
	}
	if oldest == 0 {
		return nil, fmt.Errorf("%w: no system seal key", dek.ErrCorrupt)
	}
	err := keys[oldest].Use(func(b []byte) (err error) {
		s.digest, err = hkdf.Key(sha256.New, b, []byte(installation), "keyward/state-digest/v1", sha256.Size)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("derive digest key: %w", err)
	}
	return s, nil
}

func (s *sealer) binding(path string, counter uint64) dek.Binding {
	return dek.Binding{Purpose: dek.PurposeRecord, Vault: s.installation, Object: path, Version: counter}
}

// seal returns the stored form of a record.
func (s *sealer) seal(path string, counter uint64, plain []byte) ([]byte, error) {
	s.used++
	sealed, err := s.keys[s.current].Seal(s.binding(path, counter), plain)
	if err != nil {
		return nil, fmt.Errorf("seal record %q: %w", path, err)
	}
	out := make([]byte, recordHead, recordHead+len(sealed))
	out[0] = recordVersion
	binary.BigEndian.PutUint32(out[1:], uint32(s.current))
	binary.BigEndian.PutUint64(out[5:], counter)
	return append(out, sealed...), nil
}

// open returns what seal was given. The error wraps dek.ErrCorrupt and names
// the path.
func (s *sealer) open(path string, value []byte) (plain []byte, counter uint64, err error) {
	bad := fmt.Errorf("%w: record %q was changed, or belongs to another place or installation", dek.ErrCorrupt, path)
	if len(value) < recordHead || value[0] != recordVersion {
		return nil, 0, bad
	}
	key := s.keys[dek.Version(binary.BigEndian.Uint32(value[1:]))]
	counter = binary.BigEndian.Uint64(value[5:])
	if key == nil {
		return nil, 0, bad
	}
	plain, err = key.Open(s.binding(path, counter), value[recordHead:])
	if err != nil {
		return nil, 0, bad
	}
	return plain, counter, nil
}

// term is what a record adds to the digest.
func (s *sealer) term(path string, counter uint64, value []byte) sum {
	h := sha256.Sum256(value)
	m := hmac.New(sha256.New, s.digest)
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(len(path)))
	m.Write(b[:])
	m.Write([]byte(path))
	binary.BigEndian.PutUint64(b[:], counter)
	m.Write(b[:])
	m.Write(h[:])
	return sumFrom(m.Sum(nil))
}

// stateHash is what the audit log keeps of a sealed head.
func stateHash(head []byte) []byte {
	h := sha256.Sum256(head)
	return h[:]
}

// The bindings of seal keys: under the root of the token and to a recovery
// recipient. The system seal key has the empty vault name.
func sealKeyBinding(vault string, v dek.Version) dek.Binding {
	return dek.Binding{Purpose: dek.PurposeSealKey, Vault: vault, Version: uint64(v)}
}

func dekRecoveryBinding(id dek.KeyID) dek.Binding {
	return dek.Binding{Purpose: dek.PurposeDEK, Vault: id.Vault, Object: id.Keyring, Version: uint64(id.Version)}
}
