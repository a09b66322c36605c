package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func (a *app) keyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Create, roll, disable and rewrap master keys",
		Long: `A key is an asymmetric master key whose private half never leaves the HSM. Its
newest enabled version wraps new data keys; older ones still unwrap.`,
		Example: "  keyward key create shop/master\n  keyward key roll shop/master\n  keyward key rewrap shop/master",
	}
	group(cmd)
	cmd.AddCommand(a.keyCreateCmd(), a.keyListCmd(), a.keyShowCmd(), a.keyRollCmd(),
		a.enableCmd("key", true), a.enableCmd("key", false), a.keyRewrapCmd())
	return cmd
}

func (a *app) keyCreateCmd() *cobra.Command {
	var bits int
	var request string
	cmd := &cobra.Command{
		Use:     "create VAULT/KEY",
		Short:   "Make a master key in the HSM",
		Example: "  keyward key create shop/master\n  keyward key create shop/master --bits 4096",
		Args:    args(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("key", args)
			if err != nil {
				return err
			}
			if bits != 2048 && bits != 3072 && bits != 4096 {
				return wrongUse("--bits %d: want 2048, 3072 or 4096", bits)
			}
			return a.makeKey(cmd, request, func(ctx context.Context, c *conn, id string) (connector.MasterKey, error) {
				return c.admin.CreateKey(ctx, connector.NewKey{RequestID: id, Vault: vault, Name: name, Bits: bits})
			})
		},
	}
	cmd.Flags().IntVar(&bits, "bits", 3072, "RSA modulus: 2048, 3072 or 4096 `bits`")
	requestFlag(cmd, &request)
	return cmd
}

func (a *app) keyRollCmd() *cobra.Command {
	var request string
	cmd := &cobra.Command{
		Use:   "roll VAULT/KEY",
		Short: "Make a new current version of a master key",
		Long: `Makes a new version in the HSM. New data keys are wrapped to it at once; what is
wrapped already stays readable, and ` + "`keyward key rewrap`" + ` moves it. No database
page is touched.`,
		Example:           "  keyward key roll shop/master && keyward key rewrap shop/master",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("key", args)
			if err != nil {
				return err
			}
			return a.makeKey(cmd, request, func(ctx context.Context, c *conn, id string) (connector.MasterKey, error) {
				return c.admin.RollKey(ctx, id, vault, name)
			})
		},
	}
	requestFlag(cmd, &request)
	return cmd
}

// makeKey creates or rolls and shows the result.
func (a *app) makeKey(cmd *cobra.Command, request string, act func(context.Context, *conn, string) (connector.MasterKey, error)) error {
	c, err := a.client(cmd.Context())
	if err != nil {
		return err
	}
	if request == "" {
		request = newRequestID()
	}
	k, err := act(cmd.Context(), c, request)
	if err != nil {
		return repeatable(cmd, request, err)
	}
	return a.emit(k, func(t *table) {
		t.line("key %s/%s: version %d is current (RSA %d, in the HSM)", k.Vault, k.Name, k.Current, k.Bits)
	})
}

func (a *app) keyListCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "list VAULT",
		Short:             "List the master keys of a vault",
		Example:           "  keyward key list shop",
		Args:              args(1, 1),
		ValidArgsFunction: a.complete(a.vaultNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkName("vault", args[0]); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.admin.Keys(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.emit(all, func(t *table) {
				t.row("KEY", "BITS", "CURRENT", "VERSIONS")
				for _, k := range all {
					t.row(k.Vault+"/"+k.Name, k.Bits, k.Current, len(k.Versions))
				}
			})
		},
	}
}

func (a *app) keyShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "show VAULT/KEY",
		Short:             "Show the versions of a master key",
		Example:           "  keyward key show shop/master",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("key", args)
			if err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			k, err := c.admin.Key(cmd.Context(), vault, name)
			if err != nil {
				return err
			}
			return a.emit(k, func(t *table) {
				t.line("key %s/%s, RSA %d, current version %d", k.Vault, k.Name, k.Bits, k.Current)
				t.row("VERSION", "STATE", "CREATED", "OBJECT IN THE TOKEN", "PUBLIC KEY SHA-256")
				for _, v := range k.Versions {
					t.row(v.Version, v.State, when(v.Created), v.Object, connector.Fingerprint(v.SPKI))
				}
			})
		},
	}
}

func (a *app) keyRewrapCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "rewrap VAULT/KEY",
		Short: "Move wrapped data keys to the current master key version",
		Long: `Moves every data key that is wrapped to an older version of the master key to the
current one. Databases go on undisturbed. It may be stopped at any time; run it
again and it goes on where it stopped.`,
		Example:           "  keyward key rewrap shop/master",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("key", args)
			if err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			m := a.meter("rewrap " + vault + "/" + name)
			p, err := c.admin.RewrapKey(cmd.Context(), vault, name, m.at)
			m.end()
			if errors.Is(err, context.Canceled) {
				return withHint(err, "what was moved stays moved: run the command again to go on")
			}
			if err != nil {
				return err
			}
			v := struct {
				Vault string `json:"vault"`
				Name  string `json:"name"`
				connector.Progress
			}{vault, name, p}
			return a.emit(v, func(t *table) {
				t.line("key %s/%s: all %d wrapped data keys are under its current version", vault, name, p.Total)
			})
		},
	}
}

// enableCmd switches keys or keyrings on or off: what is "key" or "keyring".
func (a *app) enableCmd(what string, enabled bool) *cobra.Command {
	verb, names := "disable", a.keyNames
	if enabled {
		verb = "enable"
	}
	if what == "keyring" {
		names = a.keyringNames
	}
	var version uint32
	cmd := &cobra.Command{
		Use:               verb + " VAULT/" + strings.ToUpper(what),
		Short:             strings.ToUpper(verb[:1]) + verb[1:] + " a " + what + ", or one of its versions",
		Example:           "  keyward " + what + " " + verb + " shop/master\n  keyward " + what + " " + verb + " shop/master --version 1",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(names),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName(what, args)
			if err != nil {
				return err
			}
			if cmd.Flags().Changed("version") && version == 0 {
				return wrongUse("--version 0: versions count from 1; leave the flag out to mean all")
			}
			return a.setEnabled(cmd, what, effectView{Vault: vault, Name: name, Version: dek.Version(version), Enabled: enabled})
		},
	}
	cmd.Long = "Nothing of it is handed out from the moment the command returns; connected agents\nempty their caches within a second, and no database that needs it starts. Servers\nthat run keep what they hold. `enable` undoes it."
	if enabled {
		cmd.Long = "Undoes `disable`: connected agents and databases have the keys back within a\nsecond, without a restart."
	}
	cmd.Flags().Uint32Var(&version, "version", 0, "only this `version` (all when left out)")
	return cmd
}

func (a *app) setEnabled(cmd *cobra.Command, what string, e effectView) error {
	c, err := a.client(cmd.Context())
	if err != nil {
		return err
	}
	set := c.admin.SetKeyEnabled
	if what == "keyring" {
		set = c.admin.SetKeyringEnabled
	}
	e.Effect, err = set(cmd.Context(), connector.Switch{Vault: e.Vault, Name: e.Name, Version: e.Version, Enabled: e.Enabled})
	if err != nil {
		return err
	}
	return a.emit(e, func(t *table) {
		state := "disabled"
		if e.Enabled {
			state = "enabled"
		}
		t.line("%s %s/%s: %s %s", what, e.Vault, e.Name, versionText(e.Version), state)
		if len(e.Notified) > 0 {
			t.line("told at once: %s", strings.Join(e.Notified, ", "))
		}
		if len(e.Absent) > 0 {
			t.line("not connected, will learn of it when they connect: %s", strings.Join(e.Absent, ", "))
		}
	})
}
