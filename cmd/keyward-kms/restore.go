package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/cmd/internal/shares"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/kms"
)

// A restoring is what the flags of restore say.
type restoring struct {
	config, backup string
	shareFiles     []string
	askShares      bool
	acceptRollback bool
	newLog         bool
	newRecipient   string
	oldAudit       string
}

func newRestore(s *streams) *cobra.Command {
	var o restoring
	cmd := &cobra.Command{
		Use:   "restore",
		Short: "Bring a backup back: into the same token, or into a new one with recovery shares",
		Long: `restore fills an empty state_dir from a backup. If the token still holds the
root it was made with, nothing else is needed. If the token is gone, enough
holders of recovery shares enter theirs (--ask-shares, or --share-file for each),
and everything moves to the new token: new master key versions, every data key
wrapped again under the same numbers. Databases and agents keep their
certificates and notice nothing but the outage.

A backup older than what the audit log has seen is refused; --accept-rollback
goes on, lists what is missing and keeps disabled what was disabled since.

With a new token (or --new-log) a new audit log begins. The log before is read,
from audit_dir or --old-audit-dir, verified with the key in the backup, and moved
aside to audit_dir.before-restore-TIME; keep it. If it is gone, nothing can be
compared: look through what was disabled, and through exported checkpoints.`,
		Example: `  keyward-kms restore --config /etc/keyward/kms.json --backup keyward.backup
  keyward-kms restore --config /etc/keyward/kms.json --backup keyward.backup --ask-shares`,
		Args:    noArgs,
		PreRunE: needFlags("config", "backup"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			report, err := restore(cmd.Context(), s, o, newLogger(s.err))
			if err != nil {
				return err
			}
			printReport(s.out, report)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.config, "config", "", "configuration file; its state_dir must be empty")
	f.StringVar(&o.backup, "backup", "", "backup file")
	f.StringArrayVar(&o.shareFiles, "share-file", nil, "file with one recovery share; give it for each share")
	f.BoolVar(&o.askShares, "ask-shares", false, "ask for recovery shares, without echo")
	f.BoolVar(&o.acceptRollback, "accept-rollback", false, "accept a backup that is older than the audit log")
	f.BoolVar(&o.newLog, "new-log", false, "begin a new audit log although the token is the old one: the old log is lost")
	f.StringVar(&o.oldAudit, "old-audit-dir", "", "directory of the audit log before, if it is not in audit_dir; it is only read")
	f.StringVar(&o.newRecipient, "new-recipient-file", "", "seal to this recovery recipient from now on")
	return cmd
}

func restore(ctx context.Context, s *streams, o restoring, log *slog.Logger) (report kms.RestoreReport, err error) {
	c, err := loadConfig(o.config)
	if err != nil {
		return report, err
	}
	f, err := os.Open(o.backup)
	if err != nil {
		return report, fmt.Errorf("%w: backup: %w", dek.ErrInvalid, err)
	}
	defer f.Close()
	opt, err := o.options(ctx, s)
	if err != nil {
		return report, err
	}
	expect := hsm.Identity{}
	if opt.Private != nil { // the shares stand in for the token: any may take over
		defer opt.Private.Destroy()
	} else if expect, err = readPin(c); err != nil {
		return report, err
	}
	p, err := openPartsOn(ctx, c, expect, log)
	if err != nil {
		return report, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	past := &pastLog{parts: p, given: o.oldAudit}
	opt.Before, opt.OpenAudit = past.find, past.follow
	if report, err = kms.Restore(ctx, p.kmsConfig(nil), f, opt); err != nil {
		return report, err
	}
	return report, writePin(c, p.token)
}

// options reads the files and shares that the flags name; the caller destroys
// Private.
func (o *restoring) options(ctx context.Context, s *streams) (opt kms.RestoreOptions, err error) {
	opt = kms.RestoreOptions{AcceptRollback: o.acceptRollback, NewLog: o.newLog}
	if o.newRecipient != "" {
		b, err := os.ReadFile(o.newRecipient)
		if err != nil {
			return opt, fmt.Errorf("%w: new-recipient-file: %w", dek.ErrInvalid, err)
		}
		opt.Recipient = string(b)
	}
	if o.askShares || len(o.shareFiles) > 0 {
		if opt.Private, err = shares.Join(ctx, s.in, s.err, o.shareFiles); err != nil {
			return opt, fmt.Errorf("recovery shares: %w", err)
		}
	}
	return opt, nil
}

// firstLines returns the first n lines of a checkpoint: log, size, root.
func firstLines(checkpoint []byte, n int) []string {
	lines := strings.Split(string(checkpoint), "\n")
	return lines[:min(n, len(lines))]
}

func printReport(w io.Writer, r kms.RestoreReport) {
	fmt.Fprintf(w, "installation %s, backup of %s (change %d)\n", r.Installation, r.Taken.UTC().Format(time.RFC3339), r.Change)
	fmt.Fprintf(w, "audit key of the backup: %x\n", sha256.Sum256(r.AuditKey)) // as keyward audit verify shows it
	fmt.Fprintf(w, "audit checkpoint of the backup: %s\n", strings.Join(firstLines(r.Checkpoint, 3), " "))
	fmt.Fprintln(w, "compare both with a log exported earlier: they are all that tells this backup from a planted one")
	if r.NewKeys > 0 {
		fmt.Fprintf(w, "moved to a new token: %d new master key versions, %d data key versions wrapped again\n", r.NewKeys, r.Rewrapped)
	}
	if r.Uncompared {
		fmt.Fprintln(w, "NOT COMPARED: the audit log before was not found: what was disabled or made after the backup is not known")
	}
	for _, part := range []struct {
		title string
		list  []string
	}{
		{"LOST, without a recovery copy", r.Lost},
		{"acts after the backup, gone", r.Missing},
		{"kept disabled", r.KeptDisabled},
		{"given out after the backup, not given again", r.Reserved},
	} {
		for _, item := range part.list {
			fmt.Fprintf(w, "%s: %s\n", part.title, item)
		}
	}
	fmt.Fprintln(w, "now start it: keyward-kms serve")
}
