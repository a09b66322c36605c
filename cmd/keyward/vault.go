package main

import (
	"github.com/spf13/cobra"
)

func (a *app) vaultCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "vault",
		Short:   "Create and list vaults",
		Long:    "A vault is a named collection of keys and keyrings with its own access rules.",
		Example: "  keyward vault create shop\n  keyward vault list --json",
	}
	group(cmd)
	cmd.AddCommand(&cobra.Command{
		Use:     "create VAULT",
		Short:   "Create a vault",
		Example: "  keyward vault create shop",
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkName("vault", args[0]); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			v, err := c.admin.CreateVault(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.emit(v, func(t *table) { t.line("vault %s created", v.Name) })
		},
	}, &cobra.Command{
		Use:     "list",
		Short:   "List the vaults you may see",
		Example: "  keyward vault list\n  keyward vault list --json | jq -r '.[].name'",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.admin.Vaults(cmd.Context())
			if err != nil {
				return err
			}
			return a.emit(all, func(t *table) {
				t.row("VAULT", "CREATED", "SEAL VERSION")
				for _, v := range all {
					t.row(v.Name, when(v.Created), v.SealVersion)
				}
			})
		},
	})
	return cmd
}
