package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/cmd/internal/shares"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

func (a *app) recoveryCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recovery",
		Short: "Make and check recovery shares (offline)",
		Long: `A token that dies takes its master keys along. Copies of the keys are therefore
sealed to a recovery recipient, whose private half is split among people: enough of
them together move everything to a new token, fewer learn nothing. These commands
need no network; run them on a machine that has none.`,
		Example: "  keyward recovery generate --shares 5 --threshold 3 --label acme-2026 --out shares\n  keyward recovery check",
	}
	group(cmd)
	cmd.AddCommand(a.recoveryGenerateCmd(), a.recoveryCheckCmd())
	return cmd
}

// A recipientView is what generate made: no secret is in it.
type recipientView struct {
	Label       string   `json:"label"`
	Fingerprint string   `json:"fingerprint"`
	Shares      int      `json:"shares"`
	Threshold   int      `json:"threshold"`
	Recipient   string   `json:"recipient_file"`
	Files       []string `json:"share_files"`
}

func (a *app) recoveryGenerateCmd() *cobra.Command {
	var shares, threshold int
	var label, out string
	cmd := &cobra.Command{
		Use:   "generate --shares N --threshold M --out DIR",
		Short: "Make a recovery recipient and its shares",
		Long: `Makes a key pair (HPKE, ML-KEM-1024 with P-384) and splits its private half into
N shares, any M of which join again. Writes recipient.txt, which the key service
gets, and one file per share, mode 0600: hand each to one person and delete it.`,
		Example: "  keyward recovery generate --shares 5 --threshold 3 --label acme-2026 --out shares",
		Args:    args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			if out == "" {
				return wrongUse("--out is needed: the shares are written to files only")
			}
			r, parts, err := recovery.Generate(threshold, shares, label)
			if errors.Is(err, dek.ErrInvalid) {
				return asUsage(err)
			}
			if err != nil {
				return err
			}
			defer destroyShares(parts)
			v, err := writeShares(out, r, parts)
			if err != nil {
				return err
			}
			return a.emit(v, v.print)
		},
	}
	f := cmd.Flags()
	f.IntVar(&shares, "shares", 5, "`number` of shares, 2 to 255")
	f.IntVar(&threshold, "threshold", 3, "how `many` shares join, from 2")
	f.StringVar(&label, "label", "keyward", "`name` that tells this recipient from others, up to 63 bytes")
	f.StringVar(&out, "out", "", "`directory` for the files, made 0700; must not hold a recipient yet")
	return cmd
}

func destroyShares(parts []recovery.Share) {
	for _, s := range parts {
		s.Destroy()
	}
}

// writeShares writes the files; recipient.txt comes last, so that it is there
// only if every share is.
func writeShares(dir string, r recovery.Recipient, parts []recovery.Share) (recipientView, error) {
	m, n := r.Threshold()
	v := recipientView{Label: r.Label(), Fingerprint: r.Fingerprint(), Shares: n, Threshold: m,
		Recipient: filepath.Join(dir, "recipient.txt"), Files: []string{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return v, err
	}
	for _, s := range parts {
		text, err := s.Text()
		if err != nil {
			return v, err
		}
		name := filepath.Join(dir, fmt.Sprintf("share-%03d.txt", s.Index()))
		err = writeNew(name, append(text, '\n'))
		clear(text[:cap(text)])
		if err != nil {
			return v, err
		}
		v.Files = append(v.Files, name)
	}
	return v, writeNew(v.Recipient, []byte(r.String()+"\n"))
}

// writeNew makes a file of mode 0600 that is not there yet, durably.
func writeNew(name string, b []byte) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return withHint(fmt.Errorf("%w: %s", dek.ErrExists, name), "choose an empty directory: shares are never replaced")
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func (v recipientView) print(t *table) {
	t.line("recipient %q, fingerprint %s: any %d of %d shares", v.Label, v.Fingerprint, v.Threshold, v.Shares)
	t.line("  %s goes to the key service (recovery_recipient_file)", v.Recipient)
	t.line("  %s to %s go to %d people", v.Files[0], filepath.Base(v.Files[len(v.Files)-1]), v.Shares)
	t.line("now: give each share to one person, on paper or a stick of their own; let %d of", v.Threshold)
	t.line("them prove with `keyward recovery check` that the shares join; delete these files.")
	t.line("Compare the fingerprint with what `keyward status` shows.")
}

func (a *app) recoveryCheckCmd() *cobra.Command {
	var files []string
	var recipientFile string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Prove that shares join, without revealing anything",
		Long: `Asks for shares one after the other, with echo off, or reads them from files, and
says whether they join to the recipient they name. Nothing is written.`,
		Example: "  keyward recovery check\n  keyward recovery check --recipient-file recipient.txt --share-file a.txt --share-file b.txt --share-file c.txt",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			parts, err := shares.Read(cmd.Context(), a.in, a.err, files)
			defer func() { destroyShares(parts) }()
			if err != nil {
				return err
			}
			p, err := recovery.Combine(parts)
			if err != nil {
				return withHint(err, "check that each share is of this recipient and entered once")
			}
			defer p.Destroy()
			if err := sameRecipient(recipientFile, p); err != nil {
				return err
			}
			m, n := parts[0].Threshold()
			v := struct {
				OK          bool   `json:"ok"`
				Fingerprint string `json:"fingerprint"`
				Threshold   int    `json:"threshold"`
				Shares      int    `json:"shares"`
				Entered     int    `json:"entered"`
			}{true, p.Fingerprint(), m, n, len(parts)}
			return a.emit(v, func(t *table) {
				t.line("the %d shares join to the recipient with fingerprint %s (any %d of %d)", v.Entered, v.Fingerprint, m, n)
			})
		},
	}
	cmd.Flags().StringArrayVar(&files, "share-file", nil, "`file` with one share, mode 0600; repeat it (default: asks at the terminal)")
	cmd.Flags().StringVar(&recipientFile, "recipient-file", "", "also compare with this recipient.txt `file`")
	return cmd
}

// sameRecipient compares joined shares with a recipient's file, if given.
func sameRecipient(file string, p *recovery.Private) error {
	if file == "" {
		return nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("%w: %w", dek.ErrInvalid, err)
	}
	r, err := recovery.ParseRecipient(string(bytes.TrimSpace(b)))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if r.Fingerprint() != p.Fingerprint() {
		return fmt.Errorf("%w: the shares join to the recipient %s, not to %s of %s", dek.ErrAuth, p.Fingerprint(), r.Fingerprint(), file)
	}
	return nil
}
