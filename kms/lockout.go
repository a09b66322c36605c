package kms

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// Bad ciphertexts are bounded per principal and keyring: padding oracles need
// thousands (Bardou et al., CRYPTO 2012).
const (
	maxBad       = 50
	badWindow    = time.Hour
	badLockout   = time.Hour
	maxAttempts  = 10 // failed enrolments per remote host
	attemptsSpan = 10 * time.Minute
	maxRemotes   = 10_000
)

type lockoutID struct {
	principal string
	ring      dek.KeyringID
}

// lockouts counts bad ciphertexts. Its size is bounded by the principals and
// keyrings there are: only authorised callers reach it.
type lockouts struct{ m sync.Map } // lockoutID -> *lockout

type lockout struct {
	mu    sync.Mutex
	bad   int
	since time.Time
	until time.Time
}

// locked reports whether the principal must wait. It takes no shared lock.
func (l *lockouts) locked(principal string, ring dek.KeyringID, now time.Time) bool {
	e, ok := l.m.Load(lockoutID{principal, ring})
	if !ok {
		return false
	}
	lock := e.(*lockout)
	lock.mu.Lock()
	defer lock.mu.Unlock()
	return now.Before(lock.until)
}

// bad counts one; true: this one locks the principal out.
func (l *lockouts) bad(principal string, ring dek.KeyringID, now time.Time) bool {
	e, _ := l.m.LoadOrStore(lockoutID{principal, ring}, &lockout{})
	lock := e.(*lockout)
	lock.mu.Lock()
	defer lock.mu.Unlock()
	if now.Sub(lock.since) > badWindow || now.Before(lock.since) {
		lock.bad, lock.since = 0, now
	}
	lock.bad++
	if lock.bad < maxBad || now.Before(lock.until) {
		return false
	}
	lock.bad, lock.since, lock.until = 0, now, now.Add(badLockout)
	return true
}

// badness counts a refusal for bad ciphertext and returns what the caller
// gets.
func (s *Service) badness(ctx context.Context, c Caller, ring dek.KeyringID, err error) error {
	if !errors.Is(err, dek.ErrAuth) || !s.lockouts.bad(c.Principal, ring, s.cfg.Clock.Now()) {
		return err
	}
	note := fmt.Sprintf("%s is denied keyring %s for %s: %d bad ciphertexts within %s", c.Principal, ring, badLockout, maxBad, badWindow)
	s.cfg.Logger.Warn("lock-out", "principal", c.Principal, "keyring", ring.String())
	if aerr := s.recordSystem(ctx, Event{Operation: "keyring.lockout", Object: ringScope(ring.Vault, ring.Keyring), Note: note}); aerr != nil {
		return aerr
	}
	return err
}
