package hsm

// RestsOnRSA reports whether sealed, which SealKey of any token made, stands
// under RSA: its token has no AES-GCM, so that its root is an RSA key. Such a
// key is no safer from a quantum computer than RSA is. It reads the algorithm
// in the header (hsm/FORMAT.md) and checks nothing else; what is no sealed key
// gives false.
func RestsOnRSA(sealed []byte) bool {
	return len(sealed) > sealedHeader && string(sealed[:4]) == sealedMagic && sealed[5] == algTokenRSA
}
