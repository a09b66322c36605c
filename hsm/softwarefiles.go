package hsm

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/keyward/keyward/dek"
)

// The file key: magic, serial in hex, 32 bytes.
const (
	fileKeyName  = "token.key"
	fileKeyMagic = "KWSOFT1\n"
	serialBytes  = 8
	fileKeySize  = len(fileKeyMagic) + 2*serialBytes + dek.KeySize
	maxSoftware  = 8192 // bytes of an object file
	tempSuffix   = ".tmp"
)

// softwareFiles is the directory of a software token: one file per object,
// sealed under the file key and bound to its name.
type softwareFiles struct {
	dir    string
	serial string
	lock   *os.File
	key    *dek.Key

	mu sync.Mutex // writers; a file appears by one rename
}

// openSoftwareFiles locks dir, makes it if needed and reads the file key.
func openSoftwareFiles(dir string) (*softwareFiles, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrPrecondition, err)
	}
	if err := checkPrivateDir(dir); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrPrecondition, err)
	}
	f := &softwareFiles{dir: dir, lock: lock}
	if err := f.begin(); err != nil {
		lock.Close()
		return nil, err
	}
	return f, nil
}

// begin takes the lock, drops what a crash left half-written, and loads or
// makes the file key.
func (f *softwareFiles) begin() error {
	if err := syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("%w: another process has it open", dek.ErrPrecondition)
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	objects := 0
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := os.Remove(filepath.Join(f.dir, e.Name())); err != nil {
				return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
			}
		} else if _, _, ok := parseObjectName(e.Name()); ok {
			objects++
		}
	}
	b, err := readPrivate(filepath.Join(f.dir, fileKeyName), fileKeySize)
	if errors.Is(err, fs.ErrNotExist) {
		if objects > 0 {
			return fmt.Errorf("%w: %d key files but no %s; restore it from a backup", dek.ErrCorrupt, objects, fileKeyName)
		}
		return f.makeFileKey()
	}
	if err != nil {
		return err
	}
	return f.useFileKey(b)
}

func (f *softwareFiles) makeFileKey() error {
	b := make([]byte, fileKeySize)
	defer clear(b)
	copy(b, fileKeyMagic)
	serial := make([]byte, serialBytes)
	rand.Read(serial)
	hex.Encode(b[len(fileKeyMagic):], serial)
	rand.Read(b[fileKeySize-dek.KeySize:])
	if err := writeDurable(f.dir, fileKeyName, b); err != nil {
		return err
	}
	return f.useFileKey(b)
}

// useFileKey parses and wipes b.
func (f *softwareFiles) useFileKey(b []byte) error {
	defer clear(b)
	if len(b) != fileKeySize || !bytes.HasPrefix(b, []byte(fileKeyMagic)) {
		return fmt.Errorf("%w: %s is not a file key of this version", dek.ErrCorrupt, fileKeyName)
	}
	f.serial = string(b[len(fileKeyMagic) : fileKeySize-dek.KeySize])
	key, err := dek.KeyFrom(b[fileKeySize-dek.KeySize:])
	f.key = key
	return err
}

func (f *softwareFiles) binding(kind objectKind, id dek.ObjectID) dek.Binding {
	return dek.Binding{Purpose: dek.PurposePrivateKey, Vault: f.serial, Object: objectName(kind, id), Version: 1}
}

// free wraps ErrExists if any object has id.
func (f *softwareFiles) free(id dek.ObjectID) error {
	taken, err := f.with(id)
	if err == nil && len(taken) > 0 {
		err = fmt.Errorf("%w: object %x in the token", dek.ErrExists, id)
	}
	return err
}

// with returns the file names of objects with id.
func (f *softwareFiles) with(id dek.ObjectID) ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	var names []string
	for _, e := range entries {
		if kind, other, ok := parseObjectName(e.Name()); ok && other == id && kind != kindIdentity {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// write makes the object durable, or nothing. ErrExists if it is there.
func (f *softwareFiles) write(kind objectKind, id dek.ObjectID, plain []byte) error {
	sealed, err := f.key.Seal(f.binding(kind, id), plain)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.free(id); err != nil {
		return err
	}
	return writeDurable(f.dir, objectName(kind, id), sealed)
}

// read returns the object's bytes; the caller wipes them.
func (f *softwareFiles) read(kind objectKind, id dek.ObjectID) ([]byte, error) {
	name := objectName(kind, id)
	sealed, err := readPrivate(filepath.Join(f.dir, name), maxSoftware)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no %s key %x in the token", dek.ErrNotFound, kind, id)
	}
	if err != nil {
		return nil, err
	}
	plain, err := f.key.Open(f.binding(kind, id), sealed)
	if errors.Is(err, dek.ErrDestroyed) {
		return nil, errClosed()
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s is damaged or from another token", dek.ErrCorrupt, name)
	}
	return plain, nil
}

// remove deletes every object with id and makes that durable.
func (f *softwareFiles) remove(id dek.ObjectID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	names, err := f.with(id)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(f.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
		}
	}
	if err := syncDir(f.dir); err != nil {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	return nil
}

// list returns the sorted ids of all objects of the kinds.
func (f *softwareFiles) list(kinds ...objectKind) ([]dek.ObjectID, error) {
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	var ids []dek.ObjectID
	for _, e := range entries {
		if kind, id, ok := parseObjectName(e.Name()); ok && slices.Contains(kinds, kind) {
			ids = append(ids, id)
		}
	}
	sortIDs(ids)
	return ids, nil
}

// check reports whether the directory still holds the file key we read.
func (f *softwareFiles) check() error {
	b, err := readPrivate(filepath.Join(f.dir, fileKeyName), fileKeySize)
	if err != nil {
		return fmt.Errorf("%w: %w", dek.ErrUnavailable, err)
	}
	defer clear(b)
	if len(b) != fileKeySize || string(b[len(fileKeyMagic):fileKeySize-dek.KeySize]) != f.serial {
		return fmt.Errorf("%w: another software token lies in %s", dek.ErrPrecondition, f.dir)
	}
	return nil
}

func (f *softwareFiles) close() error {
	f.key.Destroy()
	return f.lock.Close() // releases the lock
}

func objectName(kind objectKind, id dek.ObjectID) string {
	return hex.EncodeToString(id[:]) + "." + kind.String()
}

func parseObjectName(name string) (objectKind, dek.ObjectID, bool) {
	head, tail, _ := strings.Cut(name, ".")
	b, err := hex.DecodeString(head)
	if err != nil || len(b) != len(dek.ObjectID{}) || strings.ToLower(head) != head {
		return 0, dek.ObjectID{}, false
	}
	for kind := kindMaster; kind <= kindIdentity; kind++ {
		if tail == kind.String() {
			return kind, dek.ObjectID(b), true
		}
	}
	return 0, dek.ObjectID{}, false
}

func sortIDs(ids []dek.ObjectID) {
	slices.SortFunc(ids, func(a, b dek.ObjectID) int { return bytes.Compare(a[:], b[:]) })
}
