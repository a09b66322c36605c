// Package readme holds the test that runs what README.md tells people to type.
package readme
