package kms

import (
	"time"

	"github.com/keyward/keyward/dek"
)

// A State is where one version of a key or keyring stands.
type State uint8

// The states. Only Enabled versions protect; Enabled and Archived ones unwrap;
// Disabled ones do neither until they are enabled again.
const (
	Pending   State = iota + 1 // recorded, not yet in the token: never used
	Enabled                    // usable; the newest enabled version is current
	Disabled                   // switched off by a person, reversible
	Failed                     // creation failed; the number is never reused
	Destroyed                  // gone; a tombstone
)

// A Vault is a named collection with its own access rules and seal keys.
type Vault struct {
	Name        string
	Created     time.Time
	SealVersion dek.Version // the seal key version in use
}

// A MasterKey is a named asymmetric key whose private halves are in the token.
type MasterKey struct {
	Vault    string
	Name     string
	Bits     int // RSA modulus: 2048, 3072 or 4096
	Current  dek.Version
	Versions []MasterVersion // ascending
}

// A MasterVersion is one version of a master key.
type MasterVersion struct {
	Version dek.Version
	State   State
	Object  dek.ObjectID // CKA_ID in the token
	Created time.Time
	SPKI    []byte // DER of the public half, pinned at creation
}

// A Keyring is a named set of DEK versions for one purpose.
type Keyring struct {
	Vault     string
	Name      string
	MasterKey string
	ServerKey uint32 // the key id a MariaDB server knows it by; 0: none
	Current   dek.Version
	Versions  []KeyringVersion // ascending
}

// A KeyringVersion is one DEK as the service keeps it.
type KeyringVersion struct {
	Version       dek.Version
	ServerVersion uint32 // the number a server sees: first 1, a roll adds two
	State         State
	Created       time.Time
	Master        dek.Version // master key version its wrap is for
	Wrapped       []byte      // dek.Wrapped bytes; empty in lists
}

// An Instance is a registered database.
type Instance struct {
	Name      string
	Kind      string // "mariadb"
	Vault     string
	Keyrings  []string
	Principal string // "host/NAME"
	Prepared  time.Time
	Enrolled  time.Time // zero: the token is not yet redeemed
	Connected bool      // a Watch stream is open now
	LastSeen  time.Time
	Usage     []Usage // newest report of versions the server asked for
}

// A Usage says when an instance last asked for a version.
type Usage struct {
	Keyring string
	Version dek.Version
	Last    time.Time
}

// An EnrolmentToken lets one principal enrol once. Text is shown once and is
// a secret; the service keeps its hash only.
type EnrolmentToken struct {
	Principal string
	Expires   time.Time
	Text      TokenText
}

// A Status is what `keyward status` shows.
type Status struct {
	Token        string
	TokenHealthy bool
	OAEPHash     string
	Recovery     string // recipient and m of n, empty: none (red)
	BackupTarget string // empty: none (red)
	LastBackup   time.Time
	Changes      uint64 // state change counter
	AuditSize    uint64
	Quarantined  []dek.ObjectID // objects in the token the state does not know
	Problems     []Problem
	Instances    []Instance
}

// A Problem is one thing that someone must mend, with what is at stake.
type Problem struct {
	Severity string // "red" or "yellow"
	Text     string
	Remedy   string
}
