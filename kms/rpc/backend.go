package rpc

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/identity"
)

// The interfaces below are what the front door asks of the service behind it;
// *kms.Service has them all. Every method authorises the caller itself and
// records the act, refused or done; all may be called concurrently, and errors
// wrap the classes of package dek.

// Vaults keeps vaults.
type Vaults interface {
	CreateVault(ctx context.Context, c kms.Caller, name string) (kms.Vault, error)
	Vaults(ctx context.Context, c kms.Caller) ([]kms.Vault, error)
}

// Keys keeps master keys.
type Keys interface {
	CreateKey(ctx context.Context, c kms.Caller, r kms.CreateKey) (kms.MasterKey, error)
	RollKey(ctx context.Context, c kms.Caller, r kms.RollKey) (kms.MasterKey, error)
	Key(ctx context.Context, c kms.Caller, vault, name string) (kms.MasterKey, error)
	Keys(ctx context.Context, c kms.Caller, vault string) ([]kms.MasterKey, error)
	SetKeyEnabled(ctx context.Context, c kms.Caller, r kms.SetEnabled) (kms.Effect, error)
	RewrapKey(ctx context.Context, c kms.Caller, vault, name string, progress func(done, total int)) (int, error)
}

// Keyrings keeps keyrings.
type Keyrings interface {
	CreateKeyring(ctx context.Context, c kms.Caller, r kms.CreateKeyring) (kms.Keyring, error)
	RollKeyring(ctx context.Context, c kms.Caller, r kms.RollKeyring) (kms.Keyring, error)
	Keyring(ctx context.Context, c kms.Caller, vault, name string) (kms.Keyring, error)
	Keyrings(ctx context.Context, c kms.Caller, vault string) ([]kms.Keyring, error)
	SetKeyringEnabled(ctx context.Context, c kms.Caller, r kms.SetEnabled) (kms.Effect, error)
}

// Instances keeps registered databases.
type Instances interface {
	PrepareInstance(ctx context.Context, c kms.Caller, r kms.PrepareInstance) (kms.Instance, *kms.EnrolmentToken, error)
	Instances(ctx context.Context, c kms.Caller) ([]kms.Instance, error)
	RevokeInstance(ctx context.Context, c kms.Caller, name string) error
	OpenInstance(ctx context.Context, c kms.Caller, r kms.OpenInstance) (kms.InstanceView, error)
	// WatchInstance calls f, never concurrently, until ctx ends or f fails.
	WatchInstance(ctx context.Context, c kms.Caller, instance string, f func(kms.Notice) error) error
	ReportUsage(ctx context.Context, c kms.Caller, instance string, u []kms.Usage) error
}

// An Unwrapper is the hot path. The caller destroys the keys. UnwrapBatch
// returns one key or one error per item, unless it fails as a whole.
type Unwrapper interface {
	Unwrap(ctx context.Context, c kms.Caller, w dek.Wrapped) (*dek.Key, error)
	UnwrapBatch(ctx context.Context, c kms.Caller, ws []dek.Wrapped) ([]*dek.Key, []error, error)
}

// Grants keeps who may do what.
type Grants interface {
	AddGrant(ctx context.Context, c kms.Caller, g kms.Grant) error
	RemoveGrant(ctx context.Context, c kms.Caller, g kms.Grant) error
	Grants(ctx context.Context, c kms.Caller, principal string) ([]kms.Grant, error)
}

// Enrolments turns one-time tokens into identities and ends them. Redeem burns
// the token before it calls issue; Revoked is asked at every call and does no
// input or output.
type Enrolments interface {
	NewEnrolmentToken(ctx context.Context, c kms.Caller, principal string, lifetime time.Duration) (*kms.EnrolmentToken, error)
	Redeem(ctx context.Context, c kms.Caller, text kms.TokenText, issue func(principal string) error) error
	Renew(ctx context.Context, c kms.Caller, issue func(principal string) error) error
	RevokeIdentity(ctx context.Context, c kms.Caller, principal string) error
	Revoked(principal, serial string) bool
}

// A System is the service as a whole.
type System interface {
	Status(ctx context.Context, c kms.Caller) (kms.Status, error)
	Backup(ctx context.Context, c kms.Caller, w io.Writer) error
	// AuthorizeAudit decides on reads of the log, which the front door serves.
	AuthorizeAudit(ctx context.Context, c kms.Caller, op kms.Operation, scope string) error
}

// A Backend is the service behind the door, by area.
type Backend struct {
	Vaults     Vaults
	Keys       Keys
	Keyrings   Keyrings
	Instances  Instances
	Unwrapper  Unwrapper
	Grants     Grants
	Enrolments Enrolments
	System     System
}

// A service has all areas at once, as *kms.Service does.
type service interface {
	Vaults
	Keys
	Keyrings
	Instances
	Unwrapper
	Grants
	Enrolments
	System
}

// NewBackend returns the Backend whose areas are all s.
func NewBackend(s service) Backend {
	return Backend{Vaults: s, Keys: s, Keyrings: s, Instances: s, Unwrapper: s, Grants: s, Enrolments: s, System: s}
}

func (b Backend) check() error {
	if b.Vaults == nil || b.Keys == nil || b.Keyrings == nil || b.Instances == nil ||
		b.Unwrapper == nil || b.Grants == nil || b.Enrolments == nil || b.System == nil {
		return fmt.Errorf("%w: rpc: every area of Backend is required", dek.ErrInvalid)
	}
	return nil
}

// Identities issues and verifies certificates: *identity.Authority.
type Identities interface {
	Verify(leaf *x509.Certificate) (identity.Peer, error)
	CheckRequest(csr []byte) error
	IssueClient(principal string, csr []byte) (*identity.Issued, error)
	ServerCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Fingerprint() [sha256.Size]byte
}

// A Recorder keeps records durably, as kms.Auditor does. It gets the calls
// that were refused before the service was asked.
type Recorder interface {
	Append(ctx context.Context, e kms.Event) (uint64, error)
}

// Rules knows which operations have a rule: *access.Policy.
type Rules interface {
	Known(op kms.Operation) bool
}

// An AuditQuery selects records. Zero fields select all.
type AuditQuery struct {
	After, Before time.Time
	Principal     string
	Operation     string
	Object        string
	From          uint64 // first sequence number
	Limit         int    // the newest so many
	Follow        bool   // go on with new records until ctx ends
}

// An AuditLog can be read. Read calls f for each record, oldest first, with
// its exact line; Export writes a tar archive for offline verification. Both
// may be called concurrently.
type AuditLog interface {
	Read(ctx context.Context, q AuditQuery, f func(seq uint64, line []byte) error) error
	Export(ctx context.Context, w io.Writer) error
}
