package dek

import (
	"encoding/binary"
	"fmt"
	"math"
)

// A Purpose says what a sealed message is. Every purpose is sealed under a
// subkey of its own, so that a message of one kind can't be passed off as
// another. The numbers are part of the format; zero is refused.
type Purpose uint8

// The purposes. New ones are added at the end.
const (
	PurposeDEK        Purpose = iota + 1 // outer layer of a wrapped DEK
	PurposeRecord                        // record in the store
	PurposeSecret                        // secret of a vault
	PurposePrivateKey                    // private half of a software-protected master key
	PurposeSealKey                       // seal key of a vault, under root or recipient
	PurposeBackup                        // backup of the service
	PurposeIdentity                      // identity of an agent or operator at rest
	PurposeToken                         // enrolment token
	purposeEnd
)

// purposeNames are the HKDF labels of FORMAT.md: never change one.
var purposeNames = [purposeEnd]string{
	PurposeDEK: "dek", PurposeRecord: "record", PurposeSecret: "secret", PurposePrivateKey: "private-key",
	PurposeSealKey: "seal-key", PurposeBackup: "backup", PurposeIdentity: "identity", PurposeToken: "token",
}

// String returns the name of p in messages and in the key derivation.
func (p Purpose) String() string {
	if !p.valid() {
		return fmt.Sprintf("Purpose(%d)", uint8(p))
	}
	return purposeNames[p]
}

func (p Purpose) valid() bool { return p >= 1 && p < purposeEnd }

// A Binding is the place a sealed message belongs to. All of it is
// authenticated and none of it is stored: whoever opens must already know it.
// Which fields a caller fills is the caller's rule; empty ones are bound too.
type Binding struct {
	Purpose Purpose
	Vault   string // at most 65,535 bytes
	Object  string // keyring, record path, ...; at most 65,535 bytes
	Version uint64 // key version, record revision, ...
}

// Canonical returns the one encoding of b (FORMAT.md, "Binding"), for use as
// additional authenticated data where the sealing itself happens elsewhere (in
// a token, say). It wraps ErrInvalid for an unknown purpose or a string over
// the limit.
func (b Binding) Canonical() ([]byte, error) {
	if !b.Purpose.valid() {
		return nil, fmt.Errorf("%w: binding: unknown purpose %d", ErrInvalid, uint8(b.Purpose))
	}
	if len(b.Vault) > math.MaxUint16 || len(b.Object) > math.MaxUint16 {
		return nil, fmt.Errorf("%w: binding: vault or object name over %d bytes", ErrInvalid, math.MaxUint16)
	}
	out := make([]byte, 0, 2+2+len(b.Vault)+2+len(b.Object)+8)
	out = append(out, sealFormat, byte(b.Purpose))
	out = binary.BigEndian.AppendUint16(out, uint16(len(b.Vault)))
	out = append(out, b.Vault...)
	out = binary.BigEndian.AppendUint16(out, uint16(len(b.Object)))
	out = append(out, b.Object...)
	return binary.BigEndian.AppendUint64(out, b.Version), nil
}
