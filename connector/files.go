package connector

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/keyward/keyward/dek"
)

// writeFileDurably replaces path by b so that a crash at any instruction
// leaves the old or the new content: temporary file, fsync, rename, fsync of
// the directory. It wraps dek.ErrExhausted when the disk is full, else
// dek.ErrUnavailable.
func writeFileDurably(path string, b []byte, mode fs.FileMode) error {
	return writeDurably(path, mode, func(f *os.File) error {
		_, err := f.Write(b)
		return err
	})
}

func writeDurably(path string, mode fs.FileMode, fill func(*os.File) error) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return diskError(path, err)
	}
	err = fill(f)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return diskError(path, err)
	}
	return syncDir(dir)
}

// syncDir makes a rename in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // a directory of ours
	if err != nil {
		return diskError(dir, err)
	}
	err = errors.Join(d.Sync(), d.Close())
	if err != nil {
		return diskError(dir, err)
	}
	return nil
}

func diskError(path string, err error) error {
	class := dek.ErrUnavailable
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		class = dek.ErrExhausted
	}
	return fmt.Errorf("%w: write %s: %w", class, path, err)
}
