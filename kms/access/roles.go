// Package access decides who may do what. Roles, operations and the rule
// between them stand in one table, which is also what the documentation
// prints; nothing else in the service grants a right. Access is denied unless
// a cell of the table and a grant of the caller say otherwise, and an
// operation without a row stops the start.
package access

import (
	"fmt"
	"strings"

	"github.com/keyward/keyward/dek"
)

// A Role is a built-in set of rights. Its number is an index into the table;
// records and grants carry its name.
type Role uint8

// The roles that can be granted. Zero is no role.
const (
	Administrator Role = iota + 1
	CryptoOfficer
	CryptoUser
	ServiceEncryptionUser
	SecretsOfficer
	SecretsUser
	BackupOperator
	PurgeApprover
	Auditor
)

// Two rows of the table belong to nobody in particular: they are never
// granted, so they are not in Roles.
const (
	anyone     Role = iota + 20 // also a caller without a certificate
	identified                  // every caller with a valid identity
)

// A duty is what strict mode keeps apart: one principal serves one duty.
type duty uint8

const (
	noDuty  duty = iota // goes with any other
	govern              // decides who may act
	manage              // decides how keys live
	use                 // has keys used
	approve             // lets others destroy
	check               // watches all of the above
)

// A description is the row of a role: its name in grants, its duty, and the
// sentence the documentation prints.
type description struct {
	role Role
	name string
	duty duty
	text string
}

func descriptions() []description {
	return []description{
		{Administrator, "administrator", govern, "vaults, grants, identities and enrolment; uses no key"},
		{CryptoOfficer, "crypto officer", manage, "life of keys and keyrings, prepares instances; uses no key"},
		{CryptoUser, "crypto user", use, "uses keyrings"},
		{ServiceEncryptionUser, "service encryption user", use, "what a database gets: opens its instance, reads and unwraps its keyrings"},
		{SecretsOfficer, "secrets officer", manage, "life of secrets"},
		{SecretsUser, "secrets user", use, "reads secrets"},
		{BackupOperator, "backup operator", noDuty, "takes sealed backups; can't open one"},
		{PurgeApprover, "purge approver", approve, "approves destruction requested by somebody else"},
		{Auditor, "auditor", check, "reads records and attributes; uses nothing, changes nothing"},
	}
}

// Roles returns every role that can be granted, in the order of the
// documentation.
func Roles() []Role {
	d := descriptions()
	roles := make([]Role, len(d))
	for i := range d {
		roles[i] = d[i].role
	}
	return roles
}

// describe returns the row of r, or a row without name for no role.
func describe(r Role) description {
	for _, d := range descriptions() {
		if d.role == r {
			return d
		}
	}
	return description{}
}

// String returns the name used in grants and records, "crypto officer".
func (r Role) String() string {
	switch r {
	case anyone:
		return "anyone"
	case identified:
		return "any identity"
	}
	if d := describe(r); d.name != "" {
		return d.name
	}
	return fmt.Sprintf("role %d", uint8(r))
}

// Text returns the sentence that describes the role to people.
func (r Role) Text() string { return describe(r).text }

// ParseRole returns the role that people spell "crypto officer" or
// "crypto-officer". Any other spelling wraps dek.ErrInvalid and names the
// choices. Grants are stored with the name of the result, never as spelt.
func ParseRole(s string) (Role, error) {
	name := strings.ReplaceAll(s, "-", " ")
	names := make([]string, 0, len(Roles()))
	for _, d := range descriptions() {
		if d.name == name {
			return d.role, nil
		}
		names = append(names, strings.ReplaceAll(d.name, " ", "-"))
	}
	return 0, fmt.Errorf("%w: role %.40q: choose one of %s", dek.ErrInvalid, s, strings.Join(names, ", "))
}
