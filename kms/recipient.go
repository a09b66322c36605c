package kms

import (
	"fmt"
	"strings"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

// canonicalRecipient returns the one spelling of a recipient's text.
func canonicalRecipient(text string) (string, error) {
	r, err := recovery.ParseRecipient(strings.TrimSpace(text))
	if err != nil {
		return "", fmt.Errorf("recovery recipient: %w", err)
	}
	return r.String(), nil
}

// sealToRecipient makes a recovery copy of k.
func sealToRecipient(text string, b dek.Binding, k *dek.Key) ([]byte, error) {
	r, err := recovery.ParseRecipient(text)
	if err != nil {
		return nil, fmt.Errorf("recovery recipient: %w", err)
	}
	sealed, err := r.Seal(b, k)
	if err != nil {
		return nil, fmt.Errorf("recovery copy: %w", err)
	}
	return sealed, nil
}

// describeRecipient is what Status shows.
func describeRecipient(text string) string {
	if text == "" {
		return ""
	}
	r, err := recovery.ParseRecipient(text)
	if err != nil {
		return ""
	}
	m, n := r.Threshold()
	return fmt.Sprintf("%s %s (%d of %d)", r.Label(), r.Fingerprint(), m, n)
}
