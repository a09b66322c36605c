package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/access"
)

// maxLifetime is the longest life of an enrolment token, as the service has it.
const maxLifetime = 30 * 24 * time.Hour

func (a *app) tokenCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Let a person or service enrol; end an identity",
		Long: `A token file lets one principal enrol once. Hand it over on a way you trust: until
it is redeemed, who has it can become that principal.`,
		Example: "  keyward token create person/olga -o olga.token\n  keyward token revoke person/olga",
	}
	group(cmd)
	cmd.AddCommand(a.tokenCreateCmd(), a.tokenRevokeCmd())
	return cmd
}

func (a *app) tokenCreateCmd() *cobra.Command {
	var out string
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:     "create PRINCIPAL -o FILE",
		Short:   "Make a one-time enrolment token for a person or host",
		Long:    "Writes a token file of mode 0600. It gives no right: grant roles with `keyward role grant`.",
		Example: "  keyward token create person/olga -o olga.token\n  keyward token create person/ci --lifetime 10m -o ci.token",
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := access.CheckPrincipal(args[0]); err != nil {
				return asUsage(err)
			}
			if err := checkTokenFlags(out, lifetime); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			once, err := c.admin.CreateToken(cmd.Context(), args[0], lifetime)
			if err != nil {
				return err
			}
			tok := c.admin.TokenFile(once, connector.Instance{})
			if err := tok.Save(out); err != nil {
				return err
			}
			v := tokenFileView{Principal: tok.Principal, Expires: tok.Expires.UTC(), File: out}
			return a.emit(v, func(t *table) {
				t.line("token for %s in %s, works once, until %s", v.Principal, out, when(v.Expires))
				t.line("they run: keyward enrol --token-file %s", out)
			})
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "`file` to write, made with mode 0600")
	cmd.Flags().DurationVar(&lifetime, "lifetime", time.Hour, "how long the token works; at most 720h")
	return cmd
}

// checkTokenFlags refuses before a token is made what could not be stored.
func checkTokenFlags(out string, lifetime time.Duration) error {
	if out == "" {
		return wrongUse("-o FILE is needed: a token is written to a file only")
	}
	if lifetime < time.Minute || lifetime > maxLifetime {
		return wrongUse("--lifetime %s: want 1m to %s", lifetime, maxLifetime)
	}
	if _, err := os.Lstat(out); err == nil {
		return withHint(fmt.Errorf("%w: %s", dek.ErrExists, out), "choose another file or remove it")
	}
	return nil
}

func (a *app) tokenRevokeCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "revoke PRINCIPAL",
		Short:   "End every certificate of a principal at once",
		Long:    "No call of the principal is obeyed from now on. Its grants stay until they are revoked.",
		Example: "  keyward token revoke person/olga",
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := access.CheckPrincipal(args[0]); err != nil {
				return asUsage(err)
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if err := c.admin.RevokeIdentity(cmd.Context(), args[0]); err != nil {
				return err
			}
			v := struct {
				Principal string `json:"principal"`
				Revoked   bool   `json:"revoked"`
			}{args[0], true}
			return a.emit(v, func(t *table) { t.line("%s is revoked", args[0]) })
		},
	}
}
