// Package connector is the side of Keyward that stands next to a database.
//
// Client speaks gRPC over mutual TLS 1.3 to one or several key services: it
// fails over, retries only what may be repeated, collapses identical unwraps
// and follows changes. Admin is the management side of the same client, in
// plain types. Agent serves local databases over a Unix socket (PROTOCOL.md)
// and keeps their keys in locked memory.
//
// One distinction runs through all of it: a key service that can't be reached
// (dek.ErrUnavailable) is an outage, and what is held stays in use; one that
// says no (dek.ErrDenied) is obeyed at once. Only an answer that came through
// an authenticated connection is ever a no: nobody on the network can forge one.
//
// # What protects an identity on disk
//
// An identity is one file, identity.json: private key, certificate, roots. A
// person's key lies there in clear, mode 0600, as an SSH key does. An agent's
// key is sealed under a host secret that is kept outside the state directory
// (by default /etc/keyward/host-secret, or the systemd credential
// "keyward-host-secret"), so a copy or backup of the state directory is of no
// use to anyone. A thief who takes the whole root disk has both and is the host
// until its identity is revoked; a host secret that systemd-creds encrypts to
// the machine's TPM closes that gap. Data keys are never on disk in clear.
package connector
