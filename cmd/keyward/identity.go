package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func (a *app) enrolCmd() *cobra.Command {
	var file string
	var replace bool
	cmd := &cobra.Command{
		Use:     "enrol --token-file FILE",
		Aliases: []string{"enroll"},
		Short:   "Become the person or service that a token file names",
		Long: `Redeems a one-time token: makes a private key here, has the key service certify
it, and stores both in the identity directory. The key never leaves this machine.
The first connection is safe because the token file pins the service's root.`,
		Example: "  keyward enrol --token-file olga.token\n  keyward --identity /etc/keyward/ci enrol --token-file ci.token",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "" {
				return wrongUse("--token-file is needed")
			}
			tok, err := connector.ReadTokenFile(file)
			if err != nil {
				return withHint(err, "an administrator makes a token file with `keyward token create`")
			}
			if tok.Instance != "" {
				return withHint(fmt.Errorf("%w: the token file is for the database host %s", dek.ErrInvalid, tok.Principal),
					"on the database host run: keyward plugin register %s --token-file %s", tok.Kind, file)
			}
			id, err := connector.Enroll(cmd.Context(), tok, connector.EnrollOptions{Dir: a.identity, Replace: replace})
			if errors.Is(err, dek.ErrExists) {
				return withHint(err, "add --replace to become %s instead, or choose another --identity", tok.Principal)
			}
			if errors.Is(err, dek.ErrDenied) {
				return withHint(err, "a token works once and not for ever: ask for a new one")
			}
			if err != nil {
				return err
			}
			defer id.Close()
			v := a.viewIdentity(id)
			return a.emit(v, func(t *table) {
				t.line("enrolled as %s, certificate until %s, in %s", v.Principal, when(v.Expires), v.Directory)
			})
		},
	}
	cmd.Flags().StringVar(&file, "token-file", "", "token `file` from an administrator (mode 0600)")
	cmd.Flags().BoolVar(&replace, "replace", false, "replace the identity that is there")
	_ = cmd.MarkFlagFilename("token-file") // the flag is defined above
	return cmd
}

func (a *app) viewIdentity(id *connector.Identity) identityView {
	_, until := id.Validity()
	return identityView{Principal: id.Principal(), Directory: a.identity, Endpoints: id.Endpoints(), Expires: until.UTC()}
}

func (a *app) whoamiCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "whoami",
		Short: "Show the identity in use and, if you may see them, its roles",
		Long: `Shows who the identity directory makes you. The roles are asked of the service
and left out if you may not read grants.`,
		Example: "  keyward whoami\n  keyward whoami --json | jq -r .principal",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			v := a.viewIdentity(c.identity)
			grants, err := c.admin.Grants(cmd.Context(), v.Principal)
			if err != nil && !errors.Is(err, dek.ErrDenied) && !errors.Is(err, dek.ErrUnavailable) {
				return err
			}
			v.Grants = grants
			if errors.Is(err, dek.ErrUnavailable) {
				a.note("keyward: note: the key service does not answer; roles are not shown")
			}
			return a.emit(v, func(t *table) {
				t.row("principal", v.Principal)
				t.row("directory", v.Directory)
				for _, e := range v.Endpoints {
					t.row("endpoint", e)
				}
				t.row("certificate until", when(v.Expires))
				for _, g := range v.Grants {
					t.row("role", g.Role+" at "+g.Scope)
				}
			})
		},
	}
}

func (a *app) statusCmd() *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the state of the key service and what must be mended",
		Long: `Shows the token, backup and recovery, the databases, and every problem with its
remedy. With --check the exit status is 1 if a problem is red, for monitors.`,
		Example: "  keyward status\n  keyward status --check >/dev/null || page-someone\n  keyward status --json | jq .problems",
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			s, err := c.admin.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.emit(s, func(t *table) { printStatus(t, s) }); err != nil {
				return err
			}
			if check && slices.ContainsFunc(s.Problems, func(p connector.Problem) bool { return p.Severity == "red" }) {
				return &exitError{1}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&check, "check", false, "exit with status 1 if a problem is red")
	return cmd
}

// printStatus is the status for people.
func printStatus(t *table, s connector.Status) {
	health := "healthy"
	if !s.TokenHealthy {
		health = "NOT HEALTHY"
	}
	t.row("token", s.Token+", "+health)
	t.row("wraps with", "RSA-OAEP "+s.OAEPHash+" inside AES-256-GCM")
	t.row("recovery", s.Recovery)
	t.row("backup", s.BackupTarget+", last "+when(s.LastBackup))
	t.row("audit records", s.AuditSize)
	t.row("state changes", s.Changes)
	for _, q := range s.Quarantined {
		t.row("unknown object", q)
	}
	if len(s.Instances) > 0 {
		t.line("")
		printInstances(t, s.Instances)
	}
	if len(s.Problems) == 0 {
		t.line("\nno problems")
		return
	}
	t.line("")
	for _, p := range s.Problems {
		t.line("%s: %s\n  remedy: %s", p.Severity, p.Text, p.Remedy)
	}
}
