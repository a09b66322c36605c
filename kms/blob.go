package kms

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	"github.com/keyward/keyward/dek"
)

// maxBlob bounds a blob, in bytes.
const maxBlob = 256 << 10

// Blob returns a sealed record of the wiring ("tls/ca"), and whether it is
// there. The bytes may be secret (a private key); the caller wipes its copy.
func (s *Service) Blob(name string) ([]byte, bool) {
	b, ok := s.view.Load().blobs.get(name)
	return bytes.Clone(b), ok
}

// PutBlob stores a sealed record of the wiring, in place of the one before. It
// wraps dek.ErrInvalid (name "a/b" of names, at most 256 KiB) and what a change
// of state wraps.
func (s *Service) PutBlob(ctx context.Context, name string, b []byte) error {
	if len(b) > maxBlob {
		return fmt.Errorf("%w: blob %q has %d bytes, at most %d fit", dek.ErrInvalid, name, len(b), maxBlob)
	}
	for _, part := range strings.Split(name, "/") {
		if err := dek.CheckName("blob", part); err != nil {
			return err
		}
	}
	_, err := s.keepBooks(ctx, func(*view) ([]mut, error) {
		return []mut{{prefixBlob + name, &blobRecord{bytes.Clone(b)}}}, nil
	})
	if err != nil {
		return err
	}
	return s.recordSystem(ctx, Event{Operation: "system.blob", Object: "/blobs", Result: resultOK, Note: name})
}
