package kms

import (
	"context"
	"crypto"
	"crypto/rsa"
	"io"
	"time"

	"github.com/keyward/keyward/dek"
)

// A Pairs makes and ends master key pairs in a token. The private half never
// leaves it. Methods may be called concurrently; ctx bounds the wait, the
// token may finish an abandoned call later, so callers decide by FindPair.
type Pairs interface {
	// GeneratePair makes a decrypt-only RSA pair of bits under id. It wraps
	// dek.ErrExists if id is taken, dek.ErrInvalid for bits or an id that no
	// token takes, dek.ErrPrecondition if this token can't now, and
	// dek.ErrUnavailable if nothing is known. FindPair decides.
	GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error)
	// FindPair returns the public half of exactly one self-tested pair.
	// dek.ErrNotFound: the right token was asked and holds nothing under id;
	// dek.ErrCorrupt: halves or duplicates, which may be destroyed. Every other
	// class says nothing about the pair: dek.ErrUnavailable (not reached),
	// dek.ErrPrecondition (wrong PIN, another token), dek.ErrExhausted (busy).
	FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error)
	// DestroyPair removes whatever stands under id and proves it gone.
	DestroyPair(ctx context.Context, id dek.ObjectID) error
	// Objects lists every Keyward object of the token, for the reconciler.
	Objects(ctx context.Context) ([]dek.ObjectID, error)
}

// A Decrypter undoes the inner layer of wrapped DEKs: the hot path. It wraps
// dek.ErrAuth for any bad input, dek.ErrUnavailable for a sick device.
type Decrypter interface {
	DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error)
}

// A Sealer seals seal keys under the root of the token.
type Sealer interface {
	GenerateRoot(ctx context.Context, id dek.ObjectID) error
	SealKey(ctx context.Context, root dek.ObjectID, b dek.Binding, k *dek.Key) ([]byte, error)
	OpenKey(ctx context.Context, root dek.ObjectID, b dek.Binding, sealed []byte) (*dek.Key, error)
}

// A Signer holds the audit and CA keys. Sign takes a SHA-256 digest and
// returns ASN.1 ECDSA or RSA PKCS #1 v1.5, by the type of SignerPublic.
type Signer interface {
	GenerateSigner(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error)
	SignerPublic(ctx context.Context, id dek.ObjectID) (crypto.PublicKey, error)
	Sign(ctx context.Context, id dek.ObjectID, digest []byte) ([]byte, error)
}

// A Device says what a token is, what it can do and how it is. Its methods may
// be called concurrently; only Health asks the token itself.
type Device interface {
	// OAEPHash is the strongest OAEP hash the token can undo (SHA-1 or
	// SHA-256); it goes into the header of what is wrapped from now on.
	OAEPHash() crypto.Hash
	// RestsOnRSA reports whether sealed, which SealKey made, is under an RSA
	// root: the token has no AES. No post-quantum claim holds then. It looks at
	// the algorithm alone and does not open sealed.
	RestsOnRSA(sealed []byte) bool
	// Describe names the token for people and records (no secret): label,
	// serial, model.
	Describe() string
	// Health proves the device by a decrypt of a known ciphertext.
	Health(ctx context.Context) error
}

// A Token is one hardware security module, or the software stand-in.
type Token interface {
	Pairs
	Decrypter
	Sealer
	Signer
	Device
}

// A Record is one sealed piece of state. The store sees path and bytes only.
type Record struct {
	Path     string // canonical, "/"-separated
	Value    []byte // sealed; nil in a Watch event means deleted
	Revision int64  // store revision of the last change
}

// A Change is one write of a transaction.
type Change struct {
	Path   string
	Value  []byte // nil deletes
	Expect int64  // revision the record must have; 0: it must not exist
}

// A Store keeps records. It is trusted for durability only, never for content.
// All methods may be called concurrently.
type Store interface {
	// Load calls f for every record of one consistent revision and returns it.
	Load(ctx context.Context, f func(Record) error) (int64, error)
	// Commit applies all changes or none, durably, and returns the revision.
	// dek.ErrConflict: an Expect failed, nothing happened. dek.ErrUnavailable:
	// the outcome is unknown; the caller must read before it goes on.
	Commit(ctx context.Context, changes []Change) (int64, error)
	// Watch calls f with the records of each transaction after a revision,
	// in order, until ctx ends or f fails.
	Watch(ctx context.Context, after int64, f func([]Record, int64) error) error
}

// An Auditor keeps the record of acts. Append returns once the record is on
// disk; if that can't be, the act must not happen (dek.ErrExhausted when the
// disk is full, else dek.ErrUnavailable). It may be called concurrently.
type Auditor interface {
	Append(ctx context.Context, e Event) (seq uint64, err error)
	// Head returns the newest signed checkpoint in its text form.
	Head(ctx context.Context) ([]byte, error)
	// Extends reports whether the log is a continuation of the signed
	// checkpoint old. dek.ErrCorrupt: it is behind or forked.
	Extends(ctx context.Context, old []byte) error
}

// An AuditTail answers what the log says about the state, so that a store put
// back in time is found. An Auditor implements it too; one that does not is
// refused by Open.
type AuditTail interface {
	// StateTail returns the largest Event.Change of the log and the
	// Event.State recorded with it; 0 and nil if no event has one. Outcomes are
	// appended concurrently, so it need not be the last record. An event whose
	// Result is not "ok" counts too.
	StateTail(ctx context.Context) (change uint64, state []byte, err error)
	// EventsAfter calls f in order of sequence for every event whose Change is
	// larger than change, and for every one whose Result is ResultUnknown, until f
	// fails. It is used by a restore that has to say what is missing, never while
	// serving.
	EventsAfter(ctx context.Context, change uint64, f func(seq uint64, e Event) error) error
}

// A BackupTarget keeps backups away from the service's own disk. Put replaces
// name by what r holds, durably and as a whole or not at all. The service calls
// it before a new key or keyring version is enabled.
type BackupTarget interface {
	Put(ctx context.Context, name string, r io.Reader) error
}

// A Clock tells the time; tests own it.
type Clock interface{ Now() time.Time }

// An Authorizer decides by grants alone; it keeps no state and may be called
// concurrently. kms/access is the one in use.
type Authorizer interface {
	// Decide allows op on scope only if a grant of the caller says so.
	Decide(c Caller, op Operation, scope string, grants []Grant) Decision
	// CheckGrant refuses unknown roles and, in strict mode, a grant that would
	// give one principal conflicting roles.
	CheckGrant(g Grant, existing []Grant, strict bool) error
}

// A Decision says whether a rule allowed the act and which.
type Decision struct {
	Allowed bool
	Rule    string // "role at scope", or why not; goes into the record
}

// A Grant gives a principal a role at a scope: "/", "/vaults/v" or
// "/vaults/v/keys/k" (keyrings of a vault: "/vaults/v/keyrings/r").
type Grant struct {
	Principal string    `json:"principal"`
	Role      string    `json:"role"`
	Scope     string    `json:"scope"`
	By        string    `json:"by"`
	At        time.Time `json:"at"`
}

// A Caller is an authenticated principal and the way it came.
type Caller struct {
	Principal   string // "person/alice", "host/db1", "system/kms", "local/root"
	Serial      string // certificate serial, empty for system and local
	Remote      string // network address, for the record
	Correlation string // request id given by the client or made by the front door
}

// An Operation names one act of the service: "keyring.unwrap".
type Operation string

// The roles that the service itself gives: the first administrator, and what
// PrepareInstance grants to a database host. kms/access defines all roles.
const (
	RoleAdministrator         = "administrator"
	RoleServiceEncryptionUser = "service encryption user"
)

// Every operation there is. A front door method without one of these does not
// start; kms/access has a row for each.
const (
	OpVaultCreate     Operation = "vault.create"
	OpVaultRead       Operation = "vault.read"
	OpKeyCreate       Operation = "key.create"
	OpKeyRoll         Operation = "key.roll"
	OpKeyRead         Operation = "key.read"
	OpKeySetEnabled   Operation = "key.set-enabled"
	OpKeyRewrap       Operation = "key.rewrap"
	OpKeyringCreate   Operation = "keyring.create"
	OpKeyringRoll     Operation = "keyring.roll"
	OpKeyringRead     Operation = "keyring.read"
	OpKeyringSetState Operation = "keyring.set-enabled"
	OpKeyringUnwrap   Operation = "keyring.unwrap"
	OpKeyringWatch    Operation = "keyring.watch"
	OpInstancePrepare Operation = "instance.prepare"
	OpInstanceRead    Operation = "instance.read"
	OpInstanceOpen    Operation = "instance.open"
	OpInstanceReport  Operation = "instance.report"
	OpInstanceRevoke  Operation = "instance.revoke"
	OpGrantAdd        Operation = "grant.add"
	OpGrantRemove     Operation = "grant.remove"
	OpGrantRead       Operation = "grant.read"
	OpTokenCreate     Operation = "enrolment.create"
	OpEnroll          Operation = "enrolment.redeem"
	OpRenew           Operation = "identity.renew"
	OpIdentityRevoke  Operation = "identity.revoke"
	OpStatus          Operation = "system.status"
	OpBackup          Operation = "system.backup"
	OpRestore         Operation = "system.restore"
	OpAuditRead       Operation = "audit.read"
)

// Operations returns every operation there is, for a check at start that each
// has a rule.
func Operations() []Operation {
	return []Operation{
		OpVaultCreate, OpVaultRead, OpKeyCreate, OpKeyRoll, OpKeyRead, OpKeySetEnabled, OpKeyRewrap,
		OpKeyringCreate, OpKeyringRoll, OpKeyringRead, OpKeyringSetState, OpKeyringUnwrap, OpKeyringWatch,
		OpInstancePrepare, OpInstanceRead, OpInstanceOpen, OpInstanceReport, OpInstanceRevoke,
		OpGrantAdd, OpGrantRemove, OpGrantRead, OpTokenCreate, OpEnroll, OpRenew, OpIdentityRevoke,
		OpStatus, OpBackup, OpRestore, OpAuditRead,
	}
}

// An Event is one record of the audit log. No field ever holds a secret.
type Event struct {
	Time        time.Time   `json:"time"`
	Phase       Phase       `json:"phase"`
	Intent      uint64      `json:"intent,omitempty"` // sequence of the intent an outcome closes
	Operation   Operation   `json:"operation"`
	Principal   string      `json:"principal"`
	Serial      string      `json:"serial,omitempty"`
	Remote      string      `json:"remote,omitempty"`
	Correlation string      `json:"correlation,omitempty"`
	Object      string      `json:"object,omitempty"` // scope path, "/vaults/v/keyrings/r"
	Version     dek.Version `json:"version,omitempty"`
	Count       int         `json:"count,omitempty"`  // items of a batch
	Rule        string      `json:"rule,omitempty"`   // which rule allowed or refused
	Result      string      `json:"result,omitempty"` // "ok" or the error class
	Change      uint64      `json:"change,omitempty"` // state change number this act made; bookkeeping (starts, reports, counters) names none
	State       []byte      `json:"state,omitempty"`  // hash of the state after it
	Note        string      `json:"note,omitempty"`
}

// ResultUnknown is the Event.Result of an intent whose outcome was never
// recorded: the act may have happened.
const ResultUnknown = "unknown"

// A Phase says what an Event is.
type Phase uint8

// The phases. A refusal needs no intent: it is one record.
const (
	PhaseIntent Phase = iota + 1
	PhaseOutcome
	PhaseRefused
	PhaseSystem
)
