package rpc

import (
	"context"
	"time"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/kmspb"
)

// Instances, grants and identities: the calls that decide who may do what.

func (a *adminServer) PrepareInstance(ctx context.Context, r *kmspb.PrepareInstanceRequest) (*kmspb.PrepareInstanceResponse, error) {
	if err := first(requestIDField(r.GetRequestId()), named("kind", r.GetKind()), named("instance", r.GetName()), named("vault", r.GetVault()),
		keyringsField(r.GetKeyrings()), lifetimeField(r.GetLifetimeSeconds())); err != nil {
		return nil, err
	}
	i, t, err := a.server.backend.Instances.PrepareInstance(ctx, callerOf(ctx), kms.PrepareInstance{
		RequestID: r.GetRequestId(), Kind: r.GetKind(), Name: r.GetName(), Vault: r.GetVault(),
		Keyrings: r.GetKeyrings(), Lifetime: time.Duration(r.GetLifetimeSeconds()) * time.Second,
	})
	if err != nil {
		return nil, err
	}
	return &kmspb.PrepareInstanceResponse{Instance: instancePB(i), Token: a.server.tokenPB(t)}, nil
}

func (a *adminServer) ListInstances(ctx context.Context, _ *kmspb.ListInstancesRequest) (*kmspb.ListInstancesResponse, error) {
	list, err := a.server.backend.Instances.Instances(ctx, callerOf(ctx))
	return converted(list, err, func(l []kms.Instance) *kmspb.ListInstancesResponse {
		return &kmspb.ListInstancesResponse{Instances: each(l, instancePB)}
	})
}

// RevokeInstance cuts the instance's streams before it answers.
func (a *adminServer) RevokeInstance(ctx context.Context, r *kmspb.RevokeInstanceRequest) (*kmspb.Empty, error) {
	if err := first(named("instance", r.GetName())); err != nil {
		return nil, err
	}
	if err := a.server.backend.Instances.RevokeInstance(ctx, callerOf(ctx), r.GetName()); err != nil {
		return nil, err
	}
	a.server.sweep()
	return &kmspb.Empty{}, nil
}

func (a *adminServer) AddGrant(ctx context.Context, r *kmspb.Grant) (*kmspb.Empty, error) {
	g, err := grantField(r)
	if err != nil {
		return nil, err
	}
	return &kmspb.Empty{}, a.server.backend.Grants.AddGrant(ctx, callerOf(ctx), g)
}

func (a *adminServer) RemoveGrant(ctx context.Context, r *kmspb.Grant) (*kmspb.Empty, error) {
	g, err := grantField(r)
	if err != nil {
		return nil, err
	}
	return &kmspb.Empty{}, a.server.backend.Grants.RemoveGrant(ctx, callerOf(ctx), g)
}

func (a *adminServer) ListGrants(ctx context.Context, r *kmspb.ListGrantsRequest) (*kmspb.ListGrantsResponse, error) {
	if r.GetPrincipal() != "" {
		if err := first(principalField(r.GetPrincipal())); err != nil {
			return nil, err
		}
	}
	list, err := a.server.backend.Grants.Grants(ctx, callerOf(ctx), r.GetPrincipal())
	return converted(list, err, func(l []kms.Grant) *kmspb.ListGrantsResponse {
		return &kmspb.ListGrantsResponse{Grants: each(l, grantPB)}
	})
}

func (a *adminServer) CreateToken(ctx context.Context, r *kmspb.CreateTokenRequest) (*kmspb.EnrolmentToken, error) {
	if err := first(principalField(r.GetPrincipal()), lifetimeField(r.GetLifetimeSeconds())); err != nil {
		return nil, err
	}
	t, err := a.server.backend.Enrolments.NewEnrolmentToken(ctx, callerOf(ctx), r.GetPrincipal(), time.Duration(r.GetLifetimeSeconds())*time.Second)
	return converted(t, err, a.server.tokenPB)
}

// RevokeIdentity cuts the identity's streams before it answers.
func (a *adminServer) RevokeIdentity(ctx context.Context, r *kmspb.RevokeIdentityRequest) (*kmspb.Empty, error) {
	if err := first(principalField(r.GetPrincipal())); err != nil {
		return nil, err
	}
	if err := a.server.backend.Enrolments.RevokeIdentity(ctx, callerOf(ctx), r.GetPrincipal()); err != nil {
		return nil, err
	}
	a.server.sweep()
	return &kmspb.Empty{}, nil
}
