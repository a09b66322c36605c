package kms

import (
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/keyward/keyward/dek"
)

// CreateKey asks for a master key with its first version.
type CreateKey struct {
	RequestID string // the same id returns the same version; empty: none
	Vault     string
	Name      string
	Bits      int // 2048, 3072 or 4096; 0: 3072
}

// RollKey asks for a new current version of a master key.
type RollKey struct {
	RequestID string // the same id returns the same version; empty: none
	Vault     string
	Name      string
}

// CreateKeyring asks for a keyring with its first version.
type CreateKeyring struct {
	RequestID string // the same id returns the same version; empty: none
	Vault     string
	Name      string
	MasterKey string // a master key of the same vault
	ServerKey uint32 // the key id a MariaDB server knows it by; 0: none
}

// RollKeyring asks for a new current version of a keyring.
type RollKeyring struct {
	RequestID string // the same id returns the same version; empty: none
	Vault     string
	Name      string
}

// SetEnabled switches versions of a master key or keyring on or off.
type SetEnabled struct {
	Vault   string
	Name    string
	Version dek.Version // 0: all versions
	Enabled bool
}

// An Effect says which instances heard of a change at once.
type Effect struct {
	Notified []string // connected: told through their Watch
	Absent   []string // use the object and are not connected
}

// PrepareInstance asks for a database to be registered.
type PrepareInstance struct {
	RequestID string // the same id returns the same instance with a new token
	Kind      string // "mariadb"
	Name      string
	Vault     string
	Keyrings  []string      // existing keyrings of the vault, 1 to 64
	Lifetime  time.Duration // of the token; 0: one hour, at most 30 days
}

// OpenInstance authorises a database start.
type OpenInstance struct {
	Instance   string
	Cold       bool   // a database process that holds no key yet
	Checkpoint []byte // newest audit checkpoint the agent saw; may be empty
}

// An InstanceView is what an instance may use. A version is Enabled and has
// its Wrapped bytes if it can be unwrapped now, else it is Disabled with none.
type InstanceView struct {
	Instance
	Keyrings   []Keyring // with wrapped bytes; shadows Instance.Keyrings
	Generation uint64    // grows with every change of state
	Checkpoint []byte    // newest audit checkpoint
}

// A NoticeKind says what happened to a keyring.
type NoticeKind uint8

// The kinds of notices.
const (
	NoticePing      NoticeKind = iota + 1 // nothing; carries the newest checkpoint
	NoticeRolled                          // a new current version
	NoticeDisabled                        // a version was switched off, or a right removed
	NoticeEnabled                         // a version was switched on, or a right given
	NoticeRewrapped                       // the wrapped bytes changed: open again
	NoticeRevoked                         // the instance is revoked; the stream ends
)

// A Notice tells a watching instance to open again (or, for a ping, that all
// is well). Notices of one keyring and kind that were not yet taken are one.
type Notice struct {
	Kind       NoticeKind
	Keyring    string // a keyring of the instance's vault; empty for a ping
	Generation uint64
	Checkpoint []byte // newest audit checkpoint, on pings
}

// TokenText is the text of an enrolment token: a secret that can't be printed,
// logged or encoded by accident. Reveal gives the text.
type TokenText string

const redactedToken = "kms.TokenText(redacted)"

// Reveal returns the text, to show it once to the person who asked for it.
func (t TokenText) Reveal() string { return string(t) }

// Format prints a fixed text for every verb.
func (TokenText) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redactedToken) }

// LogValue logs a fixed text.
func (TokenText) LogValue() slog.Value { return slog.StringValue(redactedToken) }

// MarshalText refuses: encoders get an error, never the text.
func (TokenText) MarshalText() ([]byte, error) {
	return nil, fmt.Errorf("kms: an enrolment token can't be serialised; use Reveal")
}
