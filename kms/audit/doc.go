// Package audit keeps the record of what was done with keys: an append-only
// log whose records are on disk before Append returns, under a Merkle tree
// (RFC 6962) whose root is signed at most a second after a record.
//
// It promises that an acknowledged record survives a crash, and that removal,
// change, insertion, reordering and truncation up to the newest checkpoint are
// found offline by Verify, which names the first bad record. It refuses to
// append what it can't make durable (fail closed), to go on with a log that
// does not fit its checkpoints, and to remove what was not exported.
//
// What it can't promise: records younger than the newest checkpoint (a second)
// can be cut by someone who owns the disk; whoever holds the audit key can
// write a new log. Exported checkpoints shown to Extends or Verify close the
// first; a key that never leaves the token is meant to close the second.
//
// The files are described in FORMAT.md.
package audit
