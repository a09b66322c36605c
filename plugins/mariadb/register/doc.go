// Package register puts a running MariaDB server under Keyward: it enrols the
// host with a prepared token, writes the agent's and the server's
// configuration, starts the agent, loads the encryption plugin and proves the
// result by a table whose file it reads back.
//
// Promises: every step can be run again and then does only what is missing; a
// failure says what was done before it; and the server's configuration demands
// encryption only after the proof has succeeded, so that a registration that
// stops half way never leaves a server that can't start. It refuses to go on
// where another encryption plugin is loaded: two of them can't share a server.
package register

// DefaultPluginFile is the plugin's file in the server's plugin directory.
const DefaultPluginFile = "keyward_key_management.so"
