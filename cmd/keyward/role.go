package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
)

func (a *app) roleCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "role",
		Short: "Grant and revoke roles; show what they allow",
		Long: `A grant gives a principal (person/NAME or host/NAME) a role at a scope: /,
/vaults/V, /vaults/V/keys/K or /vaults/V/keyrings/R. What no grant allows is denied.
In strict mode one principal can't hold roles that conflict.`,
		Example: "  keyward role grant crypto-officer person/olga --scope /\n  keyward role list\n  keyward role show",
	}
	group(cmd)
	cmd.AddCommand(a.grantCmd(true), a.grantCmd(false), a.roleListCmd(), a.roleShowCmd())
	return cmd
}

// grantCmd gives a role or takes it back.
func (a *app) grantCmd(give bool) *cobra.Command {
	verb, short, done := "revoke", "Take a role back", "no longer has"
	if give {
		verb, short, done = "grant", "Give a principal a role at a scope", "has"
	}
	var scope string
	cmd := &cobra.Command{
		Use:               verb + " ROLE PRINCIPAL --scope SCOPE",
		Short:             short,
		Long:              short + ". The roles are listed by `keyward role show`; a blank in a name is written '-'.",
		Example:           "  keyward role " + verb + " crypto-officer person/olga --scope /\n  keyward role " + verb + " auditor person/ada --scope /vaults/shop",
		Args:              args(2, 2),
		ValidArgsFunction: completeGrant,
		RunE: func(cmd *cobra.Command, args []string) error {
			role, err := access.ParseRole(args[0])
			if err != nil {
				return asUsage(err)
			}
			if err := access.CheckPrincipal(args[1]); err != nil {
				return asUsage(err)
			}
			if scope == "" {
				return wrongUse("--scope is needed: / or /vaults/V or /vaults/V/keys/K or /vaults/V/keyrings/R")
			}
			if err := access.CheckScope(scope); err != nil {
				return asUsage(err)
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			g := connector.Grant{Principal: args[1], Role: role.String(), Scope: scope}
			if give {
				err = c.admin.AddGrant(cmd.Context(), g)
			} else {
				err = c.admin.RemoveGrant(cmd.Context(), g)
			}
			if err != nil {
				return err
			}
			return a.emit(g, func(t *table) { t.line("%s %s the role %s at %s", g.Principal, done, g.Role, g.Scope) })
		},
	}
	cmd.Flags().StringVar(&scope, "scope", "", "`where`: / or /vaults/V or /vaults/V/keys/K or /vaults/V/keyrings/R")
	return cmd
}

func completeGrant(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	switch len(args) {
	case 0:
		var names []string
		for _, r := range access.Roles() {
			names = append(names, spell(r)+"\t"+r.Text())
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	case 1:
		return []string{"person/", "host/"}, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// spell is a role's name as one word of a command line.
func spell(r access.Role) string { return strings.ReplaceAll(r.String(), " ", "-") }

func (a *app) roleListCmd() *cobra.Command {
	var principal string
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List who has which role",
		Example: "  keyward role list\n  keyward role list --principal person/olga",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if principal != "" {
				if err := access.CheckPrincipal(principal); err != nil {
					return asUsage(err)
				}
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			all, err := c.admin.Grants(cmd.Context(), principal)
			if err != nil {
				return err
			}
			return a.emit(all, func(t *table) {
				t.row("PRINCIPAL", "ROLE", "SCOPE", "GRANTED BY", "AT")
				for _, g := range all {
					t.row(g.Principal, g.Role, g.Scope, g.By, when(g.At))
				}
			})
		},
	}
	cmd.Flags().StringVar(&principal, "principal", "", "only this `principal`, such as person/olga")
	return cmd
}

type roleView struct {
	Role       string   `json:"role"`
	Text       string   `json:"text"`
	Operations []string `json:"operations"`
}

func (a *app) roleShowCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "show [ROLE]",
		Short: "Show what each role allows (works offline)",
		Long: `Prints the table that the key service decides by: this program and the service
are built from the same one.`,
		Example: "  keyward role show\n  keyward role show crypto-officer --json",
		Args:    args(0, 1),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			for _, r := range access.Roles() {
				names = append(names, spell(r))
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			roles := access.Roles()
			if len(args) == 1 {
				r, err := access.ParseRole(args[0])
				if err != nil {
					return asUsage(err)
				}
				roles = []access.Role{r}
			}
			views, err := describeRoles(roles)
			if err != nil {
				return err
			}
			return a.emit(views, func(t *table) {
				t.row("ROLE", "WHAT IT IS FOR", "OPERATIONS")
				for _, v := range views {
					t.row(v.Role, v.Text, strings.Join(v.Operations, " "))
				}
			})
		},
	}
}

// describeRoles asks the rule itself what each role may do, so that nothing
// else than what it obeys is ever shown.
func describeRoles(roles []access.Role) ([]roleView, error) {
	policy, err := access.New()
	if err != nil {
		return nil, err
	}
	who := kms.Caller{Principal: "person/anyone"}
	var views []roleView
	for _, r := range roles {
		v := roleView{Role: r.String(), Text: r.Text(), Operations: []string{}}
		grants := []kms.Grant{{Principal: who.Principal, Role: r.String(), Scope: "/"}}
		for _, op := range access.Operations() {
			if policy.Decide(who, op, "/", grants).Allowed {
				v.Operations = append(v.Operations, string(op))
			}
		}
		views = append(views, v)
	}
	return views, nil
}
