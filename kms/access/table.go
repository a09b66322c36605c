package access

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/keyward/keyward/kms"
)

// A rule is one row of the table: an operation and who may do it.
type rule struct {
	op    kms.Operation
	roles []Role // empty: nobody through a front door
	note  string // printed by the documentation
}

// rules is the table. There is no other place where a right comes from.
func rules() []rule {
	readers := []Role{Administrator, CryptoOfficer, CryptoUser, ServiceEncryptionUser, PurgeApprover, Auditor}
	return []rule{
		// The officer prepares instances in one go, vault included; an empty
		// vault gives nobody a right.
		{kms.OpVaultCreate, []Role{Administrator, CryptoOfficer}, "create a vault"},
		{kms.OpVaultRead, append([]Role{SecretsOfficer, SecretsUser}, readers...), "list vaults"},

		{kms.OpKeyCreate, []Role{CryptoOfficer}, "create a master key"},
		{kms.OpKeyRoll, []Role{CryptoOfficer}, "make a new version of a master key"},
		{kms.OpKeyRead, []Role{Administrator, CryptoOfficer, CryptoUser, PurgeApprover, Auditor}, "read the attributes of master keys"},
		{kms.OpKeySetEnabled, []Role{CryptoOfficer}, "disable and enable a master key"},
		{kms.OpKeyRewrap, []Role{CryptoOfficer}, "move wrapped keys to the current master version"},

		{kms.OpKeyringCreate, []Role{CryptoOfficer}, "create a keyring"},
		{kms.OpKeyringRoll, []Role{CryptoOfficer}, "make a new version of a keyring"},
		{kms.OpKeyringRead, readers, "read the attributes of keyrings"},
		{kms.OpKeyringSetState, []Role{CryptoOfficer}, "disable and enable a keyring"},
		{kms.OpKeyringUnwrap, []Role{CryptoUser, ServiceEncryptionUser}, "have a data key unwrapped"},
		{kms.OpKeyringWatch, []Role{ServiceEncryptionUser}, "be told of changes of an instance"},

		{kms.OpInstancePrepare, []Role{CryptoOfficer}, "prepare an instance for a database"},
		{kms.OpInstanceRead, []Role{Administrator, CryptoOfficer, Auditor}, "list instances"},
		{kms.OpInstanceOpen, []Role{ServiceEncryptionUser}, "start a database"},
		{kms.OpInstanceReport, []Role{ServiceEncryptionUser}, "report which versions are needed"},
		{kms.OpInstanceRevoke, []Role{Administrator, CryptoOfficer}, "take an instance out of service"},

		{kms.OpGrantAdd, []Role{Administrator}, "grant a role"},
		{kms.OpGrantRemove, []Role{Administrator}, "take a role back"},
		{kms.OpGrantRead, []Role{Administrator, Auditor}, "list grants"},

		{kms.OpTokenCreate, []Role{Administrator}, "make a one-time enrolment token"},
		{kms.OpEnroll, []Role{anyone}, "redeem a one-time enrolment token"},
		{kms.OpRenew, []Role{identified}, "renew one's own certificate"},
		{kms.OpIdentityRevoke, []Role{Administrator}, "revoke an identity"},

		{kms.OpStatus, []Role{Administrator, CryptoOfficer, BackupOperator, Auditor}, "see the state of the service"},
		{kms.OpBackup, []Role{BackupOperator}, "take a sealed backup"},
		{kms.OpRestore, nil, "restore from a backup: at the stopped service's console only"},
		{kms.OpAuditRead, []Role{Auditor}, "read and export the audit records"},
	}
}

// Operations returns every operation that has a row, in table order.
func Operations() []kms.Operation {
	rs := rules()
	ops := make([]kms.Operation, len(rs))
	for i := range rs {
		ops[i] = rs[i].op
	}
	return ops
}

// WriteTable prints the table for people: one row per operation, one column
// per role. What it prints is what Decide obeys.
func WriteTable(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	head := []string{"operation"}
	for _, r := range Roles() {
		head = append(head, r.String())
	}
	fmt.Fprintln(tw, strings.Join(append(head, "what it is"), "\t"))
	for _, r := range rules() {
		line := []string{string(r.op)}
		mask := maskOf(r.roles)
		for _, role := range Roles() {
			line = append(line, cell(mask, role))
		}
		fmt.Fprintln(tw, strings.Join(append(line, r.note), "\t"))
	}
	return tw.Flush()
}

func cell(m mask, r Role) string {
	if m.has(r) || m.has(anyone) || m.has(identified) {
		return "yes"
	}
	return "-"
}

// A mask is a set of roles.
type mask uint32

func (m mask) has(r Role) bool { return m&(1<<r) != 0 }

func maskOf(roles []Role) mask {
	var m mask
	for _, r := range roles {
		m |= 1 << r
	}
	return m
}
