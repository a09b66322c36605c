package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func (a *app) auditCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Read, export and verify the record of every act",
		Example: "  keyward audit list --principal person/olga --since 24h\n  keyward audit export -o audit.tar\n" +
			"  keyward audit verify audit.tar",
	}
	group(cmd)
	cmd.AddCommand(a.auditListCmd(false), a.auditListCmd(true), a.auditExportCmd(), a.auditVerifyCmd())
	return cmd
}

// A recordLine is one record as people read it; what is not shown is in the
// exact line, which --json prints.
type recordLine struct {
	Time      time.Time `json:"time"`
	Phase     string    `json:"phase"`
	Operation string    `json:"operation"`
	Principal string    `json:"principal"`
	Object    string    `json:"object"`
	Version   uint32    `json:"version"`
	Result    string    `json:"result"`
	Rule      string    `json:"rule"`
	Note      string    `json:"note"`
}

func (a *app) auditListCmd(follow bool) *cobra.Command {
	var f connector.AuditFilter
	var since, until string
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "Show the newest records",
		Long:    "Shows records, the newest last. --json prints each as its exact line, as it is in the log.",
		Example: "  keyward audit list --limit 20\n  keyward audit list --since 24h --operation keyring.unwrap\n  keyward audit list --principal host/shop-db --json",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			now := time.Now()
			var err error
			if f.After, err = parseWhen("--since", since, now); err != nil {
				return err
			}
			if f.Before, err = parseWhen("--until", until, now); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			err = c.admin.ReadAudit(cmd.Context(), f, a.printRecord)
			if follow && errors.Is(err, context.Canceled) {
				return nil // the person at the terminal had enough
			}
			return err
		},
	}
	if follow {
		f.Follow = true
		cmd.Use, cmd.Short = "follow", "Show records as they are made, until interrupted"
		cmd.Long = "Shows the newest records and then each new one. --json prints exact lines."
		cmd.Example = "  keyward audit follow\n  keyward audit follow --operation key.set-enabled --json"
	}
	fl := cmd.Flags()
	fl.StringVar(&f.Principal, "principal", "", "only acts of this `principal`")
	fl.StringVar(&f.Operation, "operation", "", "only this `operation`, such as key.roll")
	fl.StringVar(&f.Object, "object", "", "only this `scope`, such as /vaults/shop/keyrings/system")
	fl.StringVar(&since, "since", "", "only after this `time`: 2026-01-31T12:00:00Z, 2026-01-31 or 24h ago as 24h")
	fl.StringVar(&until, "until", "", "only before this `time`")
	fl.Uint64Var(&f.FromSequence, "from", 0, "only from this sequence `number` on")
	fl.IntVar(&f.Limit, "limit", 0, "the newest so `many`; 0: 1000")
	return cmd
}

// parseWhen reads a time, a date or an age.
func parseWhen(flag, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateTime, time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, wrongUse("%s %q: want 2026-01-31T12:00:00Z, \"2026-01-31 12:00:00\", 2026-01-31 or an age such as 24h", flag, s)
}

// printRecord prints one record; records stream, so there are no columns to
// align over all of them.
func (a *app) printRecord(rec connector.AuditRecord) error {
	seq, line := rec.Sequence, rec.Line
	if a.json {
		_, err := fmt.Fprintf(a.out, "%s\n", bytes.TrimSpace(line))
		return err
	}
	var r recordLine
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("%w: record %d is not JSON", dek.ErrInvalid, seq)
	}
	object := r.Object
	if r.Version != 0 {
		object += fmt.Sprintf("@%d", r.Version)
	}
	words := []string{orDash(r.Result)}
	if r.Rule != "" {
		words = append(words, "("+r.Rule+")")
	}
	if r.Note != "" {
		words = append(words, r.Note)
	}
	_, err := fmt.Fprintf(a.out, "%6d  %s  %-8s  %-20s  %-22s  %-32s  %s\n", seq, when(r.Time), r.Phase,
		r.Operation, r.Principal, orDash(object), strings.Join(words, " "))
	return err
}

func (a *app) auditExportCmd() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "export -o FILE",
		Short: "Fetch segments and checkpoints as a tar archive",
		Long: `Writes everything that offline verification needs. Keep exports away from the key
service's hosts: what they hold can't be taken back by anyone there.`,
		Example: "  keyward audit export -o audit-2026-01.tar && keyward audit verify audit-2026-01.tar",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return wrongUse("-o FILE is needed")
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			n, err := saveWhole(out, func(w io.Writer) error {
				_, err := c.admin.ExportAudit(cmd.Context(), w)
				return err
			})
			if err != nil {
				return err
			}
			v := struct {
				File  string `json:"file"`
				Bytes int64  `json:"bytes"`
			}{out, n}
			return a.emit(v, func(t *table) { t.line("%d bytes in %s; check them with: keyward audit verify %s", n, out, out) })
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "`file` to write; replaced only when all has arrived")
	return cmd
}

// saveWhole writes a file that is there whole or not at all.
func saveWhole(path string, fill func(io.Writer) error) (int64, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	err = fill(f)
	var n int64
	if err == nil {
		n, err = f.Seek(0, io.SeekCurrent)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, err
	}
	return n, os.Rename(f.Name(), path)
}
