package rpc

import (
	"context"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/kmspb"
)

// An enrolmentServer answers strangers with a one-time token.
type enrolmentServer struct {
	kmspb.UnimplementedEnrolmentServer
	server *Server
}

// Enroll checks the request before the token is burned, so that a mistake does
// not cost a token.
func (e *enrolmentServer) Enroll(ctx context.Context, r *kmspb.EnrollRequest) (*kmspb.EnrollResponse, error) {
	s := e.server
	if err := first(tokenField(r.GetToken()), s.config.Identities.CheckRequest(r.GetCsr())); err != nil {
		return nil, err
	}
	// A certificate, if one was shown, counts for nothing here.
	c := callerOf(ctx)
	c.Principal, c.Serial = "", ""
	var issued *identity.Issued
	err := s.backend.Enrolments.Redeem(ctx, c, kms.TokenText(r.GetToken()), func(principal string) (err error) {
		issued, err = s.config.Identities.IssueClient(principal, r.GetCsr())
		return err
	})
	return issuedPB(issued, err)
}

// issuedPB gives nothing away if the act could not be completed.
func issuedPB(i *identity.Issued, err error) (*kmspb.EnrollResponse, error) {
	if err != nil {
		return nil, err
	}
	if i == nil {
		return nil, errInternal
	}
	return &kmspb.EnrollResponse{Certificate: i.Chain, Roots: i.Roots, Principal: i.Principal}, nil
}
