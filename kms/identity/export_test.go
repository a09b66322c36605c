package identity

import "crypto/x509"

// What only tests need: the parsers of our own records, and the root.
var (
	ParseRoots   = parseRoots
	EncodeRoots  = encodeRoots
	PrincipalOf  = principalOf
	PrincipalURI = principalURI
)

func (a *Authority) Root() *x509.Certificate { return a.roots[0].cert }

func (a *Authority) ParseServer(b []byte) error {
	_, err := a.parseServer(b)
	return err
}
