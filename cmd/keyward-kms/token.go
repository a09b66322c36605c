package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
)

// A device is what hsm's tokens have in common; with a name and a preferred
// hash it is a kms.Token.
type device interface {
	kms.Pairs
	kms.Decrypter
	kms.Sealer
	kms.Signer
	Health(ctx context.Context) error
	io.Closer
	Identity() hsm.Identity
	Capabilities() hsm.Capabilities
}

type token struct{ device }

// OAEPHash implements kms.Token.
func (t token) OAEPHash() crypto.Hash { return t.Capabilities().PreferredOAEP() }

// RestsOnRSA implements kms.Token.
func (t token) RestsOnRSA(sealed []byte) bool { return hsm.RestsOnRSA(sealed) }

// Describe implements kms.Token.
func (t token) Describe() string {
	id := t.Identity()
	text := fmt.Sprintf("%s (%s %s, serial %s)", id.Label, id.Manufacturer, id.Model, id.Serial)
	if missing := t.Capabilities().Missing(); len(missing) > 0 {
		text += "; can't do: " + strings.Join(missing, ", ")
	}
	return text
}

// openToken opens the configured token, which must be the expected one; zero
// expects none in particular.
func openToken(ctx context.Context, c *Config, expect hsm.Identity, log *slog.Logger) (token, error) {
	if c.SoftwareToken != "" {
		s, err := hsm.OpenSoftware(c.SoftwareToken)
		if err != nil {
			return token{}, err
		}
		if id := s.Identity(); expect != (hsm.Identity{}) && id.Fingerprint != expect.Fingerprint {
			err := fmt.Errorf("%w: open token in %s: this is another token (%s, not %s); put the right one back",
				dek.ErrPrecondition, c.SoftwareToken, id.Serial, expect.Serial)
			return token{}, errors.Join(err, s.Close())
		}
		return token{s}, nil
	}
	var deadline time.Duration
	if c.Token.Deadline != "" {
		d, err := time.ParseDuration(c.Token.Deadline)
		if err != nil {
			return token{}, fmt.Errorf("token.deadline: %w", err)
		}
		deadline = d
	}
	pinFile, err := c.Token.pinFile()
	if err != nil {
		return token{}, err
	}
	t, err := hsm.Open(ctx, hsm.Config{
		Module: c.Token.Module, TokenURI: c.Token.URI, PINFile: pinFile,
		PINState: filepath.Join(c.StateDir, "pin-state"), Expect: expect,
		Deadline: deadline, Workers: c.Token.Workers,
		Child: []string{"/proc/self/exe", childArgument}, Logger: log,
	})
	if err != nil {
		return token{}, fmt.Errorf("open token %q: %w", c.Token.URI, err)
	}
	return token{t}, nil
}

// pinName is the file in StateDir that names the token this service belongs to:
// another one in the slot is refused. It is written once the token has opened
// the state, which only the right one can.
const pinName = "token.json"

func readPin(c *Config) (hsm.Identity, error) {
	var id hsm.Identity
	err := readJSON(filepath.Join(c.StateDir, pinName), &id)
	if errors.Is(err, os.ErrNotExist) {
		return hsm.Identity{}, nil
	}
	if err == nil && id.Fingerprint == "" {
		err = fmt.Errorf("%w: %s names no token", dek.ErrCorrupt, pinName)
	}
	return id, err
}

func writePin(c *Config, t token) error {
	return writeJSON(filepath.Join(c.StateDir, pinName), t.Identity())
}

// pinFirst pins the token unless that is done.
func pinFirst(c *Config, t token) error {
	if id, err := readPin(c); err != nil || id != (hsm.Identity{}) {
		return err
	}
	return writePin(c, t)
}

// A backupDir puts sealed backups into a directory, crash-safe.
type backupDir struct{ dir string }

// String is what status shows.
func (b backupDir) String() string { return b.dir }

// Put implements kms.BackupTarget: the file is complete and on disk, or absent.
func (b backupDir) Put(_ context.Context, name string, r io.Reader) error {
	if name != filepath.Base(name) {
		return fmt.Errorf("%w: backup name %q", dek.ErrInvalid, name)
	}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return fmt.Errorf("%w: backup_dir: %w", dek.ErrUnavailable, err)
	}
	return writeFile(filepath.Join(b.dir, name), r)
}
