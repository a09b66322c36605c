package rpc

import (
	"time"
	"unicode/utf8"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/identity"
)

// Bounds of fields that package dek has none for.
const (
	maxKeyrings   = 64      // of one instance
	maxUsage      = 10000   // entries of one report
	maxCheckpoint = 4 * kib // a signed checkpoint in text form
	maxToken      = 256     // text of an enrolment token
	maxLifetime   = 30 * 24 * time.Hour
	maxRecords    = 100000 // of one read without follow
	chunkBytes    = 256 * kib
)

// first returns the first error, as a refusal: a field that is wrong stops the
// call before the service is asked.
func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return refuse(err)
		}
	}
	return nil
}

func named(field, s string) error { return dek.CheckName(field, s) }

func requestIDField(s string) error {
	if !isID(s) {
		return invalid("request_id: use up to 64 of A-Z, a-z, 0-9 and '-'")
	}
	return nil
}

func bitsField(n uint32) error {
	switch n {
	case 0, 2048, 3072, 4096:
		return nil
	}
	return invalid("bits %d: use 2048, 3072 or 4096 (0 is 3072)", n)
}

func lifetimeField(seconds int64) error {
	if seconds < 0 || seconds > int64(maxLifetime/time.Second) {
		return invalid("lifetime_seconds %d: use 0 to %d (0 is the default)", seconds, int64(maxLifetime/time.Second))
	}
	return nil
}

func keyringsField(names []string) error {
	if len(names) == 0 || len(names) > maxKeyrings {
		return invalid("keyrings: %d given, want 1 to %d", len(names), maxKeyrings)
	}
	seen := make(map[string]bool, len(names))
	for _, n := range names {
		if err := named("keyring", n); err != nil {
			return err
		}
		if seen[n] {
			return invalid("keyring %q is named twice", n)
		}
		seen[n] = true
	}
	return nil
}

func checkpointField(b []byte) error {
	if len(b) > maxCheckpoint || !utf8.Valid(b) {
		return invalid("checkpoint: %d bytes, want a signed checkpoint of at most %d", len(b), maxCheckpoint)
	}
	return nil
}

func tokenField(s string) error {
	if s == "" || len(s) > maxToken {
		return invalid("token: want its text, at most %d bytes", maxToken)
	}
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] > '~' {
			return invalid("token: has characters that no token has")
		}
	}
	return nil
}

func principalField(s string) error { return identity.CheckPrincipal(s) }

func scopeField(s string) error { return access.CheckScope(s) }

// wordField bounds a filter that is compared as text.
func wordField(field, s string) error {
	if len(s) > 256 || !utf8.ValidString(s) {
		return invalid("%s: want at most 256 bytes of UTF-8", field)
	}
	return nil
}

// secondsField accepts the years 1970 to 9999 (RFC 3339 ends there).
func secondsField(field string, n int64) error {
	if n < 0 || n > 253402300799 {
		return invalid("%s %d: want seconds since 1970", field, n)
	}
	return nil
}

// wrappedField parses a wrapped DEK. Whatever is wrong with one has one
// answer, here and behind: not authentic.
func wrappedField(b []byte) (dek.Wrapped, error) {
	if len(b) <= dek.MaxWrapped {
		if w, err := dek.ParseWrapped(b); err == nil {
			return w, nil
		}
	}
	return dek.Wrapped{}, refuse(dek.ErrAuth)
}
