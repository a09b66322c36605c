package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// A pastLog finds the audit log that a restore ends, and begins the one that
// follows it.
type pastLog struct {
	parts *parts
	given string // --old-audit-dir, may be empty
	here  bool   // it is in audit_dir and must be moved aside
}

// asideMark is between audit_dir and the time of the restore in the name of a
// log that was moved aside.
const asideMark = ".before-restore-"

// find implements kms.RestoreOptions.Before. An interrupted restore has moved
// the log aside already.
func (l *pastLog) find(ctx context.Context, previous kms.PreviousLog) (kms.AuditTail, error) {
	dir := filepath.Clean(l.parts.config.AuditDir)
	check := audit.Check{Keys: []crypto.PublicKey{previous.Key}, Exported: [][]byte{previous.Checkpoint}}
	if l.given != "" {
		l.here = filepath.Clean(l.given) == dir
		p, err := audit.OpenPast(ctx, os.DirFS(l.given), check)
		if err != nil {
			return nil, fmt.Errorf("old-audit-dir %s: %w", l.given, err)
		}
		return p, nil
	}
	places, err := movedAside(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range append([]string{dir}, places...) {
		p, err := audit.OpenPast(ctx, os.DirFS(d), check)
		switch {
		case err == nil:
			l.here = d == dir
			l.parts.log.Info("the backup is compared with the audit log before", "dir", d)
			return p, nil
		case errors.Is(err, dek.ErrCorrupt):
			return nil, fmt.Errorf("%s: %w. To go on without comparing, move it away yourself (keep it as evidence) and run restore again", d, err)
		case !errors.Is(err, dek.ErrNotFound) && !errors.Is(err, dek.ErrAuth): // nothing there, or another's
			return nil, fmt.Errorf("%s: %w", d, err)
		}
	}
	return nil, nil
}

// follow implements kms.RestoreOptions.OpenAudit: it opens the audit log; a new
// one is linked to the one that the backup knew, which is moved aside.
func (l *pastLog) follow(ctx context.Context, signer crypto.Signer, previous *kms.PreviousLog) (kms.Auditor, error) {
	if previous == nil {
		return l.parts.kmsConfig(nil).OpenAudit(ctx, signer)
	}
	dir := filepath.Clean(l.parts.config.AuditDir)
	if l.here {
		if err := l.moveAside(dir); err != nil {
			return nil, err
		}
	}
	a, err := l.parts.kmsConfig(&audit.Link{Checkpoint: previous.Checkpoint, Key: previous.Key}).OpenAudit(ctx, signer)
	if errors.Is(err, dek.ErrCorrupt) {
		return nil, fmt.Errorf("%s holds a log that neither the key in the backup nor the new one signed (of a later restore, or of another installation): "+
			"move it away (keep it) and run restore again: %w", dir, err)
	}
	return a, err
}

// movedAside lists the logs that restores moved aside, the newest first.
func movedAside(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fileError("list", filepath.Dir(dir), err)
	}
	var out []string
	for _, e := range slices.Backward(entries) {
		if strings.HasPrefix(e.Name(), filepath.Base(dir)+asideMark) {
			out = append(out, filepath.Join(filepath.Dir(dir), e.Name()))
		}
	}
	return out, nil
}

func (l *pastLog) moveAside(dir string) error {
	to := dir + asideMark + systemClock{}.Now().UTC().Format("20060102T150405Z")
	if err := os.Rename(dir, to); err != nil {
		return fmt.Errorf("%w: move the audit log before aside: %w: move what is in %s to another directory yourself and give it with --old-audit-dir",
			dek.ErrPrecondition, err, dir)
	}
	l.here = false
	l.parts.log.Warn("the audit log before was moved aside: keep it", "dir", to)
	return syncDir(filepath.Dir(to))
}
