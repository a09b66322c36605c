package kms

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// The records of the store. Each is JSON, sealed for its path (FORMAT.md,
// "Records"); only boot and the two markers are in the clear, because they say
// how to open the others.

// An object is an ObjectID that reads as hex in JSON.
type object dek.ObjectID

func (o object) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, o[:]), nil }

func (o *object) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(o) {
		return fmt.Errorf("%w: object id of %d characters", dek.ErrInvalid, len(b))
	}
	_, err := hex.Decode(o[:], b)
	return err
}

// A sealVersion is one version of a seal key as it is stored.
type sealVersion struct {
	Version  dek.Version `json:"version"`
	Sealed   []byte      `json:"sealed"`             // under the root of the token
	Recovery []byte      `json:"recovery,omitempty"` // to the recovery recipient
}

// A bootRecord is how a start finds its way: it is in the clear, its content
// is proven by the token (Sealed) and by the digest in the head.
type bootRecord struct {
	Format       int           `json:"format"`
	Change       uint64        `json:"change"`
	Installation string        `json:"installation"`
	Root         object        `json:"root"`
	Audit        object        `json:"audit"`
	AuditKey     []byte        `json:"audit_key"` // its public half, SubjectPublicKeyInfo: a restore links the next log to this one
	CA           object        `json:"ca"`
	Seals        []sealVersion `json:"seals"` // system seal key, ascending
}

// A headRecord closes every change.
type headRecord struct {
	Change   uint64 `json:"change"`
	Act      uint64 `json:"act"`      // newest change that is more than bookkeeping
	Epoch    uint64 `json:"epoch"`    // grows with every start: an older process is fenced
	Digest   []byte `json:"digest"`   // keyed sum over all records, 32 bytes
	Boot     []byte `json:"boot"`     // SHA-256 of the boot record, which has no seal of its own
	Log      uint64 `json:"log"`      // audit sequence known when it was made
	Reserved uint64 `json:"reserved"` // seals of the current system seal key, reserved ahead
}

type systemRecord struct {
	Created    time.Time     `json:"created"`
	Recipient  string        `json:"recipient,omitempty"`
	LastBackup time.Time     `json:"last_backup,omitzero"`
	Restored   time.Time     `json:"restored,omitzero"`
	Previous   []previousLog `json:"previous,omitempty"`
}

type vaultRecord struct {
	Created  time.Time     `json:"created"`
	Seals    []sealVersion `json:"seals"`    // ascending; the last one is in use
	Reserved uint64        `json:"reserved"` // seals of the last one, reserved ahead
}

type keyRecord struct {
	Bits    int       `json:"bits"`
	Created time.Time `json:"created"`
}

type keyVersionRecord struct {
	State   State     `json:"state"`
	Object  object    `json:"object"`
	Created time.Time `json:"created"`
	Changed time.Time `json:"changed"`
	SPKI    []byte    `json:"spki,omitempty"`
	Request string    `json:"request,omitempty"`
}

type ringRecord struct {
	MasterKey string    `json:"master_key"`
	ServerKey uint32    `json:"server_key,omitempty"`
	Created   time.Time `json:"created"`
}

type ringVersionRecord struct {
	ServerVersion uint32      `json:"server_version"`
	State         State       `json:"state"`
	Created       time.Time   `json:"created"`
	Changed       time.Time   `json:"changed"`
	Master        dek.Version `json:"master"`
	Wrapped       []byte      `json:"wrapped"`
	Recovery      []byte      `json:"recovery,omitempty"`
	Request       string      `json:"request,omitempty"`
}

type instanceRecord struct {
	Kind      string    `json:"kind"`
	Vault     string    `json:"vault"`
	Keyrings  []string  `json:"keyrings"`
	Principal string    `json:"principal"`
	Prepared  time.Time `json:"prepared"`
	Enrolled  time.Time `json:"enrolled,omitzero"`
	Revoked   time.Time `json:"revoked,omitzero"`
	Request   string    `json:"request,omitempty"`
}

type usageRecord struct {
	LastSeen time.Time `json:"last_seen"`
	Usage    []Usage   `json:"usage"`
}

type grantsRecord struct {
	Grants []Grant `json:"grants"`
}

type deniedRecord struct {
	At time.Time `json:"at"`
	By string    `json:"by"`
}

type tokenRecord struct {
	Hash      []byte    `json:"hash"` // SHA-256 of the secret half
	Principal string    `json:"principal"`
	By        string    `json:"by"`
	Expires   time.Time `json:"expires"`
	Used      time.Time `json:"used,omitzero"`
	Reused    time.Time `json:"reused,omitzero"` // somebody presented it again: alarm
}

type blobRecord struct {
	Data []byte `json:"data"`
}

// The paths.
const (
	pathBoot      = "boot"
	pathHead      = "head"
	pathSystem    = "system"
	pathInit      = "marker/init"    // an Init under way
	pathRestore   = "marker/restore" // a Restore under way
	prefixVault   = "vaults/"
	prefixKey     = "keys/"
	prefixRing    = "keyrings/"
	prefixInst    = "instances/"
	prefixUsage   = "usage/"
	prefixGrants  = "grants/"
	prefixDenied  = "denied/"
	prefixToken   = "tokens/"
	prefixBlob    = "blobs/"
	recordVersion = 1 // of sealed records and of boot
)

func vaultPath(vault string) string      { return prefixVault + vault }
func keyPath(vault, name string) string  { return prefixKey + vault + "/" + name }
func ringPath(vault, name string) string { return prefixRing + vault + "/" + name }

func versionPath(parent string, v dek.Version) string {
	return parent + "/" + strconv.FormatUint(uint64(v), 10)
}

// splitVersion takes "v/name" or "v/name/7" apart.
func splitVersion(s string) (id string, v dek.Version, ok bool) {
	part := strings.Split(s, "/")
	switch len(part) {
	case 2:
		return s, 0, true
	case 3:
		n, err := strconv.ParseUint(part[2], 10, 32)
		return part[0] + "/" + part[1], dek.Version(n), err == nil && n > 0
	}
	return "", 0, false
}

// The scopes of grants and events.
func vaultScope(vault string) string      { return "/vaults/" + vault }
func keyScope(vault, name string) string  { return "/vaults/" + vault + "/keys/" + name }
func ringScope(vault, name string) string { return "/vaults/" + vault + "/keyrings/" + name }

// versionScope is keyScope or ringScope, by the first part of a record's path.
func versionScope(kind, vault, name string) string {
	return "/vaults/" + vault + "/" + kind + "/" + name
}

// decodeStrict refuses unknown fields and trailing bytes: a record of a newer
// release must not lose fields by being rewritten here.
func decodeStrict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return fmt.Errorf("%w: bytes after the record", dek.ErrInvalid)
	}
	return nil
}
