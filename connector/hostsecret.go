package connector

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyward/keyward/dek"
)

// HostSecretCredential is the systemd credential that, if it is passed to the
// program, takes the place of a host secret file.
const HostSecretCredential = "keyward-host-secret"

// hostSecretDigits is the length of a host secret in hexadecimal digits.
const hostSecretDigits = 2 * dek.KeySize

// OpenHostSecret returns the key that seals an agent's identity. The credential
// keyward-host-secret in $CREDENTIALS_DIRECTORY comes first; else path, a file
// of 64 hexadecimal digits that only its owner can read. With create, an absent
// file is made (its directory 0700 if need be). Keep it out of the state
// directory and out of what is backed up. It wraps dek.ErrNotFound if there is
// none, dek.ErrInvalid for a wrong mode or content. The caller destroys the key.
func OpenHostSecret(path string, create bool) (*dek.Key, error) {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		b, err := os.ReadFile(filepath.Join(dir, HostSecretCredential)) //nolint:gosec // systemd's own directory; its ACLs make modes meaningless
		if err == nil {
			return parseHostSecret(HostSecretCredential, b)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: host secret credential: %w", dek.ErrInvalid, err)
		}
	}
	b, err := readPrivate(path, hostSecretDigits+2)
	if errors.Is(err, dek.ErrNotFound) && create {
		return createHostSecret(path)
	}
	if err != nil {
		return nil, fmt.Errorf("host secret: %w", err)
	}
	return parseHostSecret(path, b)
}

func parseHostSecret(name string, b []byte) (*dek.Key, error) {
	defer clear(b)
	raw := make([]byte, dek.KeySize)
	defer clear(raw)
	digits := bytes.TrimRight(b, "\r\n")
	if len(digits) != hostSecretDigits {
		return nil, fmt.Errorf("%w: host secret %s: want %d hexadecimal digits", dek.ErrInvalid, name, hostSecretDigits)
	}
	if _, err := hex.Decode(raw, digits); err != nil {
		return nil, fmt.Errorf("%w: host secret %s: want %d hexadecimal digits", dek.ErrInvalid, name, hostSecretDigits)
	}
	return dek.KeyFrom(raw)
}

// createHostSecret makes a random secret at path. Of two that start at once
// one wins, and both use its secret.
func createHostSecret(path string) (*dek.Key, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, diskError(path, err)
	}
	k, err := dek.NewKey()
	if err != nil {
		return nil, fmt.Errorf("host secret: %w", err)
	}
	text := make([]byte, hostSecretDigits, hostSecretDigits+1)
	defer clear(text[:cap(text)])
	err = k.Use(func(b []byte) error { hex.Encode(text, b); return nil })
	k.Destroy()
	if err != nil {
		return nil, fmt.Errorf("host secret: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".host-secret.*") // 0600, a name of its own
	if err != nil {
		return nil, diskError(path, err)
	}
	_, err = tmp.Write(append(text, '\n'))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Link(tmp.Name(), path) // fails if someone was faster; never replaces
	}
	_ = os.Remove(tmp.Name())
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, diskError(path, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return nil, err
	}
	return OpenHostSecret(path, false)
}

// checkHostSecretPlace refuses a host secret inside the state directory: a copy
// of that directory would then be an identity.
func checkHostSecretPlace(stateDir, path string) error {
	dir, err1 := filepath.Abs(stateDir)
	file, err2 := filepath.Abs(path)
	if err1 != nil || err2 != nil || strings.HasPrefix(file+string(filepath.Separator), dir+string(filepath.Separator)) {
		return fmt.Errorf("%w: host_secret_file %s must not be inside the state directory %s: whoever copies the directory would be this host", dek.ErrInvalid, path, stateDir)
	}
	return nil
}
