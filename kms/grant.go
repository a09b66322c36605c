package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/keyward/keyward/dek"
)

// checkPrincipal refuses what can't be a name in a path or a certificate.
func checkPrincipal(p string) error {
	kind, name, ok := strings.Cut(p, "/")
	if !ok || kind != "person" && kind != "host" {
		return fmt.Errorf("%w: principal %.80q: use person/NAME or host/NAME", dek.ErrInvalid, p)
	}
	return dek.CheckName(kind, name)
}

// checkScope refuses places that no object has.
func checkScope(scope string) error {
	if scope == "/" {
		return nil
	}
	part := strings.Split(scope, "/")
	ok := (len(part) == 3 || len(part) == 5 && (part[3] == "keys" || part[3] == "keyrings")) && part[0] == "" && part[1] == "vaults"
	if !ok {
		return fmt.Errorf("%w: scope %.200q: use /, /vaults/V, /vaults/V/keys/K or /vaults/V/keyrings/R", dek.ErrInvalid, scope)
	}
	err := dek.CheckName("vault", part[2])
	if len(part) == 5 {
		err = errors.Join(err, dek.CheckName("name", part[4]))
	}
	return err
}

func (g Grant) same(o Grant) bool {
	return g.Principal == o.Principal && g.Role == o.Role && g.Scope == o.Scope
}

func hasGrant(grants []Grant, g Grant) bool { return slices.ContainsFunc(grants, g.same) }

// covers reports whether what g gives reaches scope.
func (g Grant) covers(scope string) bool {
	return g.Scope == "/" || g.Scope == scope || strings.HasPrefix(scope, g.Scope+"/")
}

// maxGrants bounds the grants of one principal.
const maxGrants = 1000

// AddGrant gives a role; By and At are filled in. Giving what is given already
// changes nothing. It wraps dek.ErrInvalid (role, principal, scope),
// dek.ErrDenied, dek.ErrNotFound (vault), dek.ErrPrecondition (strict mode:
// conflicting roles; the principal is revoked), dek.ErrExhausted.
func (s *Service) AddGrant(ctx context.Context, c Caller, g Grant) error {
	input := errors.Join(checkPrincipal(g.Principal), checkScope(g.Scope))
	return s.do(ctx, c, OpGrantAdd, g.Scope, input, func(a *act) error {
		g.By, g.At = c.Principal, s.now()
		a.ev.Note = fmt.Sprintf("%.80q to %s", g.Role, g.Principal)
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			grants := v.grantsOf(g.Principal)
			if err := s.checkGrant(v, g, grants); err != nil || hasGrant(grants, g) {
				return nil, err
			}
			return []mut{{prefixGrants + g.Principal, &grantsRecord{append(slices.Clone(grants), g)}}}, nil
		})
		if err == nil {
			s.tellGrant(g, NoticeEnabled)
		}
		return err
	})
}

func (s *Service) checkGrant(v *view, g Grant, grants []Grant) error {
	if _, denied := v.denied.get(g.Principal); denied {
		return fmt.Errorf("%w: %s is revoked; use another name", dek.ErrPrecondition, g.Principal)
	}
	if part := strings.Split(g.Scope, "/"); len(part) > 2 {
		if _, ok := v.vaults.get(part[2]); !ok {
			return fmt.Errorf("vault %s: %w", part[2], dek.ErrNotFound)
		}
	}
	if len(grants) >= maxGrants {
		return fmt.Errorf("%w: %s has %d grants; grant at the vault instead", dek.ErrExhausted, g.Principal, len(grants))
	}
	return s.cfg.Authorizer.CheckGrant(g, grants, s.cfg.Strict)
}

// RemoveGrant takes a role back; it holds before it returns. It wraps
// dek.ErrInvalid, dek.ErrDenied, dek.ErrNotFound, dek.ErrPrecondition (the last
// administrator).
func (s *Service) RemoveGrant(ctx context.Context, c Caller, g Grant) error {
	input := errors.Join(checkPrincipal(g.Principal), checkScope(g.Scope))
	return s.do(ctx, c, OpGrantRemove, g.Scope, input, func(a *act) error {
		a.ev.Note = fmt.Sprintf("%.80q from %s", g.Role, g.Principal)
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			grants := v.grantsOf(g.Principal)
			if !hasGrant(grants, g) {
				return nil, fmt.Errorf("grant of %.80q at %s to %s: %w", g.Role, g.Scope, g.Principal, dek.ErrNotFound)
			}
			if g.Role == RoleAdministrator && g.Scope == "/" && v.administrators(g.Principal) == 0 {
				return nil, errLastAdministrator(g.Principal)
			}
			m := mut{path: prefixGrants + g.Principal}
			if rest := slices.DeleteFunc(slices.Clone(grants), g.same); len(rest) > 0 {
				m.rec = &grantsRecord{rest}
			}
			return []mut{m}, nil
		})
		if err == nil {
			s.settle()
			s.tellGrant(g, NoticeDisabled)
		}
		return err
	})
}

func errLastAdministrator(principal string) error {
	return fmt.Errorf("%w: %s is the last administrator; make another one first", dek.ErrPrecondition, principal)
}

// administrators counts who else can administer everything.
func (v *view) administrators(but string) int {
	n := 0
	for principal, grants := range v.grants.all() {
		_, denied := v.denied.get(principal)
		if principal == but || denied {
			continue
		}
		if slices.ContainsFunc(grants, func(g Grant) bool { return g.Role == RoleAdministrator && g.Scope == "/" }) {
			n++
		}
	}
	return n
}

// tellGrant has the instances of a principal look again.
func (s *Service) tellGrant(g Grant, kind NoticeKind) {
	s.hub.tellIf(s.view.Load(), kind, func(_ string, inst *instanceRecord) []string {
		if inst.Principal != g.Principal {
			return nil
		}
		return slices.DeleteFunc(slices.Clone(inst.Keyrings), func(r string) bool { return !g.covers(ringScope(inst.Vault, r)) })
	})
}

// Grants lists the grants of a principal, or all if it is empty, by principal.
// It wraps dek.ErrInvalid, dek.ErrDenied.
func (s *Service) Grants(ctx context.Context, c Caller, principal string) ([]Grant, error) {
	var out []Grant
	var input error
	if principal != "" {
		input = checkPrincipal(principal)
	}
	err := s.do(ctx, c, OpGrantRead, "/", input, func(a *act) error {
		v := s.view.Load()
		if principal != "" {
			out = slices.Clone(v.grantsOf(principal))
		} else {
			for _, e := range sorted(&v.grants, "") {
				out = append(out, e.value...)
			}
		}
		a.ev.Object, a.ev.Count = "/grants", len(out)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
