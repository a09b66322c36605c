package connector

import (
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// A Vault is a named collection of keys and keyrings with its own access rules.
type Vault struct {
	Name        string      `json:"name"`
	Created     time.Time   `json:"created,omitzero"`
	SealVersion dek.Version `json:"seal_version"`
}

// A MasterVersion is one version of a master key.
type MasterVersion struct {
	Version dek.Version `json:"version"`
	State   string      `json:"state"`  // pending, enabled, disabled, failed, destroyed
	Object  HexBytes    `json:"object"` // CKA_ID in the token
	Created time.Time   `json:"created,omitzero"`
	SPKI    []byte      `json:"spki,omitempty"` // DER of the public half
}

// A MasterKey is a named asymmetric key in a token.
type MasterKey struct {
	Vault    string          `json:"vault"`
	Name     string          `json:"name"`
	Bits     int             `json:"bits"`
	Current  dek.Version     `json:"current"`
	Versions []MasterVersion `json:"versions"`
}

// A KeyringVersion is one data key of a keyring.
type KeyringVersion struct {
	Version       dek.Version `json:"version"`
	ServerVersion uint32      `json:"server_version"` // the number a database server sees
	State         string      `json:"state"`          // pending, enabled, disabled, failed, destroyed
	Created       time.Time   `json:"created,omitzero"`
	Master        dek.Version `json:"master"` // master key version it is wrapped to
	Wrapped       []byte      `json:"wrapped,omitempty"`
}

// A Keyring is a named, versioned set of data keys for one purpose.
type Keyring struct {
	Vault     string           `json:"vault"`
	Name      string           `json:"name"`
	MasterKey string           `json:"master_key"`
	ServerKey uint32           `json:"server_key"` // key id a MariaDB server knows it by, 0: none
	Current   dek.Version      `json:"current"`
	Versions  []KeyringVersion `json:"versions"`
}

// A Usage says when a database last asked for a version.
type Usage struct {
	Keyring string      `json:"keyring"`
	Version dek.Version `json:"version"`
	Last    time.Time   `json:"last,omitzero"`
}

// An Instance is a registered database.
type Instance struct {
	Name      string    `json:"name"`
	Kind      string    `json:"kind"`
	Vault     string    `json:"vault"`
	Keyrings  []string  `json:"keyrings"`
	Principal string    `json:"principal"`
	Prepared  time.Time `json:"prepared,omitzero"`
	Enrolled  time.Time `json:"enrolled,omitzero"` // zero: its token is not redeemed
	Connected bool      `json:"connected"`
	LastSeen  time.Time `json:"last_seen,omitzero"`
	Usage     []Usage   `json:"usage,omitempty"`
}

// A Grant gives a principal a role at a scope ("/", "/vaults/v", ...).
type Grant struct {
	Principal string    `json:"principal"`
	Role      string    `json:"role"`
	Scope     string    `json:"scope"`
	By        string    `json:"by,omitempty"`
	At        time.Time `json:"at,omitzero"`
}

// An EnrolmentToken lets one principal enrol once; Text is shown once. It is
// written as a TokenFile and has no JSON form.
type EnrolmentToken struct {
	Principal string     `json:"principal"`
	Expires   time.Time  `json:"expires"`
	Text      SecretText `json:"-"`
}

// An Effect says who learned of a switch.
type Effect struct {
	Notified []string `json:"notified"` // connected instances that were told
	Absent   []string `json:"absent"`   // instances that use it and are not connected
}

// A Progress is how far a rewrap is.
type Progress struct {
	Done  int `json:"done"`
	Total int `json:"total"`
}

// A Problem is one thing that someone must mend.
type Problem struct {
	Severity string `json:"severity"` // red or yellow
	Text     string `json:"text"`
	Remedy   string `json:"remedy"`
}

// A Status is the health of a key service.
type Status struct {
	Token        string     `json:"token"`
	TokenHealthy bool       `json:"token_healthy"`
	OAEPHash     string     `json:"oaep_hash"`
	Recovery     string     `json:"recovery"`      // empty: none
	BackupTarget string     `json:"backup_target"` // empty: none
	LastBackup   time.Time  `json:"last_backup,omitzero"`
	Changes      uint64     `json:"changes"`
	AuditSize    uint64     `json:"audit_size"`
	Quarantined  []HexBytes `json:"quarantined,omitempty"` // token objects that no record names
	Problems     []Problem  `json:"problems"`
	Instances    []Instance `json:"instances"`
}

// An AuditRecord is one record with its exact bytes.
type AuditRecord struct {
	Sequence uint64
	Line     []byte // one JSON object, as hashed into the log
}

// An AuditFilter selects records. Zero fields do not filter.
type AuditFilter struct {
	After        time.Time
	Before       time.Time
	Principal    string
	Operation    string
	Object       string
	FromSequence uint64
	Limit        int  // the newest so many; 0: 1000
	Follow       bool // go on with new records until the context ends
}

// HexBytes is written as hexadecimal digits in JSON.
type HexBytes []byte

// MarshalText returns hexadecimal digits.
func (h HexBytes) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// String returns hexadecimal digits.
func (h HexBytes) String() string {
	const digits = "0123456789abcdef"
	out := make([]byte, 0, 2*len(h))
	for _, b := range h {
		out = append(out, digits[b>>4], digits[b&15])
	}
	return string(out)
}

// convert maps f over a list; it never returns nil, so that JSON has [].
func convert[P, T any](list []P, f func(P) T) []T {
	out := make([]T, 0, len(list))
	for _, p := range list {
		out = append(out, f(p))
	}
	return out
}

// unixTime turns seconds into a time, 0 into the zero time.
func unixTime(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(s, 0).UTC()
}

// unixSeconds is its inverse.
func unixSeconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func list(s []string) []string { return append([]string{}, s...) }

func vaultFrom(p *kmspb.Vault) Vault {
	return Vault{Name: p.GetName(), Created: unixTime(p.GetCreatedUnix()), SealVersion: dek.Version(p.GetSealVersion())}
}

func masterKeyFrom(p *kmspb.MasterKey) MasterKey {
	return MasterKey{
		Vault: p.GetVault(), Name: p.GetName(), Bits: int(p.GetBits()), Current: dek.Version(p.GetCurrent()),
		Versions: convert(p.GetVersions(), func(v *kmspb.MasterVersion) MasterVersion {
			return MasterVersion{
				Version: dek.Version(v.GetVersion()), State: v.GetState(), Object: v.GetObject(),
				Created: unixTime(v.GetCreatedUnix()), SPKI: v.GetSpki(),
			}
		}),
	}
}

func keyringFrom(p *kmspb.Keyring) Keyring {
	return Keyring{
		Vault: p.GetVault(), Name: p.GetName(), MasterKey: p.GetMasterKey(), ServerKey: p.GetServerKey(),
		Current: dek.Version(p.GetCurrent()),
		Versions: convert(p.GetVersions(), func(v *kmspb.KeyringVersion) KeyringVersion {
			return KeyringVersion{
				Version: dek.Version(v.GetVersion()), ServerVersion: v.GetServerVersion(), State: v.GetState(),
				Created: unixTime(v.GetCreatedUnix()), Master: dek.Version(v.GetMaster()), Wrapped: v.GetWrapped(),
			}
		}),
	}
}

func usageFrom(p *kmspb.Usage) Usage {
	return Usage{Keyring: p.GetKeyring(), Version: dek.Version(p.GetVersion()), Last: unixTime(p.GetLastUnix())}
}

func instanceFrom(p *kmspb.Instance) Instance {
	return Instance{
		Name: p.GetName(), Kind: p.GetKind(), Vault: p.GetVault(), Keyrings: list(p.GetKeyrings()),
		Principal: p.GetPrincipal(), Prepared: unixTime(p.GetPreparedUnix()), Enrolled: unixTime(p.GetEnrolledUnix()),
		Connected: p.GetConnected(), LastSeen: unixTime(p.GetLastSeenUnix()), Usage: convert(p.GetUsage(), usageFrom),
	}
}

func grantFrom(p *kmspb.Grant) Grant {
	return Grant{Principal: p.GetPrincipal(), Role: p.GetRole(), Scope: p.GetScope(), By: p.GetBy(), At: unixTime(p.GetAtUnix())}
}

func tokenFrom(p *kmspb.EnrolmentToken) EnrolmentToken {
	return EnrolmentToken{Principal: p.GetPrincipal(), Expires: unixTime(p.GetExpiresUnix()), Text: SecretText{p.GetText()}}
}

func effectFrom(p *kmspb.Effect) Effect {
	return Effect{Notified: list(p.GetNotified()), Absent: list(p.GetAbsent())}
}

func statusFrom(p *kmspb.Status) Status {
	return Status{
		Token: p.GetToken(), TokenHealthy: p.GetTokenHealthy(), OAEPHash: p.GetOaepHash(), Recovery: p.GetRecovery(),
		BackupTarget: p.GetBackupTarget(), LastBackup: unixTime(p.GetLastBackupUnix()), Changes: p.GetChanges(),
		AuditSize: p.GetAuditSize(), Instances: convert(p.GetInstances(), instanceFrom),
		Quarantined: convert(p.GetQuarantined(), func(b []byte) HexBytes { return b }),
		Problems: convert(p.GetProblems(), func(q *kmspb.Problem) Problem {
			return Problem{Severity: q.GetSeverity(), Text: q.GetText(), Remedy: q.GetRemedy()}
		}),
	}
}
