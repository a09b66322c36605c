package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
)

func (a *app) pluginCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plugin",
		Short: "Put databases under Keyward",
		Long: `An officer prepares a database (vault, keys, grants) and hands over a token file;
the DBA registers the database with it. In strict mode they are two people.`,
		Example: "  keyward plugin prepare mariadb shop-db --vault shop -o shop-db.token\n  keyward plugin register mariadb --token-file shop-db.token --server-socket /run/mysqld/mysqld.sock\n  keyward plugin list",
	}
	group(cmd)
	prepare := &cobra.Command{Use: "prepare", Short: "Prepare a database: vault, keys, grants and token file",
		Example: "  keyward plugin prepare mariadb shop-db --vault shop -o shop-db.token"}
	group(prepare)
	prepare.AddCommand(a.prepareMariaDBCmd())
	reg := &cobra.Command{Use: "register", Short: "Register this host's database with a token file",
		Example: "  keyward plugin register mariadb --token-file shop-db.token --server-socket /run/mysqld/mysqld.sock"}
	group(reg)
	reg.AddCommand(a.registerMariaDBCmd())
	cmd.AddCommand(prepare, reg, a.pluginListCmd(), a.pluginRevokeCmd())
	return cmd
}

func (a *app) pluginListCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List the databases and whether they are connected",
		Example: "  keyward plugin list\n  keyward plugin list --json | jq '.[] | select(.connected | not)'",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.admin.Instances(cmd.Context())
			if err != nil {
				return err
			}
			return a.emit(all, func(t *table) { printInstances(t, all) })
		},
	}
}

func printInstances(t *table, all []connector.Instance) {
	t.row("INSTANCE", "KIND", "STATE", "VAULT", "KEYRINGS", "LAST SEEN")
	for _, i := range all {
		t.row(i.Name, i.Kind, instanceState(i), i.Vault, strings.Join(i.Keyrings, ","), when(i.LastSeen))
	}
}

func (a *app) pluginRevokeCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke INSTANCE",
		Short: "Take a database out of service",
		Long: `Ends the host's identity and its grants: its agent empties its cache and no
restart of the database succeeds. No key is destroyed; prepare the same name again
to bring it back.`,
		Example:           "  keyward plugin revoke shop-db",
		Args:              args(1, 1),
		ValidArgsFunction: a.complete(a.instanceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkName("instance", args[0]); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if err := c.admin.RevokeInstance(cmd.Context(), args[0]); err != nil {
				return err
			}
			v := struct {
				Instance string `json:"instance"`
				Revoked  bool   `json:"revoked"`
			}{args[0], true}
			return a.emit(v, func(t *table) { t.line("instance %s is revoked", args[0]) })
		},
	}
}
