// Package dek holds what every part of Keyward knows of a data-encryption key:
// the Key itself, its names, the sealed and wrapped forms it travels in, the
// cache it waits in, and the classes of errors.
//
// It promises that key bytes stay in locked memory and are wiped when their
// owner is done; that whatever is sealed opens only where it belongs; and that
// every format is the one FORMAT.md describes. It refuses to print, log or
// encode a key, to open anything but the whole and unchanged, and to read a
// format version it does not know. It touches neither network nor files.
package dek
