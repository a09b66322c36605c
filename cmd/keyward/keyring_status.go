package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/plugins/mariadb/register"
)

// progressPause is the pause between two looks at a server with --wait. Each
// look also makes an idle server notice a new version.
const progressPause = time.Second

// A ringInstanceView is what one instance was heard to use of a keyring.
type ringInstanceView struct {
	Instance string      `json:"instance"`
	State    string      `json:"state"`
	Newest   dek.Version `json:"newest_used"` // keyring version, 0: none reported
	Oldest   dek.Version `json:"oldest_used"`
	LastUsed time.Time   `json:"last_used,omitzero"`
}

// A reencryptionView is how far one server is, by its own word.
type reencryptionView struct {
	ServerKey uint32   `json:"server_key"`
	Target    uint32   `json:"target"` // server version of the current keyring version
	Spaces    int      `json:"spaces"`
	Done      int      `json:"done"`
	Oldest    uint32   `json:"oldest"`
	Plain     int      `json:"unencrypted_spaces"`
	Behind    []string `json:"behind"`
}

func (v reencryptionView) complete() bool { return v.Done == v.Spaces }

type ringStatusView struct {
	Vault         string             `json:"vault"`
	Name          string             `json:"name"`
	Current       dek.Version        `json:"current"`
	ServerVersion uint32             `json:"server_version"`
	Instances     []ringInstanceView `json:"instances"`
	Reencryption  *reencryptionView  `json:"reencryption,omitempty"`
}

// loginFlags adds the ways to reach a MariaDB server.
func loginFlags(cmd *cobra.Command, l *register.Login, dsnFlag string) {
	cmd.Flags().StringVar(&l.Socket, "server-socket", "", "MariaDB's Unix `socket`; you are authenticated by your user there")
	cmd.Flags().StringVar(&l.User, "server-login", "root", "MariaDB `user` for --server-socket")
	cmd.Flags().StringVar(&l.DSNFile, dsnFlag, "", "`file` of mode 0600 with a DSN: user:password@unix(/path)/")
	cmd.MarkFlagsMutuallyExclusive("server-socket", dsnFlag)
}

func (a *app) keyringStatusCmd() *cobra.Command {
	var login register.Login
	var wait bool
	cmd := &cobra.Command{
		Use:   "status VAULT/KEYRING",
		Short: "Show which versions databases use and how far they have re-encrypted",
		Long: `Shows, for each database that uses the keyring, the versions it asked for. With a
server's socket or DSN it also reads that server's own account of every
tablespace; --wait stays until each has reached the current version, for --timeout
at most.

That every tablespace has reached a version does not mean that older ones may go:
redo log, binlogs and backups may still need them.`,
		Example:           "  keyward keyring status shop/system\n  keyward keyring status shop/system --server-socket /run/mysqld/mysqld.sock --wait",
		Args:              args(1, 2),
		ValidArgsFunction: a.complete(a.keyringNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			vault, name, err := splitName("keyring", args)
			if err != nil {
				return err
			}
			asked := login.Socket != "" || login.DSNFile != ""
			if wait && !asked {
				return wrongUse("--wait needs --server-socket or --server-dsn-file")
			}
			v, key, err := a.ringStatus(cmd.Context(), vault, name)
			if err != nil {
				return err
			}
			if asked {
				if v.Reencryption, err = a.reencryption(cmd.Context(), login, key, v, wait); err != nil {
					return err
				}
			}
			return a.emit(v, v.print)
		},
	}
	loginFlags(cmd, &login, "server-dsn-file")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until every tablespace has reached the current version")
	return cmd
}

// ringStatus asks the service; it also returns the keyring's server key id.
func (a *app) ringStatus(ctx context.Context, vault, name string) (ringStatusView, uint32, error) {
	c, err := a.client(ctx)
	if err != nil {
		return ringStatusView{}, 0, err
	}
	k, err := c.admin.Keyring(ctx, vault, name)
	if err != nil {
		return ringStatusView{}, 0, err
	}
	all, err := c.admin.Instances(ctx)
	if err != nil {
		return ringStatusView{}, 0, err
	}
	v := ringStatusView{Vault: vault, Name: name, Current: k.Current, ServerVersion: serverVersion(k, k.Current), Instances: []ringInstanceView{}}
	for _, i := range all {
		if i.Vault != vault || !slices.Contains(i.Keyrings, name) {
			continue
		}
		r := ringInstanceView{Instance: i.Name, State: instanceState(i)}
		for _, u := range i.Usage {
			if u.Keyring != name && u.Keyring != vault+"/"+name {
				continue
			}
			r.Newest = max(r.Newest, u.Version)
			if r.Oldest == 0 || u.Version < r.Oldest {
				r.Oldest = u.Version
			}
			if u.Last.After(r.LastUsed) {
				r.LastUsed = u.Last
			}
		}
		v.Instances = append(v.Instances, r)
	}
	return v, k.ServerKey, nil
}

// reencryption reads a server's account, and with wait follows it to its end.
func (a *app) reencryption(ctx context.Context, l register.Login, key uint32, v ringStatusView, wait bool) (*reencryptionView, error) {
	if key == 0 {
		return nil, wrongUse("keyring %s/%s has no server key id: no MariaDB server knows it", v.Vault, v.Name)
	}
	s, err := register.Dial(ctx, l)
	if err != nil {
		return nil, hintServer(err)
	}
	defer s.Close()
	if wait && a.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	m := a.meter(fmt.Sprintf("re-encrypt to version %d", v.ServerVersion))
	defer m.end()
	tick := time.NewTicker(progressPause)
	defer tick.Stop()
	for {
		spaces, err := s.Spaces(ctx)
		if err != nil {
			return nil, err
		}
		p := register.Measure(spaces, key, v.ServerVersion)
		r := &reencryptionView{ServerKey: key, Target: v.ServerVersion, Spaces: p.Spaces, Done: p.Done,
			Oldest: p.Oldest, Plain: p.Plain, Behind: append([]string{}, p.Behind...)}
		if !wait || r.complete() {
			return r, nil
		}
		m.at(connector.Progress{Done: p.Done, Total: p.Spaces})
		select {
		case <-ctx.Done():
			return nil, withHint(fmt.Errorf("%d of %d tablespaces have reached version %d: %w", p.Done, p.Spaces, r.Target, ctx.Err()), "the server goes on by itself; look again with the same command")
		case <-tick.C:
		}
	}
}

func (v ringStatusView) print(t *table) {
	t.line("keyring %s/%s, current version %d (servers see it as %s)", v.Vault, v.Name, v.Current, numberOrNone(v.ServerVersion))
	if len(v.Instances) == 0 {
		t.line("no database uses it")
	} else {
		t.row("INSTANCE", "STATE", "NEWEST USED", "OLDEST USED", "LAST USED")
		for _, i := range v.Instances {
			t.row(i.Instance, i.State, numberOrNone(uint32(i.Newest)), numberOrNone(uint32(i.Oldest)), when(i.LastUsed))
		}
	}
	r := v.Reencryption
	if r == nil {
		return
	}
	t.line("server key %d: %d of %d tablespaces have reached version %d", r.ServerKey, r.Done, r.Spaces, r.Target)
	if len(r.Behind) > 0 {
		t.line("behind, the oldest at version %d: %s", r.Oldest, listSome(r.Behind, 5))
	}
	if r.Plain > 0 {
		t.line("%d tablespaces are not encrypted", r.Plain)
	}
}

// listSome names the first of many.
func listSome(names []string, most int) string {
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
