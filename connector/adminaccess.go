package connector

import (
	"context"
	"time"

	"github.com/keyward/keyward/kms/kmspb"
)

// A NewInstance describes a database that shall be registered.
type NewInstance struct {
	RequestID string // see Admin
	Kind      string // "mariadb"
	Name      string
	Vault     string
	Keyrings  []string      // existing ones
	Lifetime  time.Duration // of the token, whole seconds; 0: one hour
}

// PrepareInstance registers a database, grants its host what it needs and
// returns the token its host enrols with.
func (a *Admin) PrepareInstance(ctx context.Context, n NewInstance) (Instance, EnrolmentToken, error) {
	req := &kmspb.PrepareInstanceRequest{
		RequestId: requestID(n.RequestID), Kind: n.Kind, Name: n.Name, Vault: n.Vault, Keyrings: n.Keyrings, LifetimeSeconds: seconds(n.Lifetime),
	}
	r, err := ask(ctx, a, makes("prepare instance %s", n.Name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.PrepareInstanceResponse, error) {
		return s.PrepareInstance(ctx, req)
	})
	if err != nil {
		return Instance{}, EnrolmentToken{}, err
	}
	return instanceFrom(r.GetInstance()), tokenFrom(r.GetToken()), nil
}

// Instances lists the registered databases.
func (a *Admin) Instances(ctx context.Context) ([]Instance, error) {
	r, err := ask(ctx, a, reads("list instances"), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.ListInstancesResponse, error) {
		return s.ListInstances(ctx, &kmspb.ListInstancesRequest{})
	})
	if err != nil {
		return nil, err
	}
	return convert(r.GetInstances(), instanceFrom), nil
}

// RevokeInstance ends an instance's rights. It is final.
func (a *Admin) RevokeInstance(ctx context.Context, name string) error {
	return a.do(ctx, sets("revoke instance %s", name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Empty, error) {
		return s.RevokeInstance(ctx, &kmspb.RevokeInstanceRequest{Name: name})
	})
}

// RevokeIdentity refuses every certificate of a principal from now on.
func (a *Admin) RevokeIdentity(ctx context.Context, principal string) error {
	return a.do(ctx, sets("revoke identity %s", principal), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Empty, error) {
		return s.RevokeIdentity(ctx, &kmspb.RevokeIdentityRequest{Principal: principal})
	})
}

// AddGrant gives a role. By and At are set by the service.
func (a *Admin) AddGrant(ctx context.Context, g Grant) error {
	req := &kmspb.Grant{Principal: g.Principal, Role: g.Role, Scope: g.Scope}
	return a.do(ctx, onlyOnce("grant %s to %s at %s", g.Role, g.Principal, g.Scope), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Empty, error) {
		return s.AddGrant(ctx, req)
	})
}

// RemoveGrant takes a role away.
func (a *Admin) RemoveGrant(ctx context.Context, g Grant) error {
	req := &kmspb.Grant{Principal: g.Principal, Role: g.Role, Scope: g.Scope}
	return a.do(ctx, onlyOnce("remove %s of %s at %s", g.Role, g.Principal, g.Scope), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Empty, error) {
		return s.RemoveGrant(ctx, req)
	})
}

// Grants lists the grants of a principal, of all if it is empty.
func (a *Admin) Grants(ctx context.Context, principal string) ([]Grant, error) {
	r, err := ask(ctx, a, reads("list grants"), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.ListGrantsResponse, error) {
		return s.ListGrants(ctx, &kmspb.ListGrantsRequest{Principal: principal})
	})
	if err != nil {
		return nil, err
	}
	return convert(r.GetGrants(), grantFrom), nil
}

// CreateToken makes an enrolment token for "person/NAME" or "host/NAME".
func (a *Admin) CreateToken(ctx context.Context, principal string, lifetime time.Duration) (EnrolmentToken, error) {
	req := &kmspb.CreateTokenRequest{Principal: principal, LifetimeSeconds: seconds(lifetime)}
	r, err := ask(ctx, a, onlyOnce("create token for %s", principal), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.EnrolmentToken, error) {
		return s.CreateToken(ctx, req)
	})
	if err != nil {
		return EnrolmentToken{}, err
	}
	return tokenFrom(r), nil
}

// Status reports the health of the service.
func (a *Admin) Status(ctx context.Context) (Status, error) {
	r, err := ask(ctx, a, reads("get status"), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Status, error) {
		return s.GetStatus(ctx, &kmspb.GetStatusRequest{})
	})
	if err != nil {
		return Status{}, err
	}
	return statusFrom(r), nil
}

func (a *Admin) do(ctx context.Context, m method, f func(context.Context, kmspb.AdminClient) (*kmspb.Empty, error)) error {
	_, err := ask(ctx, a, m, f)
	return err
}

// TokenFile turns a token into the file that is handed over. The endpoints and
// the CA are those this client itself trusts. in is the zero Instance for a
// person's token.
func (a *Admin) TokenFile(t EnrolmentToken, in Instance) TokenFile {
	return TokenFile{
		Endpoints: append([]string(nil), a.c.cfg.Endpoints...), CAFingerprint: a.c.cfg.Identity.CAFingerprint(),
		Principal: t.Principal, Expires: t.Expires, Token: t.Text,
		Instance: in.Name, Kind: in.Kind, Vault: in.Vault, Keyrings: in.Keyrings,
	}
}
