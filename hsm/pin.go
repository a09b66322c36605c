package hsm

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

const (
	maxPIN        = 255
	pinStateMagic = "KWPIN01\n"
	pinSaltSize   = 16
	pinHashSize   = 2
	pinRounds     = 600_000 // OWASP's figure for PBKDF2-HMAC-SHA256
)

// login reads the PIN and logs in: once per process life, because SoftHSM
// rewrites the token file at each login, and once per content of the PIN file,
// because three wrong PINs lock a real token.
func (d *device) login(s *session, h hello, info pkcs11.TokenInfo) error {
	if info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0 {
		return pinError(h.pinFile, "the user PIN is locked: have the security officer reset it")
	}
	if info.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0 && info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0 {
		return fmt.Errorf("%w: the token has no user PIN yet", dek.ErrPrecondition)
	}
	pin, err := readPIN(h.pinFile)
	if err != nil {
		return err
	}
	defer clear(pin)
	if refusedBefore(h.pinState, pin) {
		return pinError(h.pinFile, "this PIN was refused before and is not tried again; write the right one into the file (or remove "+h.pinState+")")
	}
	if err := holdState(h.pinState); err != nil {
		return err
	}
	err = d.raw.login(s.h, pin)
	if rv, _ := rvOf(err); rv == pkcs11.CKR_USER_ALREADY_LOGGED_IN {
		err = nil
	}
	if badPIN(err) {
		return errors.Join(pinError(h.pinFile, fmt.Sprintf("the token refused it (%v); it is not tried again until the file changes", err)),
			rememberRefused(h.pinState, pin))
	}
	if err != nil {
		return classed("log in", err)
	}
	if h.pinState != "" {
		if err := os.Remove(h.pinState); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: PIN state: %w", dek.ErrPrecondition, err)
		}
	}
	return nil
}

func pinError(file, why string) error {
	return fmt.Errorf("%w: %w: PIN in %s: %s", dek.ErrPrecondition, errPIN, file, why)
}

// readPIN returns the content of the PIN file less one newline. The caller
// wipes it.
func readPIN(path string) ([]byte, error) {
	b, err := readPrivate(path, maxPIN+2)
	if err != nil {
		return nil, fmt.Errorf("PIN file: %w", err)
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(pin) == 0 || len(pin) > maxPIN {
		clear(b)
		return nil, fmt.Errorf("%w: PIN file %s: 1 to %d bytes are expected", dek.ErrPrecondition, path, maxPIN)
	}
	return pin, nil
}

// The PIN state file: magic, salt, two bytes of a slow hash of the refused PIN.
// Two bytes recognise the same PIN in a new file (systemd makes a new credential
// file at every start) and tell a thief next to nothing about it; another PIN
// is taken for it once in 65,536 times, and the message says what to do then.
func refusedBefore(state string, pin []byte) bool {
	if state == "" {
		return false
	}
	b, err := os.ReadFile(state)
	if err != nil || len(b) != len(pinStateMagic)+pinSaltSize+pinHashSize || !bytes.HasPrefix(b, []byte(pinStateMagic)) {
		return false
	}
	salt, want := b[len(pinStateMagic):len(b)-pinHashSize], b[len(b)-pinHashSize:]
	got, err := pinHash(pin, salt)
	return err == nil && bytes.Equal(got, want)
}

// holdState makes the state file before the PIN is used, of the size and in the
// place that it will have: a full or read-only disk must be found before the
// attempt, or every restart would spend one more and lock the token. All zero,
// it names no PIN.
func holdState(state string) error {
	if state == "" {
		return nil
	}
	if _, err := os.Stat(state); err == nil {
		return nil // an older refusal: its blocks will do
	}
	b := make([]byte, len(pinStateMagic)+pinSaltSize+pinHashSize)
	if err := writeDurable(filepath.Dir(state), filepath.Base(state), b); err != nil {
		return fmt.Errorf("%w: PIN state: no login without it: %w", dek.ErrPrecondition, err)
	}
	return nil
}

func rememberRefused(state string, pin []byte) error {
	if state == "" {
		return nil
	}
	salt := make([]byte, pinSaltSize)
	rand.Read(salt)
	sum, err := pinHash(pin, salt)
	if err != nil {
		return fmt.Errorf("%w: PIN state: %w", dek.ErrPrecondition, err)
	}
	b := append(append([]byte(pinStateMagic), salt...), sum...)
	if err := overwrite(state, b); err != nil {
		return fmt.Errorf("%w: PIN state: %w", dek.ErrPrecondition, err)
	}
	return nil
}

func pinHash(pin, salt []byte) ([]byte, error) {
	// The string is a copy that can't be wiped; the process that makes it ends
	// right after a refusal, and otherwise there is no state file.
	return pbkdf2.Key(sha256.New, string(pin), salt, pinRounds, pinHashSize)
}

// A pinStamp tells whether a PIN file may have changed, without reading it.
type pinStamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

// stampPIN returns the zero stamp if the file can't be looked at.
func stampPIN(path string) pinStamp {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return pinStamp{}
	}
	return pinStamp{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}
}
