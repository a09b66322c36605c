// Package hsm keeps private keys where they can be used but not read: in a
// PKCS#11 token ([Token], behind a supervised child process) or, for trying
// out, in sealed files ([Software]). Both have the same methods; the contract
// suite in hsm/hsmtest runs on both.
//
// What a token promises here: master keys are RSA pairs that only decrypt,
// signers only sign, roots only seal keys; every object carries a random
// CKA_ID chosen (and recorded) by the caller before it is made. What it refuses:
// PKCS #1 v1.5 decryption, OAEP labels (SoftHSM 2.6.1 ignores them), export of
// any private half, and any answer that would tell a caller why a ciphertext is
// not good.
//
// Errors wrap one class of package dek. Every method takes a context whose end
// bounds the wait of the caller; it does not stop a device call that has
// begun, because PKCS#11 calls can't be cancelled (see [Config.Deadline]).
package hsm

import (
	"crypto"
	"crypto/rsa"
	_ "crypto/sha1" // the OAEP hash that every token can do
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// Config names a token and how to reach it. Check reports every mistake.
type Config struct {
	// Module is the absolute path of the PKCS#11 library. Links resolved, it must
	// be a regular file that neither group nor others may write; no directory
	// above it may be open for all to write; and all of them must belong to root
	// or to the user of this process.
	Module string
	// TokenURI is an RFC 7512 URI that selects exactly one token, such as
	// "pkcs11:token=keyward;serial=0a1b". Attributes: token, serial, model,
	// manufacturer, slot-id. pin-value is refused (a PIN never stands in a URI);
	// pin-source (file: or an absolute path) fills an empty PINFile.
	TokenURI string
	// PINFile holds the user PIN (one trailing newline is dropped; 1 to 255
	// bytes). It must be a regular file that neither group nor others may read.
	// The child alone reads it.
	PINFile string
	// PINState remembers across restarts that a PIN was refused, so that no
	// restart loop locks the token. Empty: remembered in memory only.
	PINState string
	// Expect pins the token: non-empty fields must match what is found, and the
	// token must prove that it holds the private half behind Fingerprint. Zero:
	// whatever is found at Open is pinned until Close, and an identity pair is
	// made if the token has none.
	Expect Identity
	// Deadline bounds one device call; one that takes longer is a hang: the
	// child is killed and started again. 0: 10 seconds.
	Deadline time.Duration
	// GenerateDeadline is the same for making keys. 0: 2 minutes.
	GenerateDeadline time.Duration
	// Workers is the number of concurrent RSA operations. 0: one per CPU.
	Workers int
	// Child is the command that runs [RunChild], such as
	// {"/proc/self/exe", "token-child"}. It gets its socket as descriptor 3.
	Child []string
	// Env is added to the environment that the child inherits, for modules that
	// are configured by it ("SOFTHSM2_CONF=..."). No secret belongs there.
	Env []string
	// Logger gets restarts and refusals. nil: discarded.
	Logger *slog.Logger
}

// An Identity says which token this is. It holds nothing secret.
type Identity struct {
	Label        string
	Serial       string
	Model        string
	Manufacturer string
	// Fingerprint is the SHA-256 (lower-case hex) of the SubjectPublicKeyInfo of
	// the identity pair: labels and serials can be copied, its private half not.
	Fingerprint string
}

// Capabilities is what a token was seen to do when it was probed at start.
// A mechanism that is listed but does not work is not in it.
type Capabilities struct {
	// OAEP lists the hashes that RSA-OAEP decryption works with (empty label).
	OAEP []crypto.Hash
	// RSABits lists which of 2048, 3072 and 4096 can be generated.
	RSABits []int
	// AESGCM: the root key can be AES-256-GCM inside the token.
	AESGCM bool
	// ECDSA: signers are EC P-256; otherwise RSA 3072 with PKCS #1 v1.5 SHA-256.
	ECDSA bool
	// Origin: the token tells keys that it made from keys that were brought in
	// (CKA_LOCAL), so FindPair can refuse the latter. NSS does not.
	Origin bool
	// Survives: what the token acknowledges is on disk or in hardware. False for
	// SoftHSM, which never calls fsync.
	Survives bool
}

// PreferredOAEP returns the hash for new wraps: SHA-256 where it works, else
// SHA-1. Zero if the token can't do OAEP at all.
func (c Capabilities) PreferredOAEP() crypto.Hash {
	for _, h := range []crypto.Hash{crypto.SHA256, crypto.SHA1} {
		if slices.Contains(c.OAEP, h) {
			return h
		}
	}
	return 0
}

// Missing lists, one line each, what the token can't do of what Keyward can
// use. Empty for a full token.
func (c Capabilities) Missing() []string {
	var missing []string
	for _, h := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		if !slices.Contains(c.OAEP, h) {
			missing = append(missing, "RSA-OAEP with "+h.String())
		}
	}
	for _, bits := range rsaSizes {
		if !slices.Contains(c.RSABits, bits) {
			missing = append(missing, fmt.Sprintf("RSA-%d generation", bits))
		}
	}
	if !c.AESGCM {
		missing = append(missing, "AES-256-GCM (root key falls back to RSA-OAEP with a token signature)")
	}
	if !c.ECDSA {
		missing = append(missing, "ECDSA P-256 (signers fall back to RSA-3072)")
	}
	if !c.Origin {
		missing = append(missing, "CKA_LOCAL (an imported pair can't be told from one made in the token)")
	}
	if !c.Survives {
		missing = append(missing, "durable writes (acknowledged keys can vanish with the power)")
	}
	return missing
}

// rsaSizes are the master key sizes of the product (NIST SP 800-57 part 1).
var rsaSizes = []int{2048, 3072, 4096}

// Fingerprint returns the SHA-256 of the SubjectPublicKeyInfo of pub in
// lower-case hex, the form in [Identity.Fingerprint].
func Fingerprint(pub crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", fmt.Errorf("%w: public key: %w", dek.ErrInvalid, err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// matches reports whether found is the token that want (possibly partly empty)
// describes. The error names what was expected.
func (want Identity) matches(found Identity) error {
	var wrong []string
	differ := func(field, want, found string) {
		if want != "" && want != found {
			wrong = append(wrong, fmt.Sprintf("%s %q expected, %q found", field, want, found))
		}
	}
	differ("label", want.Label, found.Label)
	differ("serial", want.Serial, found.Serial)
	differ("model", want.Model, found.Model)
	differ("manufacturer", want.Manufacturer, found.Manufacturer)
	differ("fingerprint", want.Fingerprint, found.Fingerprint)
	if len(wrong) > 0 {
		return fmt.Errorf("%w: this is another token: %s; put the right token back", dek.ErrPrecondition, strings.Join(wrong, ", "))
	}
	return nil
}

// checkBits refuses sizes that are not master key sizes.
func checkBits(bits int) error {
	if !slices.Contains(rsaSizes, bits) {
		return fmt.Errorf("%w: RSA size %d: use 2048, 3072 or 4096", dek.ErrInvalid, bits)
	}
	return nil
}

// checkDigest refuses what is not a SHA-256 digest.
func checkDigest(digest []byte) error {
	if len(digest) != sha256.Size {
		return fmt.Errorf("%w: digest of %d bytes: sign SHA-256 digests", dek.ErrInvalid, len(digest))
	}
	return nil
}

// checkID refuses the zero CKA_ID, which names nothing.
func checkID(id dek.ObjectID) error {
	if id == (dek.ObjectID{}) {
		return fmt.Errorf("%w: object id is zero", dek.ErrInvalid)
	}
	return nil
}

// checkHash refuses OAEP hashes that no wrapped key of ours may name.
func checkHash(h crypto.Hash) error {
	if h != crypto.SHA1 && h != crypto.SHA256 {
		return fmt.Errorf("%w: OAEP hash %d: use SHA-1 or SHA-256", dek.ErrInvalid, uint(h))
	}
	return nil
}

// errCiphertext is the one answer for every ciphertext that is not good.
func errCiphertext() error {
	return fmt.Errorf("%w: wrapped key refused by the token", dek.ErrAuth)
}

// rsaPublic is the checked form of a master public key.
func rsaPublic(pub crypto.PublicKey) (*rsa.PublicKey, error) {
	k, ok := pub.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: object is not an RSA key", dek.ErrCorrupt)
	}
	return k, nil
}
