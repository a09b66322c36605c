package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
)

func (a *app) keyringCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keyring",
		Short: "Create, roll and disable keyrings; see how far databases are",
		Long: `A keyring is a named, versioned set of data keys for one purpose, wrapped to one
master key. A roll makes a new version: databases encrypt with it from then on
and re-encrypt older data in the background.`,
		Example: "  keyward keyring create shop/orders --key master --server-key 7\n  keyward keyring roll shop/orders\n  keyward keyring status shop/orders --server-socket /run/mysqld/mysqld.sock --wait",
	}
	group(cmd)
	cmd.AddCommand(a.keyringCreateCmd(), a.keyringListCmd(), a.keyringShowCmd(), a.keyringRollCmd(),
		a.enableCmd("keyring", true), a.enableCmd("keyring", false), a.keyringStatusCmd())
	return cmd
}

func (a *app) keyringCreateCmd() *cobra.Command {
	var master, request string
	var serverKey uint32
	cmd := &cobra.Command{
		Use:     "create VAULT/KEYRING",
		Short:   "Make a keyring with its first data key",
		Example: "  keyward keyring create shop/orders --key master --server-key 7",
		Args:    args(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("keyring", args)
			if err != nil {
				return err
			}
			if err := checkName("--key", master); err != nil {
				return err
			}
			return a.makeKeyring(cmd, request, func(ctx context.Context, c *conn, id string) (connector.Keyring, error) {
				return c.admin.CreateKeyring(ctx, connector.NewKeyring{RequestID: id, Vault: vault, Name: name, MasterKey: master, ServerKey: serverKey})
			})
		},
	}
	cmd.Flags().StringVar(&master, "key", "master", "master `key` of the same vault that wraps the data keys")
	cmd.Flags().Uint32Var(&serverKey, "server-key", 0, "`id` by which a MariaDB server knows it (ENCRYPTION_KEY_ID); 0: none")
	requestFlag(cmd, &request)
	return cmd
}

func (a *app) keyringRollCmd() *cobra.Command {
	var request string
	cmd := &cobra.Command{
		Use:   "roll VAULT/KEYRING",
		Short: "Make a new current version of a keyring",
		Long: `Makes a new data key. Connected databases encrypt with it within a second and
re-encrypt older data in the background: ` + "`keyward keyring status`" + ` shows how far
they are. Older versions stay readable.`,
		Example:           "  keyward keyring roll shop/system",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyringNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("keyring", args)
			if err != nil {
				return err
			}
			return a.makeKeyring(cmd, request, func(ctx context.Context, c *conn, id string) (connector.Keyring, error) {
				return c.admin.RollKeyring(ctx, id, vault, name)
			})
		},
	}
	requestFlag(cmd, &request)
	return cmd
}

// makeKeyring creates or rolls and shows the result.
func (a *app) makeKeyring(cmd *cobra.Command, request string, act func(context.Context, *conn, string) (connector.Keyring, error)) error {
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
		t.line("keyring %s/%s: version %d is current%s, wrapped to key %s",
			k.Vault, k.Name, k.Current, seenAs(k), k.MasterKey)
	})
}

// seenAs tells a server's number of the current version, if servers know it.
func seenAs(k connector.Keyring) string {
	if k.ServerKey == 0 {
		return ""
	}
	return fmt.Sprintf(" (servers see it as %d)", serverVersion(k, k.Current))
}

func numberOrNone(n uint32) string {
	if n == 0 {
		return "none"
	}
	return strconv.FormatUint(uint64(n), 10)
}

func (a *app) keyringListCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "list VAULT",
		Short:             "List the keyrings of a vault",
		Example:           "  keyward keyring list shop",
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
			all, err := c.admin.Keyrings(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.emit(all, func(t *table) {
				t.row("KEYRING", "KEY", "SERVER KEY", "CURRENT", "SEEN AS", "VERSIONS")
				for _, k := range all {
					t.row(k.Vault+"/"+k.Name, k.MasterKey, numberOrNone(k.ServerKey), k.Current,
						numberOrNone(serverVersion(k, k.Current)), len(k.Versions))
				}
			})
		},
	}
}

func (a *app) keyringShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "show VAULT/KEYRING",
		Short:             "Show the versions of a keyring",
		Example:           "  keyward keyring show shop/system",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyringNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("keyring", args)
			if err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			k, err := c.admin.Keyring(cmd.Context(), vault, name)
			if err != nil {
				return err
			}
			return a.emit(k, func(t *table) {
				t.line("keyring %s/%s, wrapped to key %s, server key %s, current version %d",
					k.Vault, k.Name, k.MasterKey, numberOrNone(k.ServerKey), k.Current)
				t.row("VERSION", "SEEN AS", "STATE", "CREATED", "KEY VERSION")
				for _, v := range k.Versions {
					t.row(v.Version, numberOrNone(v.ServerVersion), v.State, when(v.Created), v.Master)
				}
			})
		},
	}
}
