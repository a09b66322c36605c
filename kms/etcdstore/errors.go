package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/keyward/keyward/dek"
)

// classify wraps an error of etcd in the class that says what the caller may
// do. What is not known not to have happened is dek.ErrUnavailable.
func (s *Store) classify(ctx context.Context, act string, err error) error {
	if err == nil {
		return nil
	}
	// The end of the store explains better than the cancelled call it caused.
	if cause := context.Cause(s.life); cause != nil {
		return fmt.Errorf("store: %s: %w", act, cause)
	}
	class := dek.ErrUnavailable
	switch {
	case errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev):
		class = dek.ErrConflict
	case errors.Is(err, rpctypes.ErrNoSpace):
		class = dek.ErrExhausted
	case errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrTooManyOps),
		errors.Is(err, rpctypes.ErrDuplicateKey), errors.Is(err, rpctypes.ErrEmptyKey):
		class = dek.ErrInvalid
	case errors.Is(err, rpctypes.ErrCorrupt):
		class = dek.ErrCorrupt
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed),
		errors.Is(err, rpctypes.ErrUserEmpty):
		class = dek.ErrPrecondition
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: store: %s: %w (%w)", class, act, err, cause)
	}
	return fmt.Errorf("%w: store: %s: %w", class, act, err)
}

// fatalError turns the last words of an embedded etcd into an error that says
// what to do. Only etcd's text is left of a full disk at this place.
func fatalError(dir, words string) error {
	switch {
	case strings.Contains(words, syscall.ENOSPC.Error()):
		return fmt.Errorf("%w: store: no space left for %s: free some and start again; nothing acknowledged is lost (%s)", dek.ErrExhausted, dir, words)
	case strings.Contains(words, syscall.EDQUOT.Error()):
		return fmt.Errorf("%w: store: disk quota of %s reached: raise it and start again; nothing acknowledged is lost (%s)", dek.ErrExhausted, dir, words)
	default:
		return fmt.Errorf("%w: store: etcd in %s can't go on: check the disk and the kernel's log, then start again; nothing acknowledged is lost (%s)", dek.ErrUnavailable, dir, words)
	}
}

// corrupt tells the operator that dir is not safe to use and the way on.
func corrupt(dir, format string, a ...any) error {
	return fmt.Errorf("%w: store in %s: %s. Nothing was changed. The way on: keep a copy of the directory, "+
		"then restore the newest backup into an empty one (keyward-kms restore)", dek.ErrCorrupt, dir, fmt.Sprintf(format, a...))
}
