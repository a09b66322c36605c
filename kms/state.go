package kms

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/keyward/keyward/dek"
)

// A view is one consistent state in memory. It is never changed once it is
// published; a change makes a new one that shares all it did not touch.
type view struct {
	change    uint64
	epoch     uint64
	state     []byte // hash of the sealed head: what the audit log records
	system    systemRecord
	boot      bootRecord
	vaults    table[*vaultRecord]
	keys      table[*keyState]  // "vault/key"
	rings     table[*ringState] // "vault/keyring"
	instances table[*instanceRecord]
	usage     table[*usageRecord]
	grants    table[[]Grant] // by principal
	denied    table[*deniedRecord]
	tokens    table[*tokenRecord]
	blobs     table[[]byte]
	requests  table[dek.Version] // "path\x00request id"
}

type keyState struct {
	owner    uint64
	rec      *keyRecord
	versions []*keyVersionRecord // index is version-1
}

type ringState struct {
	owner    uint64
	rec      *ringRecord
	versions []*ringVersionRecord // index is version-1
}

// version returns version v or nil.
func (k *keyState) version(v dek.Version) *keyVersionRecord {
	if k == nil || v == 0 || int(v) > len(k.versions) {
		return nil
	}
	return k.versions[v-1]
}

// current returns the newest enabled version or 0.
func (k *keyState) current() dek.Version {
	for i := len(k.versions) - 1; i >= 0; i-- {
		if v := k.versions[i]; v != nil && v.State == Enabled {
			return dek.Version(i + 1)
		}
	}
	return 0
}

func (r *ringState) version(v dek.Version) *ringVersionRecord {
	if r == nil || v == 0 || int(v) > len(r.versions) {
		return nil
	}
	return r.versions[v-1]
}

func (r *ringState) current() dek.Version {
	for i := len(r.versions) - 1; i >= 0; i-- {
		if v := r.versions[i]; v != nil && v.State == Enabled {
			return dek.Version(i + 1)
		}
	}
	return 0
}

func requestKey(path, id string) string { return path + "\x00" + id }

// request returns the version that an earlier call with this id made under path.
func (v *view) request(path, id string) (dek.Version, bool) {
	if id == "" {
		return 0, false
	}
	return v.requests.get(requestKey(path, id))
}

func (v *view) key(vault, name string) *keyState {
	k, _ := v.keys.get(vault + "/" + name)
	if k == nil || k.rec == nil {
		return nil
	}
	return k
}

func (v *view) ring(vault, name string) *ringState {
	r, _ := v.rings.get(vault + "/" + name)
	if r == nil || r.rec == nil {
		return nil
	}
	return r
}

func (v *view) grantsOf(principal string) []Grant {
	g, _ := v.grants.get(principal)
	return g
}

// apply enters one record (plain nil: removed) on behalf of transaction txn.
// v is private to the caller. An error means a path no release writes.
func (v *view) apply(txn uint64, path string, plain []byte) error {
	switch {
	case path == pathBoot:
		return decodeInto(plain, &v.boot)
	case plain == nil && (path == pathInit || path == pathRestore):
		return nil // a marker leaves
	case path == pathSystem:
		return decodeInto(plain, &v.system)
	case strings.HasPrefix(path, prefixKey):
		return v.applyKey(txn, path[len(prefixKey):], plain)
	case strings.HasPrefix(path, prefixRing):
		return v.applyRing(txn, path[len(prefixRing):], plain)
	case strings.HasPrefix(path, prefixVault):
		return enter(&v.vaults, txn, path[len(prefixVault):], plain)
	case strings.HasPrefix(path, prefixInst):
		return enter(&v.instances, txn, path[len(prefixInst):], plain)
	case strings.HasPrefix(path, prefixUsage):
		return enter(&v.usage, txn, path[len(prefixUsage):], plain)
	case strings.HasPrefix(path, prefixDenied):
		return enter(&v.denied, txn, path[len(prefixDenied):], plain)
	case strings.HasPrefix(path, prefixToken):
		return enter(&v.tokens, txn, path[len(prefixToken):], plain)
	case strings.HasPrefix(path, prefixGrants):
		return enterAs(&v.grants, txn, path[len(prefixGrants):], plain, func(r *grantsRecord) []Grant { return r.Grants })
	case strings.HasPrefix(path, prefixBlob):
		return enterAs(&v.blobs, txn, path[len(prefixBlob):], plain, func(r *blobRecord) []byte { return r.Data })
	}
	return fmt.Errorf("%w: record of no known kind", dek.ErrCorrupt)
}

func decodeInto[T any](plain []byte, into *T) error {
	var r T
	if err := decodeStrict(plain, &r); err != nil {
		return err
	}
	*into = r
	return nil
}

func enter[T any](t *table[*T], txn uint64, key string, plain []byte) error {
	return enterAs(t, txn, key, plain, func(r *T) *T { return r })
}

func enterAs[R, T any](t *table[T], txn uint64, key string, plain []byte, as func(*R) T) error {
	if plain == nil {
		t.remove(txn, key)
		return nil
	}
	r := new(R)
	if err := decodeStrict(plain, r); err != nil {
		return err
	}
	t.set(txn, key, as(r))
	return nil
}

func (v *view) applyKey(txn uint64, id string, plain []byte) error {
	id, n, ok := splitVersion(id)
	if !ok || plain == nil { // versions leave a tombstone, they are never removed
		return fmt.Errorf("%w: malformed path", dek.ErrCorrupt)
	}
	old, _ := v.keys.get(id)
	k := old
	if old == nil || old.owner != txn {
		k = &keyState{owner: txn}
		if old != nil {
			k.rec, k.versions = old.rec, slices.Clone(old.versions)
		}
		v.keys.set(txn, id, k)
	}
	if n == 0 {
		k.rec = new(keyRecord)
		return decodeStrict(plain, k.rec)
	}
	r := new(keyVersionRecord)
	if err := decodeStrict(plain, r); err != nil {
		return err
	}
	k.versions = place(k.versions, n, r)
	v.enterRequest(txn, prefixKey+id, r.Request, n)
	return nil
}

func (v *view) applyRing(txn uint64, id string, plain []byte) error {
	id, n, ok := splitVersion(id)
	if !ok || plain == nil {
		return fmt.Errorf("%w: malformed path", dek.ErrCorrupt)
	}
	old, _ := v.rings.get(id)
	k := old
	if old == nil || old.owner != txn {
		k = &ringState{owner: txn}
		if old != nil {
			k.rec, k.versions = old.rec, slices.Clone(old.versions)
		}
		v.rings.set(txn, id, k)
	}
	if n == 0 {
		k.rec = new(ringRecord)
		return decodeStrict(plain, k.rec)
	}
	r := new(ringVersionRecord)
	if err := decodeStrict(plain, r); err != nil {
		return err
	}
	k.versions = place(k.versions, n, r)
	v.enterRequest(txn, prefixRing+id, r.Request, n)
	return nil
}

func (v *view) enterRequest(txn uint64, path, id string, n dek.Version) {
	if id != "" {
		v.requests.set(txn, requestKey(path, id), n)
	}
}

// place puts r at version n, whatever the order records come in.
func place[T any](versions []*T, n dek.Version, r *T) []*T {
	for int(n) > len(versions) {
		versions = append(versions, nil)
	}
	versions[n-1] = r
	return versions
}

// check finds what no sequence of changes produces: versions without their
// key, gaps. The digest excludes tampering, so this finds our own mistakes.
func (v *view) check() error {
	if v.boot.Format != recordVersion {
		return fmt.Errorf("%w: record %q: format %d is not known to this release", dek.ErrCorrupt, pathBoot, v.boot.Format)
	}
	for id, k := range v.keys.all() {
		if k.rec == nil || slices.Contains(k.versions, nil) {
			return fmt.Errorf("%w: record %q: incomplete", dek.ErrCorrupt, prefixKey+id)
		}
	}
	for id, r := range v.rings.all() {
		if r.rec == nil || slices.Contains(r.versions, nil) {
			return fmt.Errorf("%w: record %q: incomplete", dek.ErrCorrupt, prefixRing+id)
		}
	}
	return nil
}

// sorted returns the entries of t whose key starts with prefix, by key.
func sorted[T any](t *table[T], prefix string) []entry[T] {
	var out []entry[T]
	for k, e := range t.all() {
		if strings.HasPrefix(k, prefix) {
			out = append(out, entry[T]{k, e})
		}
	}
	slices.SortFunc(out, func(a, b entry[T]) int { return cmp.Compare(a.key, b.key) })
	return out
}

type entry[T any] struct {
	key   string
	value T
}
