//go:build linux && (amd64 || arm64 || riscv64)

package dek

// MapLocked is what kernels without memfd_secret get.
var MapLocked = mapLocked
