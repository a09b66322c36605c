package kms

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// A token's text is this prefix and base64url of its id and secret.
const (
	tokenPrefix   = "kwt1_"
	tokenIDBytes  = 12
	tokenSecBytes = 32
)

// errEnrol is the one answer to every token that does not work.
func errEnrol() error { return fmt.Errorf("enrolment token: %w", dek.ErrDenied) }

// newToken makes a token and the record of its hash.
func (s *Service) newToken(c Caller, principal string, lifetime time.Duration) (TokenText, string, *tokenRecord, error) {
	raw := make([]byte, tokenIDBytes+tokenSecBytes)
	defer clear(raw)
	rand.Read(raw)
	hash := sha256.Sum256(raw[tokenIDBytes:])
	rec := &tokenRecord{Hash: hash[:], Principal: principal, By: c.Principal, Expires: s.now().Add(or(lifetime, defaultLifetime))}
	text := TokenText(tokenPrefix + base64.RawURLEncoding.EncodeToString(raw))
	return text, hex.EncodeToString(raw[:tokenIDBytes]), rec, nil
}

// parseToken takes a text apart; ok is false for anything else.
func parseToken(text TokenText) (id string, hash [sha256.Size]byte, ok bool) {
	body, found := strings.CutPrefix(string(text), tokenPrefix)
	if !found || len(body) != base64.RawURLEncoding.EncodedLen(tokenIDBytes+tokenSecBytes) {
		return "", hash, false
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		return "", hash, false
	}
	defer clear(raw)
	return hex.EncodeToString(raw[:tokenIDBytes]), sha256.Sum256(raw[tokenIDBytes:]), true
}

// NewEnrolmentToken makes a one-time token for a principal; it replaces the
// unused ones before it. Lifetime 0: one hour; at most 30 days. It wraps
// dek.ErrInvalid, dek.ErrDenied, dek.ErrPrecondition (revoked principal).
func (s *Service) NewEnrolmentToken(ctx context.Context, c Caller, principal string, lifetime time.Duration) (*EnrolmentToken, error) {
	var out *EnrolmentToken
	input := errors.Join(checkPrincipal(principal), checkLifetime(lifetime))
	err := s.do(ctx, c, OpTokenCreate, "/", input, func(a *act) error {
		a.ev.Object, a.ev.Note = "/enrolment", principal
		text, id, rec, err := s.newToken(c, principal, lifetime)
		if err != nil {
			return err
		}
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			if _, denied := v.denied.get(principal); denied {
				return nil, fmt.Errorf("%w: %s is revoked; use another name", dek.ErrPrecondition, principal)
			}
			muts := []mut{{prefixToken + id, rec}}
			for old, t := range v.tokens.all() {
				if t.Principal == principal && t.Used.IsZero() {
					muts = append(muts, mut{prefixToken + old, nil})
				}
			}
			return muts, bounded(muts)
		})
		out = &EnrolmentToken{Principal: principal, Expires: rec.Expires, Text: text}
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// attempts bounds guessing per remote host. It forgets all when it is full:
// the token itself has 256 bits, this only keeps the log readable.
type attempts struct {
	mu sync.Mutex
	m  map[string]*attempt // guarded by mu
}

type attempt struct {
	failed  int
	since   time.Time
	blocked int // tries while blocked
}

// blocked returns 0, or the how-manieth try of a host this is that failed too
// often lately. Tries are recorded at 1, 2, 4, 8, ...: a stranger who goes on
// for ever must not fill the disk that every key use needs.
func (t *attempts) blocked(remote string, now time.Time) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.m[host(remote)]
	switch {
	case e == nil:
		return 0
	case now.Sub(e.since) > attemptsSpan || now.Before(e.since):
		delete(t.m, host(remote))
		return 0
	case e.failed < maxAttempts:
		return 0
	}
	e.blocked++
	return e.blocked
}

func (t *attempts) failed(remote string, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil || len(t.m) >= maxRemotes {
		t.m = make(map[string]*attempt)
	}
	e := t.m[host(remote)]
	if e == nil {
		e = &attempt{since: now}
		t.m[host(remote)] = e
	}
	e.failed++
}

// host is a network address without its port.
func host(remote string) string {
	if i := strings.LastIndexByte(remote, ':'); i >= 0 {
		return remote[:i]
	}
	return remote
}

// Redeem burns a one-time token and then has issue make the certificate for
// its principal. The token is spent even if issue fails: ask for a new one.
// Whatever is wrong with a token (unknown, expired, used, too many attempts
// from this remote host), the error wraps dek.ErrDenied and is recorded (of a
// host that is blocked the 1st, 2nd, 4th, 8th ... try, with its number); a
// second use is an alarm in Status. It wraps dek.ErrUnavailable if nothing was
// decided.
func (s *Service) Redeem(ctx context.Context, c Caller, text TokenText, issue func(principal string) error) error {
	if err := s.ready(); err != nil {
		return err
	}
	c.Principal = ""
	ev := s.event(c, OpEnroll, "/enrolment")
	now := s.cfg.Clock.Now()
	if n := s.attempts.blocked(c.Remote, now); n > 0 {
		if n&(n-1) != 0 {
			return errEnrol()
		}
		ev.Rule, ev.Count = "too many attempts from this host", n
		return s.refuse(ctx, ev, errEnrol())
	}
	id, hash, ok := parseToken(text)
	v := s.view.Load()
	rec, known := v.tokens.get(id)
	if !ok || !known || subtle.ConstantTimeCompare(rec.Hash, hash[:]) != 1 {
		s.attempts.failed(c.Remote, now)
		ev.Rule = "unknown token"
		return s.refuse(ctx, ev, errEnrol())
	}
	ev.Principal, ev.Rule = rec.Principal, "one-time token by "+rec.By
	a, err := s.intend(ctx, ev)
	if err != nil {
		return err
	}
	return a.end(ctx, s.redeem(ctx, a, c, id, issue))
}

// redeem does what follows a right secret.
func (s *Service) redeem(ctx context.Context, a *act, c Caller, id string, issue func(string) error) error {
	var why string
	principal := a.ev.Principal
	var err error
	a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
		var muts []mut
		muts, why = s.burn(v, id)
		return muts, nil
	})
	switch {
	case err != nil:
		return err
	case why != "":
		a.ev.Note = why
		s.attempts.failed(c.Remote, s.cfg.Clock.Now())
		s.cfg.Logger.Warn("enrolment refused", "principal", principal, "remote", c.Remote, "why", why)
		return errEnrol()
	}
	if err := issue(principal); err != nil {
		return fmt.Errorf("issue a certificate to %s (its token is spent): %w", principal, err)
	}
	return nil
}

// burn marks the token used, or says why it does not work; a second use is
// kept for the alarm.
func (s *Service) burn(v *view, id string) (muts []mut, why string) {
	rec, ok := v.tokens.get(id)
	if !ok {
		return nil, "replaced by a newer token"
	}
	_, denied := v.denied.get(rec.Principal)
	next := *rec
	switch now := s.now(); {
	case !rec.Used.IsZero():
		next.Reused = now
		why = "ALARM: the token was used before; somebody else may hold an identity as " + rec.Principal
		if !rec.Reused.IsZero() {
			return nil, why
		}
	case denied:
		return nil, "principal is revoked"
	case !now.Before(rec.Expires):
		return nil, "expired"
	default:
		next.Used = now
	}
	muts = []mut{{prefixToken + id, &next}}
	if why == "" {
		for name, inst := range v.instances.all() {
			if inst.Principal == rec.Principal && inst.Enrolled.IsZero() {
				enrolled := *inst
				enrolled.Enrolled = next.Used
				muts = append(muts, mut{prefixInst + name, &enrolled})
			}
		}
	}
	return muts, why
}

// Renew has issue make a new certificate for a caller that proved the old one.
// It wraps dek.ErrDenied for a revoked identity.
func (s *Service) Renew(ctx context.Context, c Caller, issue func(principal string) error) error {
	return s.do(ctx, c, OpRenew, "/", checkPrincipal(c.Principal), func(a *act) error {
		a.ev.Object = "/enrolment"
		return issue(c.Principal)
	})
}

// RevokeIdentity puts a principal on the deny list, for good: every call and
// stream of it is refused from the return of this call on, its unused tokens
// are gone, and the name can't enrol again. It wraps dek.ErrInvalid,
// dek.ErrDenied, dek.ErrPrecondition (the last administrator).
func (s *Service) RevokeIdentity(ctx context.Context, c Caller, principal string) error {
	return s.do(ctx, c, OpIdentityRevoke, "/", checkPrincipal(principal), func(a *act) error {
		a.ev.Object, a.ev.Note = deniedObject, principal
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			if _, done := v.denied.get(principal); done {
				return nil, nil
			}
			if v.administrators(principal) == 0 {
				return nil, errLastAdministrator(principal)
			}
			return v.denyMuts(principal, &deniedRecord{s.now(), c.Principal}), nil
		})
		if err == nil {
			s.settle()
			s.hub.revoke(s.view.Load(), func(_ string, inst *instanceRecord) bool { return inst.Principal == principal })
		}
		return err
	})
}

// Revoked reports whether a principal is on the deny list; the serial of the
// certificate it shows makes no difference. It reads memory only.
func (s *Service) Revoked(principal, _ string) bool {
	_, denied := s.view.Load().denied.get(principal)
	return denied
}
