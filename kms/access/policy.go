package access

import (
	"fmt"
	"strings"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// LocalRoot is the principal of the control socket: whoever is root on the
// host of the service. It may take backups, read the log and see the status,
// no more; being root there already means all of these.
const LocalRoot = "local/root"

// A Policy is the table, compiled. It keeps no state and may be used
// concurrently. It implements kms.Authorizer.
type Policy struct {
	rules map[kms.Operation]mask
	roles map[string]Role
}

var _ kms.Authorizer = (*Policy)(nil)

// New compiles the table and checks that every operation in need has a row: a
// front door passes the operations of its methods. It wraps dek.ErrInvalid and
// names the first operation without a rule, or the row that is wrong.
func New(need ...kms.Operation) (*Policy, error) {
	return compile(rules(), need)
}

func compile(table []rule, need []kms.Operation) (*Policy, error) {
	p := &Policy{rules: make(map[kms.Operation]mask, len(table)), roles: make(map[string]Role)}
	for _, d := range descriptions() {
		p.roles[d.name] = d.role
	}
	for _, r := range table {
		if _, twice := p.rules[r.op]; twice || r.op == "" {
			return nil, fmt.Errorf("%w: access table: operation %q has two rows or no name", dek.ErrInvalid, r.op)
		}
		p.rules[r.op] = maskOf(r.roles)
	}
	for _, op := range need {
		if !p.Known(op) {
			return nil, fmt.Errorf("%w: access table: operation %q has no rule", dek.ErrInvalid, op)
		}
	}
	return p, nil
}

// Known reports whether op has a row.
func (p *Policy) Known(op kms.Operation) bool {
	_, ok := p.rules[op]
	return ok
}

// Decide implements kms.Authorizer. Grants of other principals in grants are
// passed over. The rule of a refusal never depends on whether the object
// exists, so it may be recorded and compared.
func (p *Policy) Decide(c kms.Caller, op kms.Operation, scope string, grants []kms.Grant) kms.Decision {
	m, ok := p.rules[op]
	switch {
	case !ok:
		return kms.Decision{Rule: "no rule for " + string(op)}
	case m.has(anyone):
		return kms.Decision{Allowed: true, Rule: anyone.String()}
	case m.has(identified) && CheckPrincipal(c.Principal) == nil:
		return kms.Decision{Allowed: true, Rule: identified.String()}
	case c.Principal == LocalRoot:
		return local(m, scope)
	}
	for i := range grants {
		g := &grants[i]
		if g.Principal != c.Principal || c.Principal == "" {
			continue
		}
		role, known := p.roles[g.Role]
		if known && m.has(role) && covers(g.Scope, scope) {
			return kms.Decision{Allowed: true, Rule: g.Role + " at " + g.Scope}
		}
	}
	return kms.Decision{Rule: "no grant for " + string(op)}
}

// local decides for LocalRoot, whose roles are fixed and can't be granted.
func local(m mask, scope string) kms.Decision {
	for _, r := range []Role{BackupOperator, Auditor} {
		if m.has(r) && canonical(scope) {
			return kms.Decision{Allowed: true, Rule: r.String() + " by the control socket"}
		}
	}
	return kms.Decision{Rule: "not a right of the control socket"}
}

// CheckGrant implements kms.Authorizer. Every refusal wraps dek.ErrInvalid
// (malformed) or dek.ErrPrecondition (strict mode: the principal already
// serves another duty, at whatever scope, or grants to itself).
func (p *Policy) CheckGrant(g kms.Grant, existing []kms.Grant, strict bool) error {
	role, ok := p.roles[g.Role]
	if !ok {
		_, err := ParseRole(g.Role)
		if err == nil { // a spelling that only people use
			err = fmt.Errorf("%w: role %q is not in its stored form", dek.ErrInvalid, g.Role)
		}
		return err
	}
	if err := CheckPrincipal(g.Principal); err != nil {
		return err
	}
	if err := CheckScope(g.Scope); err != nil {
		return err
	}
	if !strict {
		return nil
	}
	if g.By == g.Principal {
		return fmt.Errorf("%w: strict mode: nobody grants a role to themselves; another administrator must", dek.ErrPrecondition)
	}
	for _, e := range existing {
		if e.Principal != g.Principal {
			continue
		}
		if held, known := p.roles[e.Role]; !known || Conflict(role, held) {
			return fmt.Errorf("%w: strict mode: %s is already %s at %s, which can't be joined with %s; remove that grant first or use another identity",
				dek.ErrPrecondition, g.Principal, e.Role, e.Scope, g.Role)
		}
	}
	return nil
}

// Conflict reports whether strict mode keeps a and b apart for one principal:
// they serve different duties. A backup operator's sealed output opens
// nothing, so that role goes with any other.
func Conflict(a, b Role) bool {
	x, y := describe(a).duty, describe(b).duty
	return x != noDuty && y != noDuty && x != y
}

// CheckPrincipal reports whether s is a principal that can hold a certificate
// and grants: "person/NAME" or "host/NAME". The error wraps dek.ErrInvalid.
func CheckPrincipal(s string) error {
	kind, name, ok := strings.Cut(s, "/")
	if !ok || kind != "person" && kind != "host" {
		return fmt.Errorf("%w: principal %.80q: use person/NAME or host/NAME", dek.ErrInvalid, s)
	}
	return dek.CheckName(kind, name)
}
