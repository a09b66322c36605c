package main

import (
	"slices"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// What --json prints are these types and those of package connector. Their
// field names are a promise to scripts: they may gain fields and never lose or
// rename one.

// An effectView says what a switch did and who heard of it.
type effectView struct {
	Vault   string      `json:"vault"`
	Name    string      `json:"name"`
	Version dek.Version `json:"version"` // 0: all
	Enabled bool        `json:"enabled"`
	connector.Effect
}

type identityView struct {
	Principal string            `json:"principal"`
	Directory string            `json:"directory"`
	Endpoints []string          `json:"endpoints"`
	Expires   time.Time         `json:"expires"`
	Grants    []connector.Grant `json:"grants,omitempty"`
}

type tokenFileView struct {
	Principal string    `json:"principal"`
	Expires   time.Time `json:"expires"`
	File      string    `json:"file"`
}

// instanceState says in a word where an instance stands.
func instanceState(i connector.Instance) string {
	switch {
	case i.Enrolled.IsZero():
		return "prepared"
	case i.Connected:
		return "connected"
	}
	return "not connected"
}

// serverVersion returns a server's number of a keyring version, 0 if none.
func serverVersion(k connector.Keyring, version dek.Version) uint32 {
	i := slices.IndexFunc(k.Versions, func(v connector.KeyringVersion) bool { return v.Version == version })
	if i < 0 {
		return 0
	}
	return k.Versions[i].ServerVersion
}
