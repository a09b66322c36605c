package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// A conn is the connection to the key service, made by the first command that
// needs it.
type conn struct {
	identity *connector.Identity
	client   *connector.Client
	admin    *connector.Admin
}

// client returns the connection as the identity of --identity, whose
// certificate is renewed when its time has come.
func (a *app) client(ctx context.Context) (*conn, error) {
	if a.conn.admin != nil {
		return &a.conn, nil
	}
	id, err := connector.LoadIdentity(a.identity, "")
	if errors.Is(err, dek.ErrNotFound) {
		return nil, withHint(err, "run `keyward enrol --token-file FILE` first, or name another --identity")
	}
	if err != nil {
		return nil, err
	}
	c, err := connector.NewClient(connector.Config{
		Identity: id, Endpoints: a.endpoints, CallTimeout: a.timeout,
		Logger: slog.New(slog.DiscardHandler), // failures arrive as errors
	})
	if err != nil {
		id.Close()
		return nil, err
	}
	a.conn = conn{identity: id, client: c, admin: connector.NewAdmin(c)}
	return &a.conn, a.conn.renew(ctx)
}

// renew keeps the certificate alive. While it is valid a failure is of no
// concern: the next command tries again.
func (c *conn) renew(ctx context.Context) error {
	_, err := c.client.RenewIfDue(ctx)
	if err == nil {
		return nil
	}
	if _, until := c.identity.Validity(); time.Now().Before(until) {
		return nil
	}
	return withHint(err, "the certificate of %s has ended; if it can't be renewed, ask an administrator for a new token file", c.identity.Principal())
}

// close ends the connection, if there is one.
func (a *app) close() {
	if a.conn.admin == nil {
		return
	}
	_ = a.conn.client.Close() // nothing is pending on it
	a.conn.identity.Close()
}

// ensureVault makes a vault unless it is there.
func (c *conn) ensureVault(ctx context.Context, name string) (made bool, err error) {
	all, err := c.admin.Vaults(ctx)
	if err != nil {
		return false, err
	}
	if slices.ContainsFunc(all, func(v connector.Vault) bool { return v.Name == name }) {
		return false, nil
	}
	_, err = c.admin.CreateVault(ctx, name)
	if errors.Is(err, dek.ErrExists) {
		return false, nil // somebody was faster, or the list does not show it
	}
	return err == nil, err
}

// ensureKey makes a master key unless there is one of that name.
func (c *conn) ensureKey(ctx context.Context, want connector.NewKey) (made bool, err error) {
	all, err := c.admin.Keys(ctx, want.Vault)
	if err != nil {
		return false, err
	}
	if slices.ContainsFunc(all, func(k connector.MasterKey) bool { return k.Name == want.Name && k.Current != 0 }) {
		return false, nil
	}
	_, err = c.admin.CreateKey(ctx, want)
	return err == nil, err
}

// ensureKeyring makes a keyring unless the same one is there. One of that name
// with another master key or server key is somebody else's: dek.ErrExists.
func (c *conn) ensureKeyring(ctx context.Context, want connector.NewKeyring) (made bool, err error) {
	all, err := c.admin.Keyrings(ctx, want.Vault)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(all, func(k connector.Keyring) bool { return k.Name == want.Name })
	if i < 0 {
		_, err = c.admin.CreateKeyring(ctx, want)
		return err == nil, err
	}
	if have := all[i]; have.MasterKey != want.MasterKey || have.ServerKey != want.ServerKey {
		return false, withHint(fmt.Errorf("%w: keyring %s/%s is wrapped to key %s and has server key %d", dek.ErrExists,
			have.Vault, have.Name, have.MasterKey, have.ServerKey), "give the keyring another name with --keyring, or another --vault")
	}
	return false, nil
}

// prepareInstance registers the database and returns its host's token file.
func (c *conn) prepareInstance(ctx context.Context, n connector.NewInstance) (connector.Instance, connector.TokenFile, error) {
	in, tok, err := c.admin.PrepareInstance(ctx, n)
	if err != nil {
		return in, connector.TokenFile{}, err
	}
	return in, c.admin.TokenFile(tok, in), nil
}
