// Package archtest holds the test of the import rules: which package of
// Keyward may import which, and which third-party module it alone touches.
// Relaxing a line there is a design change and gets a commit of its own.
package archtest
