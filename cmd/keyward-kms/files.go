package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/keyward/keyward/dek"
)

// writeFile replaces name by what r holds: written beside it, synced, renamed,
// and the directory synced, so that a crash leaves the old file or the new.
func writeFile(name string, r io.Reader) error {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return fileError("write", name, err)
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fileError("write", name, errors.Join(err, remove(f.Name())))
	}
	return syncDir(dir)
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fileError("sync", dir, err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return fileError("sync", dir, err)
}

// checkFree reports whether a file can be made at name: the place is free and
// its directory takes files.
func checkFree(name string) error {
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%w: %s: choose another name or remove it", dek.ErrExists, name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".new-*")
	if err != nil {
		return fileError("write", name, err)
	}
	return fileError("write", name, errors.Join(f.Close(), os.Remove(f.Name())))
}

func remove(name string) error {
	if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// fileError gives an error of the file system its class.
func fileError(verb, name string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %s %s: %w", dek.ErrExhausted, verb, name, err)
	default:
		return fmt.Errorf("%w: %s %s: %w", dek.ErrUnavailable, verb, name, err)
	}
}

func writeJSON(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(name, bytes.NewReader(append(b, '\n')))
}

func readJSON(name string, v any) error {
	b, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %s: %w", dek.ErrCorrupt, name, err)
	}
	return nil
}

// makeDir makes a private directory or checks that it is one. Its own name is
// on disk too: what is synced inside would be lost with it.
func makeDir(field, name string) error {
	if err := os.MkdirAll(name, 0o700); err != nil {
		return fmt.Errorf("%w: %s: %w", dek.ErrInvalid, field, err)
	}
	if err := syncDir(filepath.Dir(name)); err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	fi, err := os.Stat(name)
	if err != nil {
		return fmt.Errorf("%s: %w", field, err)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: %s: %s is open to others (mode %04o): chmod 700 %s",
			dek.ErrInvalid, field, name, fi.Mode().Perm(), name)
	}
	return nil
}
