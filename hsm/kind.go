package hsm

// An objectKind is what an object of ours is for. The numbers are in frames.
type objectKind byte

const (
	kindMaster     objectKind = 1
	kindSigner     objectKind = 2
	kindRoot       objectKind = 3
	kindIdentity   objectKind = 4
	kindSealSigner objectKind = 5 // signs what an RSA root seals
)

// String is the CKA_LABEL of the objects of a kind after "keyward-", and the
// suffix of their files in a software token.
func (k objectKind) String() string {
	switch k {
	case kindMaster:
		return "master"
	case kindSigner:
		return "signer"
	case kindRoot:
		return "root"
	case kindIdentity:
		return "identity"
	case kindSealSigner:
		return "sealsigner"
	}
	return "unknown"
}

// label is the CKA_LABEL of the objects of a kind.
func (k objectKind) label() string { return "keyward-" + k.String() }

// decrypts tells keys that only decrypt from keys that only sign.
func (k objectKind) decrypts() bool { return k != kindSigner && k != kindSealSigner }
