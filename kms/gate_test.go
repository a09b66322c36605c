package kms_test

import (
	"context"
	"crypto"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A taking is one way to take the right of an unwrap away.
type taking struct {
	name string
	f    func(context.Context, *kms.Service) error
}

func takings() []taking {
	return []taking{
		{"key off", func(ctx context.Context, s *kms.Service) error {
			_, err := s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k"})
			return err
		}},
		{"keyring off", func(ctx context.Context, s *kms.Service) error {
			_, err := s.SetKeyringEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "r"})
			return err
		}},
		{"grant removed", func(ctx context.Context, s *kms.Service) error {
			return s.RemoveGrant(ctx, admin, kms.Grant{Principal: db1.Principal, Role: kms.RoleServiceEncryptionUser, Scope: "/vaults/v/keyrings/r"})
		}},
		{"identity revoked", func(ctx context.Context, s *kms.Service) error { return s.RevokeIdentity(ctx, admin, db1.Principal) }},
		{"instance revoked", func(ctx context.Context, s *kms.Service) error { return s.RevokeInstance(ctx, officer, "db1") }},
	}
}

// unwraps are the two ways to a key.
func unwraps() map[string]func(context.Context, *kms.Service, dek.Wrapped) error {
	return map[string]func(context.Context, *kms.Service, dek.Wrapped) error{
		"one": func(ctx context.Context, s *kms.Service, w dek.Wrapped) error {
			k, err := s.Unwrap(ctx, db1, w)
			k.Destroy()
			return err
		},
		"batch": func(ctx context.Context, s *kms.Service, w dek.Wrapped) error {
			keys, errs, err := s.UnwrapBatch(ctx, db1, []dek.Wrapped{w})
			if err != nil {
				return err
			}
			keys[0].Destroy()
			return errs[0]
		},
	}
}

// A hookToken calls during while it decrypts, once.
type hookToken struct {
	token
	during func()
}

func (h *hookToken) DecryptKey(ctx context.Context, id dek.ObjectID, hash crypto.Hash, inner []byte) (*dek.Key, error) {
	if f := h.during; f != nil {
		h.during = nil
		f()
	}
	return h.token.DecryptKey(ctx, id, hash, inner)
}

// TestRightTakenDuringDecrypt: what is taken away while the token works is gone
// when the key comes, and the record says so.
func TestRightTakenDuringDecrypt(t *testing.T) {
	for _, take := range takings() {
		for way, unwrap := range unwraps() {
			t.Run(take.name+"/"+way, func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				w := h.wraps()[0]
				h.s.Close()
				hook := &hookToken{token: h.token}
				h.edit = func(c *kms.Config) { c.Token = hook }
				h.open()
				hook.during = func() { check(t, take.f(t.Context(), h.s)) }
				if err := unwrap(t.Context(), h.s, w); !errors.Is(err, dek.ErrDenied) {
					t.Errorf("got %v, want denied", err)
				}
				e := h.journal.of(kms.OpKeyringUnwrap)
				last := e[len(e)-1]
				if last.Phase != kms.PhaseOutcome || last.Result != "denied" && !strings.HasPrefix(last.Note, "denied: ") {
					t.Errorf("record of the outcome: %+v", last)
				}
			})
		}
	}
}

// A slowJournal calls during while it keeps the outcome of an unwrap, once.
type slowJournal struct {
	*journal
	during func()
}

func (j *slowJournal) Append(ctx context.Context, e kms.Event) (uint64, error) {
	if f := j.during; f != nil && e.Operation == kms.OpKeyringUnwrap && e.Phase == kms.PhaseOutcome {
		j.during = nil
		f()
	}
	return j.journal.Append(ctx, e)
}

// TestRightTakenDuringOutcome: once a call that takes a right away has
// returned, no key leaves: it waits for the ones that are past the last look.
func TestRightTakenDuringOutcome(t *testing.T) {
	for _, take := range takings() {
		for way, unwrap := range unwraps() {
			t.Run(take.name+"/"+way, func(t *testing.T) {
				h := newHouse(t, "")
				h.furnish()
				w := h.wraps()[0]
				h.s.Close()
				slow := &slowJournal{journal: h.journal}
				h.edit = func(c *kms.Config) { c.Auditor = slow }
				h.open()
				done := make(chan error, 1)
				early := false
				slow.during = func() {
					go func() { done <- take.f(t.Context(), h.s) }()
					for !h.s.GateWaits() && len(done) == 0 {
						runtime.Gosched()
					}
					early = len(done) > 0
				}
				err := unwrap(t.Context(), h.s, w)
				check(t, <-done)
				if early || err != nil {
					t.Errorf("the change returned early: %v; unwrap: %v", early, err)
				}
				if err := unwrap(t.Context(), h.s, w); !errors.Is(err, dek.ErrDenied) {
					t.Errorf("afterwards: %v, want denied", err)
				}
			})
		}
	}
}
