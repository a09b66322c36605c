package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// An app is one run of the program: its streams, the global flags and the
// connection that commands share.
type app struct {
	in       io.Reader
	out, err io.Writer

	identity  string        // --identity
	json      bool          // --json
	timeout   time.Duration // --timeout, of one call; 0: the connector's own
	endpoints []string      // --endpoint; empty: those of the identity

	conn conn
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "keyward",
		Short: "Manage the keys that encrypt databases",
		Long: `keyward manages a Keyward key service: vaults, master keys in the HSM, keyrings
of data keys, the people and databases that may use them, and the audit log.

It acts as the identity in --identity, which ` + "`keyward enrol`" + ` makes once from a
token file.`,
		Example: `  keyward enrol --token-file olga.token
  keyward plugin prepare mariadb shop-db --vault shop -o shop-db.token
  keyward keyring roll shop/system
  keyward status`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,
	}
	group(root)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		return asUsage(cmd.ValidateFlagGroups()) // cobra's own check is not told from a failure
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return asUsage(err) })
	root.CompletionOptions.HiddenDefaultCmd = true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetVersionTemplate("keyward {{.Version}}\n")
	f := root.PersistentFlags()
	f.StringVar(&a.identity, "identity", defaultIdentity(), "`directory` of the identity to act as ($KEYWARD_HOME)")
	f.BoolVar(&a.json, "json", false, "print JSON with stable field names instead of tables")
	f.DurationVar(&a.timeout, "timeout", 0, "give up on one call after this `duration`; 0: 10s, 1m where keys are made")
	f.StringSliceVar(&a.endpoints, "endpoint", nil, "`host:port` of the key service instead of the identity's; repeat it")
	_ = root.MarkPersistentFlagDirname("identity") // the flag is defined above
	root.AddGroup(
		&cobra.Group{ID: "use", Title: "Everyday:"},
		&cobra.Group{ID: "manage", Title: "Keys and people:"},
		&cobra.Group{ID: "watch", Title: "Watch and recover:"},
	)
	add := func(id string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			c.GroupID = id
			root.AddCommand(c)
		}
	}
	add("use", a.enrolCmd(), a.whoamiCmd(), a.statusCmd(), a.pluginCmd())
	add("manage", a.vaultCmd(), a.keyCmd(), a.keyringCmd(), a.roleCmd(), a.tokenCmd())
	add("watch", a.auditCmd(), a.recoveryCmd())
	root.AddCommand(a.versionCmd(), a.completionCmd())
	return root
}

// defaultIdentity is $KEYWARD_HOME or ~/.config/keyward.
func defaultIdentity() string {
	if d := os.Getenv("KEYWARD_HOME"); d != "" {
		return d
	}
	d, err := os.UserConfigDir()
	if err != nil {
		return ".keyward"
	}
	return filepath.Join(d, "keyward")
}

// group makes cmd a command that only holds others: without one of them, or
// with one that is not there, it is wrong use.
func group(cmd *cobra.Command) {
	cmd.Args = cobra.ArbitraryArgs
	cmd.SuggestionsMinimumDistance = 2
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var names []string
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() {
				names = append(names, c.Name())
			}
		}
		if len(args) == 0 {
			return wrongUse("%s: say what to do: %s", cmd.CommandPath(), strings.Join(names, ", "))
		}
		text := fmt.Sprintf("unknown command %q", cmd.CommandPath()+" "+args[0])
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			return wrongUse("%s, did you mean %s?", text, strings.Join(s, " or "))
		}
		return wrongUse("%s: there are %s", text, strings.Join(names, ", "))
	}
}

// args checks the number of arguments as wrong use and says which were meant.
func args(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < least || len(args) > most {
			return wrongUse("%d arguments given, want: %s", len(args), cmd.UseLine())
		}
		return nil
	}
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the program's version",
		Example: "  keyward version --json",
		Args:    args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
			}{version}
			return a.emit(v, func(t *table) { t.line("keyward %s", version) })
		},
	}
}

func (a *app) completionCmd() *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:       "completion bash|zsh|fish|powershell",
		Short:     "Print a completion script for a shell",
		Example:   "  keyward completion bash > /etc/bash_completion.d/keyward\n  source <(keyward completion zsh)",
		Args:      args(1, 1),
		ValidArgs: shells,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return cmd.Root().GenBashCompletionV2(a.out, true)
			case "zsh":
				return cmd.Root().GenZshCompletion(a.out)
			case "fish":
				return cmd.Root().GenFishCompletion(a.out, true)
			case "powershell":
				return cmd.Root().GenPowerShellCompletionWithDesc(a.out)
			}
			return wrongUse("shell %q: want one of %s", args[0], strings.Join(shells, ", "))
		},
	}
}
