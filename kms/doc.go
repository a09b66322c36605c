// Package kms holds the rules of the key service: vaults, master keys,
// keyrings, instances, grants and their lives. It decides; it does not listen,
// store or talk to a device. What it needs of the world it asks through the
// small interfaces below, in types of the standard library and of dek only, so
// that a rule can be read and tested without a network, an HSM or a disk.
//
// State is one immutable view in memory over sealed records in a store that is
// not trusted (FORMAT.md). Unwraps read the view; a change is one transaction
// that a head closes, and the audit log names every head, so that a store put
// back in time is found at start. Versions are made by one protocol (record
// PENDING, make, prove, back up, enable) that start-up and reconciler finish.
//
// Every act follows one order: authorise, record the intent, act, record the
// outcome, answer. Where any of these can't be done, the answer is an error
// and nothing has changed for the caller.
package kms
