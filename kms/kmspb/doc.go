// Package kmspb is the wire of the key service: kms.proto and what protoc
// makes of it, nothing else. Regenerate with `make generate`.
package kmspb
