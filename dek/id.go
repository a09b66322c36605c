package dek

import (
	"fmt"
	"strconv"
)

// A Version numbers the versions of a keyring or master key from 1. Zero is
// refused everywhere: it never names a version.
type Version uint32

// An ObjectID is the random CKA_ID of an object in a token, recorded before
// the object is made (PKCS#11 v2.40 §4.4).
type ObjectID = [16]byte

// A KeyringID names a keyring inside an installation.
type KeyringID struct {
	Vault   string
	Keyring string
}

// String returns "vault/keyring", the form used in messages and on the wire.
func (id KeyringID) String() string { return id.Vault + "/" + id.Keyring }

// A KeyID names one DEK: one version of one keyring.
type KeyID struct {
	KeyringID
	Version Version
}

// String returns "vault/keyring/version".
func (id KeyID) String() string {
	return id.KeyringID.String() + "/" + strconv.FormatUint(uint64(id.Version), 10)
}

// A MasterID names one version of a master key.
type MasterID struct {
	Vault   string
	Key     string
	Version Version
}

// String returns "vault/key/version".
func (id MasterID) String() string {
	return id.Vault + "/" + id.Key + "/" + strconv.FormatUint(uint64(id.Version), 10)
}

// maxName bounds names so that paths, labels and log lines stay readable.
const maxName = 63

// CheckName reports whether s may name the thing called field (a vault, key,
// keyring, instance, ...): 1 to 63 bytes of a-z, 0-9 and '-', the first and
// the last not '-'. The error wraps ErrInvalid and names the field.
func CheckName(field, s string) error {
	ok := len(s) >= 1 && len(s) <= maxName && s[0] != '-' && s[len(s)-1] != '-'
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c == '-' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
	}
	if !ok {
		return fmt.Errorf("%w: %s %q: use 1 to %d of a-z, 0-9 and '-', not at either end", ErrInvalid, field, s, maxName)
	}
	return nil
}
