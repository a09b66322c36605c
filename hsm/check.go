package hsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/keyward/keyward/dek"
)

const (
	defaultDeadline         = 10 * time.Second
	defaultGenerateDeadline = 2 * time.Minute
	maxWorkers              = 256
)

// Check reports every mistake in c at once, without touching the token. Each
// wraps ErrInvalid (malformed) or ErrPrecondition (a file is not as it must be).
func (c Config) Check() error {
	_, err := c.complete()
	return err
}

// complete returns c with defaults filled in, or all mistakes.
func (c Config) complete() (Config, error) {
	u, uriErr := parseURI(c.TokenURI)
	if c.PINFile == "" {
		c.PINFile = u.pinSource
	}
	errs := []error{uriErr, checkModule(c.Module)}
	invalid := func(bad bool, text string) {
		if bad {
			errs = append(errs, fmt.Errorf("%w: %s", dek.ErrInvalid, text))
		}
	}
	invalid(!filepath.IsAbs(c.PINFile), "PIN file: give an absolute path")
	if filepath.IsAbs(c.PINFile) {
		st, err := os.Stat(c.PINFile)
		if err == nil {
			err = checkPrivate(c.PINFile, st)
		} else {
			err = fmt.Errorf("%w: PIN file: %w", dek.ErrPrecondition, err)
		}
		errs = append(errs, err)
	}
	invalid(c.PINState != "" && !filepath.IsAbs(c.PINState), "PIN state file: give an absolute path")
	invalid(c.Deadline < 0 || c.GenerateDeadline < 0, "token deadline: must not be negative")
	invalid(c.Workers < 0 || c.Workers > maxWorkers, fmt.Sprintf("token workers: 0 to %d", maxWorkers))
	invalid(len(c.Child) == 0, "token child: no command")
	for _, s := range []string{c.Module, c.TokenURI, c.PINFile, c.PINState} {
		invalid(len(s) > 4096, "token configuration: a value has more than 4096 bytes")
	}
	if c.Deadline == 0 {
		c.Deadline = defaultDeadline
	}
	if c.GenerateDeadline == 0 {
		c.GenerateDeadline = defaultGenerateDeadline
	}
	if c.Workers == 0 {
		c.Workers = min(runtime.NumCPU(), maxWorkers)
	}
	return c, errors.Join(errs...)
}

// checkModule refuses a library that someone else could replace: it runs with
// the PIN in its hands.
func checkModule(path string) error {
	_, err := realModule(path)
	return err
}

// realModule is checkModule, and returns the path without symbolic links: the
// links may lie where others can turn them, so what is loaded is what was
// checked.
func realModule(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("%w: PKCS#11 module %q: give an absolute path", dek.ErrInvalid, path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("%w: PKCS#11 module: %w", dek.ErrPrecondition, err)
	}
	st, err := os.Stat(real)
	if err != nil {
		return "", fmt.Errorf("%w: PKCS#11 module: %w", dek.ErrPrecondition, err)
	}
	if !st.Mode().IsRegular() {
		return "", fmt.Errorf("%w: PKCS#11 module %s is not a regular file", dek.ErrPrecondition, real)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%w: PKCS#11 module %s may be written by group or others: chmod go-w %s", dek.ErrPrecondition, real, real)
	}
	if err := ownedByUs(real, st); err != nil {
		return "", err
	}
	for dir := filepath.Dir(real); ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		if err != nil {
			return "", fmt.Errorf("%w: PKCS#11 module: %w", dek.ErrPrecondition, err)
		}
		// The sticky bit keeps others from replacing what is not theirs.
		if st.Mode().Perm()&0o002 != 0 && st.Mode()&os.ModeSticky == 0 {
			return "", fmt.Errorf("%w: PKCS#11 module %s lies below %s, which everyone may write", dek.ErrPrecondition, real, dir)
		}
		if err := ownedByUs(dir, st); err != nil {
			return "", err
		}
		if dir == string(filepath.Separator) || !strings.HasPrefix(dir, string(filepath.Separator)) {
			return real, nil
		}
	}
}

// ownedByUs refuses what belongs to neither root nor this process's user:
// owners can write, whatever the mode says.
func ownedByUs(path string, st os.FileInfo) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		panic(fmt.Sprintf("hsm: internal error: file information is %T", st.Sys()))
	}
	if uid := int(sys.Uid); uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%w: PKCS#11 module: %s belongs to user %d: chown root %s", dek.ErrPrecondition, path, uid, path)
	}
	return nil
}
