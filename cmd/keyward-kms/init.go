package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// defaultAdministrator is who the first token is for.
const defaultAdministrator = "person/admin"

func newInit(s *streams) *cobra.Command {
	var config, tokenFile, admin string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a new installation in an initialised, empty token",
		Long: `init makes the root, audit and CA keys in the token, the first state and the
server's certificate, and writes the one-time token of the first administrator
to a file that only you can read. It never initialises a token: do that with your
vendor's tool.

It can be run again after an error, with one exception that it tells: if the
installation was made and the token file could not be written, nobody can enrol.
Empty state_dir and audit_dir then, nothing is lost by it.`,
		Example: "  keyward-kms init --config /etc/keyward/kms.json --admin-token-file admin.token",
		Args:    noArgs,
		PreRunE: needFlags("config", "admin-token-file"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := loadConfig(config)
			if err != nil {
				return err
			}
			report, err := initialise(cmd.Context(), c, admin, tokenFile, newLogger(s.err))
			if err != nil {
				return err
			}
			for _, line := range report {
				fmt.Fprintln(s.out, line)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file")
	cmd.Flags().StringVar(&tokenFile, "admin-token-file", "", "where the administrator's one-time token goes (0600)")
	cmd.Flags().StringVar(&admin, "administrator", defaultAdministrator, "first administrator, person/NAME")
	return cmd
}

// initialise makes an installation and returns what to tell.
func initialise(ctx context.Context, c *Config, admin, tokenFile string, log *slog.Logger) (report []string, err error) {
	recipient, err := c.recipient()
	if err != nil {
		return nil, err
	}
	if err := checkFree(tokenFile); err != nil { // while nothing is made yet
		return nil, fmt.Errorf("admin-token-file: %w", err)
	}
	p, err := openParts(ctx, c, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	first, err := kms.Init(ctx, p.kmsConfig(nil), kms.InitRequest{Recipient: recipient, FirstAdministrator: admin})
	if errors.Is(err, dek.ErrPrecondition) {
		return nil, remedy{err, "serve it, or name an empty state_dir; if an init was cut short and nobody could enrol yet, " +
			"empty " + c.StateDir + " and " + c.AuditDir + " and run init again"}
	}
	if err != nil {
		return nil, err
	}
	fingerprint, err := firstCertificates(ctx, p)
	if err == nil {
		err = pinFirst(c, p.token)
	}
	if err == nil {
		err = writeTokenFile(tokenFile, c.endpoints(), fingerprint, first)
	}
	if err != nil {
		return nil, remedy{err, "the administrator's token is lost and nobody can enrol: empty " + c.StateDir + " and " + c.AuditDir +
			" and run init again; nothing is lost by it"}
	}
	report = []string{
		"token:        " + p.token.Describe(),
		"CA:           sha256 " + fingerprint,
		"token file:   " + tokenFile + ", for " + first.Principal + ", until " + first.Expires.UTC().Format(time.RFC3339),
	}
	if recipient == "" {
		report = append(report, "RED: no recovery recipient: a token that dies takes every key along (keyward recovery generate)")
	}
	if c.BackupDir == "" {
		report = append(report, "RED: no backup_dir: a disk that dies takes the wrapped keys along")
	}
	return report, nil
}

// firstCertificates opens the new installation once, which makes the CA's and
// the server's certificates, and returns the CA's fingerprint.
func firstCertificates(ctx context.Context, p *parts) (fingerprint string, err error) {
	s, err := kms.Open(ctx, p.kmsConfig(nil))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	a, err := openAuthority(ctx, p, s)
	if err != nil {
		return "", err
	}
	sum := a.Fingerprint()
	return hex.EncodeToString(sum[:]), nil
}

func writeTokenFile(name string, endpoints []string, fingerprint string, t *kms.EnrolmentToken) error {
	return connector.TokenFile{
		Endpoints: endpoints, CAFingerprint: fingerprint, Principal: t.Principal,
		Expires: t.Expires, Token: connector.NewSecretText(t.Text.Reveal()),
	}.Save(name)
}
