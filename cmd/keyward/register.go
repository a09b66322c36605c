package main

import (
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/plugins/mariadb/register"
)

func (a *app) registerMariaDBCmd() *cobra.Command {
	var cfg register.Config
	var start string
	cmd := &cobra.Command{
		Use:   "mariadb --token-file FILE",
		Short: "Put this host's running MariaDB server under Keyward",
		Long: `Run it on the database host, as root, while the server runs:

  1. enrols the host with the token file
  2. writes the agent's configuration and starts the agent
  3. loads the plugin into the running server
  4. proves it: makes an encrypted table, has the server write it out, and looks
     into its file for the row that was put in (and into the file of an
     unencrypted table beside it, to show that the search works)
  5. only then writes the configuration that encrypts everything, and switches
     on in the running server what needs no restart

It can be run again at any time and then does what is missing. A registration
that fails leaves a server that runs and restarts as before.`,
		Example: `  keyward plugin register mariadb --token-file shop.token
  keyward plugin register mariadb --token-file shop.token --server-dsn-file /root/shop.dsn --start-agent systemd`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cfg.TokenFile == "" {
				return wrongUse("--token-file is needed; `keyward plugin prepare mariadb` makes it")
			}
			if cfg.Login.Socket == "" && cfg.Login.DSNFile == "" {
				cfg.Login.Socket = defaultServerSocket
			}
			var err error
			if cfg.Start, err = register.ParseStartMode(start); err != nil {
				return asUsage(err)
			}
			if err := absolute(&cfg.ConfigDir, &cfg.AgentConfig, &cfg.AgentState, &cfg.HostSecretFile, &cfg.AgentSocket); err != nil {
				return err
			}
			if cfg.AgentProgram != "" {
				if err := absolute(&cfg.AgentProgram); err != nil {
					return err
				}
			}
			return a.register(cmd, cfg)
		},
	}
	registerFlags(cmd, &cfg, &start)
	return cmd
}

func registerFlags(cmd *cobra.Command, cfg *register.Config, start *string) {
	f := cmd.Flags()
	f.StringVar(&cfg.TokenFile, "token-file", "", "token `file` from the officer (mode 0600)")
	f.BoolVar(&cfg.Replace, "replace", false, "enrol this host anew, over the identity that is there")
	loginFlags(cmd, &cfg.Login, "dsn-file")
	f.StringVar(&cfg.ServerUser, "server-user", "mysql", "`account` mariadbd runs as, the only one that gets keys")
	f.StringVar(&cfg.ConfigDir, "server-config-dir", "/etc/mysql/mariadb.conf.d", "`directory` whose *.cnf the server reads")
	f.StringVar(&cfg.PluginFile, "plugin-file", register.DefaultPluginFile, "plugin's `file` name in the server's plugin directory")
	f.StringVar(&cfg.AgentConfig, "agent-config", connector.DefaultAgentConfig, "agent's configuration `file`")
	f.StringVar(&cfg.AgentState, "agent-state", connector.DefaultAgentState, "agent's state `directory`")
	f.StringVar(&cfg.HostSecretFile, "host-secret-file", connector.DefaultHostSecretFile, "`file` with the secret that seals the agent's identity; made if absent")
	f.StringVar(&cfg.AgentSocket, "socket", connector.DefaultAgentSocket, "agent's Unix `socket`")
	f.StringVar(&cfg.AgentProgram, "agent-program", "", "agent's `program` (default: keyward-agent beside this one, or in PATH)")
	f.StringVar(start, "start-agent", string(register.StartAuto), "`how` to start the agent: auto, systemd, spawn or none")
	for _, name := range []string{"token-file", "dsn-file"} {
		_ = cmd.MarkFlagFilename(name) // the flags are defined above
	}
	_ = cmd.RegisterFlagCompletionFunc("start-agent", cobra.FixedCompletions( // as above
		[]string{"auto", "systemd", "spawn", "none"}, cobra.ShellCompDirectiveNoFileComp))
}

// defaultServerSocket is where Debian's server listens.
const defaultServerSocket = "/run/mysqld/mysqld.sock"

// absolute makes paths independent of the working directory: they go into
// files that others read.
func absolute(paths ...*string) error {
	for _, p := range paths {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	return nil
}

func (a *app) register(cmd *cobra.Command, cfg register.Config) error {
	if !a.json {
		n := 0
		cfg.Report = func(s register.Step) {
			n++
			printStep(&table{w: a.plain()}, n, s)
		}
	}
	r, err := register.Run(cmd.Context(), cfg)
	if err != nil {
		err = hintServer(err)
		if len(r.Steps) > 0 {
			return withHint(err, "%d of %d steps are done; mend this and run the same command again, it goes on from there", len(r.Steps), register.Steps)
		}
		return err
	}
	return a.emit(r, func(t *table) {
		t.line("instance %s is registered as %s", r.Instance, r.Principal)
		t.row("PART", "ENCRYPTED", "NOTE")
		restart := false
		for _, p := range r.Parts {
			now := "yes"
			if !p.Now {
				now, restart = "not yet", true
			}
			t.row(p.Name, now, p.How)
		}
		if restart {
			t.line("restart the server when it suits you (systemctl restart mariadb): it then encrypts the rest;")
			t.line("redo log and existing pages are rewritten by the server itself.")
		}
	})
}

// hintServer replaces the hints that speak of the key service where the
// database server is meant.
func hintServer(err error) error {
	var call *connector.CallError
	switch {
	case errors.As(err, &call):
		return err
	case errors.Is(err, dek.ErrUnavailable):
		return withHint(err, "check that the database server and the agent run, and that the paths of their sockets are right")
	case errors.Is(err, dek.ErrDenied):
		return withHint(err, "run it as root, name the database user with --server-login, or give a DSN file")
	}
	return err
}

func printStep(t *table, n int, s register.Step) {
	state := "there"
	if s.Made {
		state = "done"
	}
	if s.Detail != "" {
		s.Detail = "\n           " + s.Detail
	}
	t.line("%d/%d  %-5s %s%s", n, register.Steps, state, s.What, s.Detail)
}
