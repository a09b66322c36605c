package kms

import (
	"context"
	"crypto"
	"fmt"
	"io"
	"time"

	"github.com/keyward/keyward/dek"
)

// signTimeout bounds one signature; crypto.Signer has no context.
const signTimeout = 30 * time.Second

// A tokenSigner is a signing key in the token.
type tokenSigner struct {
	token  Signer
	object dek.ObjectID
	public crypto.PublicKey
}

func newSigner(ctx context.Context, t Signer, object dek.ObjectID) (crypto.Signer, error) {
	public, err := t.SignerPublic(ctx, object)
	if err != nil {
		return nil, err
	}
	return &tokenSigner{t, object, public}, nil
}

func (t *tokenSigner) Public() crypto.PublicKey { return t.public }

// Sign signs a SHA-256 digest: ASN.1 ECDSA, or RSA PKCS #1 v1.5.
func (t *tokenSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("%w: the token signs SHA-256 digests only", dek.ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(context.Background(), signTimeout)
	defer cancel()
	return t.token.Sign(ctx, t.object, digest)
}

// CASigner returns the key of the certificate authority in the token. Its Sign
// takes SHA-256 digests.
func (s *Service) CASigner() crypto.Signer { return s.ca }

// Installation is the random id of this installation, in hex.
func (s *Service) Installation() string { return s.view.Load().boot.Installation }

// AuditObject names the audit key in the token.
func (s *Service) AuditObject() dek.ObjectID { return dek.ObjectID(s.view.Load().boot.Audit) }
