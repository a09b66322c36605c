package main

import (
	"crypto/rand"
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/dek"
)

// splitName reads VAULT/NAME, or VAULT and NAME as two arguments. what names
// the second part for the reader.
func splitName(what string, args []string) (vault, name string, err error) {
	if len(args) == 2 {
		vault, name = args[0], args[1]
	} else {
		var ok bool
		if vault, name, ok = strings.Cut(args[0], "/"); !ok {
			return "", "", wrongUse("%s %q: want VAULT/NAME", what, args[0])
		}
	}
	if err := dek.CheckName("vault", vault); err != nil {
		return "", "", asUsage(err)
	}
	return vault, name, asUsage(dek.CheckName(what, name))
}

// checkName refuses a bad name as wrong use, before anything is asked.
func checkName(what, name string) error { return asUsage(dek.CheckName(what, name)) }

// newRequestID makes the id by which the service recognises a repeated call.
func newRequestID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// requestFlag adds --request-id to a command that makes something once.
func requestFlag(cmd *cobra.Command, id *string) {
	cmd.Flags().StringVar(id, "request-id", "", "make it once however often this is run with the same `id`")
}

// repeatable gives err the way to run the same act again without doing it twice.
func repeatable(cmd *cobra.Command, id string, err error) error {
	if err == nil || hintFor(err) != hintFor(dek.ErrUnavailable) {
		return err
	}
	return withHint(err, "whether it happened is not known; add --request-id %s to run %s again without doing it twice", id, cmd.CommandPath())
}

// complete makes a completion function of a list of names; it is quiet when
// the service can't be asked.
func (a *app) complete(list func(*cobra.Command) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return list(cmd), cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) vaultNames(cmd *cobra.Command) []string {
	c, err := a.client(cmd.Context())
	if err != nil {
		return nil
	}
	vaults, err := c.admin.Vaults(cmd.Context())
	if err != nil {
		return nil
	}
	var names []string
	for _, v := range vaults {
		names = append(names, v.Name)
	}
	return names
}

func (a *app) keyNames(cmd *cobra.Command) []string {
	var names []string
	for _, v := range a.vaultNames(cmd) {
		keys, err := a.conn.admin.Keys(cmd.Context(), v)
		if err != nil {
			return names
		}
		for _, k := range keys {
			names = append(names, v+"/"+k.Name)
		}
	}
	return names
}

func (a *app) keyringNames(cmd *cobra.Command) []string {
	var names []string
	for _, v := range a.vaultNames(cmd) {
		rings, err := a.conn.admin.Keyrings(cmd.Context(), v)
		if err != nil {
			return names
		}
		for _, k := range rings {
			names = append(names, v+"/"+k.Name)
		}
	}
	return names
}

func (a *app) instanceNames(cmd *cobra.Command) []string {
	c, err := a.client(cmd.Context())
	if err != nil {
		return nil
	}
	all, err := c.admin.Instances(cmd.Context())
	if err != nil {
		return nil
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names
}

// versionText is a version for people; 0 is all of them.
func versionText(v dek.Version) string {
	if v == 0 {
		return "all versions"
	}
	return "version " + strconv.FormatUint(uint64(v), 10)
}
