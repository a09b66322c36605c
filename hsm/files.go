package hsm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/keyward/keyward/dek"
)

// writeDurable writes name in dir with mode 0600 so that after a crash at any
// instruction the file is either whole or absent: temporary file, fsync,
// rename, fsync of the directory.
func writeDurable(dir, name string, b []byte) (err error) {
	f, err := os.CreateTemp(dir, name+".*"+tempSuffix) // mode 0600
	if err != nil {
		return fmt.Errorf("%w: write %s: %w", dek.ErrUnavailable, name, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("%w: write %s: %w", dek.ErrUnavailable, name, err)
		}
	}()
	if _, err = f.Write(b); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), filepath.Join(dir, name)); err != nil {
		return err
	}
	return syncDir(dir)
}

// overwrite replaces the content of a file without needing more of the disk, if
// it had that size.
func overwrite(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(b, 0); err == nil {
		err = errors.Join(f.Truncate(int64(len(b))), f.Sync())
	}
	return errors.Join(err, f.Close())
}

// syncDir makes renames and removals in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readPrivate reads a secret file of at most limit bytes. It wraps
// ErrPrecondition unless the file is regular and closed to group and others,
// and fs.ErrNotExist if it is absent. The caller wipes the result.
func readPrivate(path string, limit int) ([]byte, error) {
	// O_NONBLOCK: opening a FIFO must not hang before its type is checked.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrPrecondition, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", dek.ErrPrecondition, err)
	}
	if err := checkPrivate(path, st); err != nil {
		return nil, err
	}
	if st.Size() > int64(limit) {
		return nil, fmt.Errorf("%w: %s has %d bytes; at most %d are expected", dek.ErrPrecondition, path, st.Size(), limit)
	}
	b := make([]byte, limit+1)
	n, err := io.ReadFull(f, b)
	if n > limit || err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		clear(b)
		return nil, fmt.Errorf("%w: read %s: %w", dek.ErrPrecondition, path, errors.Join(err, errShort))
	}
	return b[:n], nil
}

// checkPrivate refuses what is not a regular file, or open to group or others.
// A systemd credential shows the mask of its access list as group-readable
// (systemd.exec(5), LoadCredential=); its directory is closed to all others.
func checkPrivate(path string, st os.FileInfo) error {
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", dek.ErrPrecondition, path)
	}
	open := os.FileMode(0o077)
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" && filepath.Dir(filepath.Clean(path)) == filepath.Clean(dir) {
		open = 0o037
	}
	if perm := st.Mode().Perm(); perm&open != 0 {
		return fmt.Errorf("%w: %s is open to group or others (mode %04o): chmod 600 %s", dek.ErrPrecondition, path, perm, path)
	}
	return nil
}

// checkPrivateDir refuses a directory that group or others may enter.
func checkPrivateDir(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("%w: %w", dek.ErrPrecondition, err)
	}
	if !st.IsDir() || st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: %s must be a directory closed to group and others: chmod 700 %s", dek.ErrPrecondition, dir, dir)
	}
	return nil
}
