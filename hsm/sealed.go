package hsm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/keyward/keyward/dek"
)

// A key sealed by a root; the layout is hsm/FORMAT.md.
const (
	sealedMagic   = "KWTS"
	sealedVersion = 1
	sealedHeader  = 4 + 1 + 1 + 16
	maxSealed     = 2048

	algTokenGCM = 1 // AES-256-GCM inside the token
	algTokenRSA = 2 // RSA-OAEP inside the token, signed by the token
	algSoftware = 3 // dek.Key.Seal, software token

	gcmNonce = 12
	gcmTag   = 16

	sigECDSA = 1 // ASN.1, P-256, SHA-256
	sigRSA   = 2 // PKCS #1 v1.5, SHA-256
)

// errSealed is the one answer for every sealed key that is not good.
func errSealed() error {
	return fmt.Errorf("%w: sealed key refused by its root", dek.ErrAuth)
}

// sealHeader begins a sealed key. It is authenticated by every algorithm.
func sealHeader(alg byte, root dek.ObjectID) []byte {
	h := make([]byte, 0, maxSealed)
	h = append(h, sealedMagic...)
	h = append(h, sealedVersion, alg)
	return append(h, root[:]...)
}

// splitSealed checks the header against the root and returns algorithm, header
// and payload. The payload is not empty.
func splitSealed(root dek.ObjectID, sealed []byte) (alg byte, header, payload []byte, err error) {
	if len(sealed) <= sealedHeader || len(sealed) > maxSealed ||
		string(sealed[:4]) != sealedMagic || sealed[4] != sealedVersion || dek.ObjectID(sealed[6:sealedHeader]) != root {
		return 0, nil, nil, errSealed()
	}
	return sealed[5], sealed[:sealedHeader:sealedHeader], sealed[sealedHeader:], nil
}

// An rsaSealed is the payload of algTokenRSA.
type rsaSealed struct {
	hash       crypto.Hash
	sigAlg     byte
	ciphertext []byte
	signature  []byte
}

// appendUnsigned encodes the payload without the signature: what is signed.
func (s rsaSealed) appendUnsigned(b []byte) []byte {
	b = append(b, hashCode(s.hash), s.sigAlg)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.ciphertext)))
	return append(b, s.ciphertext...)
}

func (s rsaSealed) append(b []byte) []byte {
	b = s.appendUnsigned(b)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.signature)))
	return append(b, s.signature...)
}

// digest is what the token signs: header, binding and ciphertext under a
// domain string, so that no other signature of the same key fits.
func (s rsaSealed) digest(header, place []byte) []byte {
	h := sha256.New()
	h.Write([]byte("keyward hsm sealed key v1\x00"))
	h.Write(header)
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(place))))
	h.Write(place)
	h.Write(s.appendUnsigned(nil))
	return h.Sum(nil)
}

// parseRSASealed reads the payload of algTokenRSA. Trailing bytes are refused.
func parseRSASealed(p []byte) (rsaSealed, error) {
	d := decoder{b: p}
	s := rsaSealed{hash: codeHash(d.u8()), sigAlg: d.u8(), ciphertext: d.bytes16(), signature: d.bytes16()}
	if d.done() != nil || s.hash == 0 || s.sigAlg != sigECDSA && s.sigAlg != sigRSA ||
		len(s.ciphertext) == 0 || len(s.signature) == 0 {
		return rsaSealed{}, errSealed()
	}
	return s, nil
}

// verify reports whether sig is by pub over digest.
func verify(pub crypto.PublicKey, sigAlg byte, digest, sig []byte) bool {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return sigAlg == sigECDSA && ecdsa.VerifyASN1(k, digest, sig)
	case *rsa.PublicKey:
		return sigAlg == sigRSA && rsa.VerifyPKCS1v15(k, crypto.SHA256, digest, sig) == nil
	}
	return false
}

// sigAlgorithm is the algorithm that keys like pub sign with; 0 for none.
func sigAlgorithm(pub crypto.PublicKey) byte {
	switch pub.(type) {
	case *ecdsa.PublicKey:
		return sigECDSA
	case *rsa.PublicKey:
		return sigRSA
	}
	return 0
}

// hashCode and codeHash number the OAEP hashes in formats and frames.
func hashCode(h crypto.Hash) byte {
	switch h {
	case crypto.SHA1:
		return 1
	case crypto.SHA256:
		return 2
	}
	return 0
}

func codeHash(c byte) crypto.Hash {
	switch c {
	case 1:
		return crypto.SHA1
	case 2:
		return crypto.SHA256
	}
	return 0
}
