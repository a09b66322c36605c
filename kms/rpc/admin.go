package rpc

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/kmspb"
)

// An adminServer answers people and scripts: vaults, keys and keyrings here,
// the rest in the files beside.
type adminServer struct {
	kmspb.UnimplementedAdminServer
	server *Server
}

func (a *adminServer) CreateVault(ctx context.Context, r *kmspb.CreateVaultRequest) (*kmspb.Vault, error) {
	if err := first(named("vault", r.GetName())); err != nil {
		return nil, err
	}
	v, err := a.server.backend.Vaults.CreateVault(ctx, callerOf(ctx), r.GetName())
	return converted(v, err, vaultPB)
}

// converted turns a result, or an error alone, into a reply.
func converted[A, B any](v A, err error, f func(A) *B) (*B, error) {
	if err != nil {
		return nil, err
	}
	return f(v), nil
}

func (a *adminServer) ListVaults(ctx context.Context, _ *kmspb.ListVaultsRequest) (*kmspb.ListVaultsResponse, error) {
	list, err := a.server.backend.Vaults.Vaults(ctx, callerOf(ctx))
	return converted(list, err, func(l []kms.Vault) *kmspb.ListVaultsResponse {
		return &kmspb.ListVaultsResponse{Vaults: each(l, vaultPB)}
	})
}

func (a *adminServer) CreateKey(ctx context.Context, r *kmspb.CreateKeyRequest) (*kmspb.MasterKey, error) {
	if err := first(requestIDField(r.GetRequestId()), named("vault", r.GetVault()), named("key", r.GetName()), bitsField(r.GetBits())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keys.CreateKey(ctx, callerOf(ctx), kms.CreateKey{
		RequestID: r.GetRequestId(), Vault: r.GetVault(), Name: r.GetName(), Bits: int(r.GetBits()),
	})
	return converted(k, err, masterKeyPB)
}

func (a *adminServer) RollKey(ctx context.Context, r *kmspb.RollKeyRequest) (*kmspb.MasterKey, error) {
	if err := first(requestIDField(r.GetRequestId()), named("vault", r.GetVault()), named("key", r.GetName())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keys.RollKey(ctx, callerOf(ctx), kms.RollKey{
		RequestID: r.GetRequestId(), Vault: r.GetVault(), Name: r.GetName(),
	})
	return converted(k, err, masterKeyPB)
}

func (a *adminServer) GetKey(ctx context.Context, r *kmspb.GetKeyRequest) (*kmspb.MasterKey, error) {
	if err := first(named("vault", r.GetVault()), named("key", r.GetName())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keys.Key(ctx, callerOf(ctx), r.GetVault(), r.GetName())
	return converted(k, err, masterKeyPB)
}

func (a *adminServer) ListKeys(ctx context.Context, r *kmspb.ListKeysRequest) (*kmspb.ListKeysResponse, error) {
	if err := first(named("vault", r.GetVault())); err != nil {
		return nil, err
	}
	list, err := a.server.backend.Keys.Keys(ctx, callerOf(ctx), r.GetVault())
	return converted(list, err, func(l []kms.MasterKey) *kmspb.ListKeysResponse {
		return &kmspb.ListKeysResponse{Keys: each(l, masterKeyPB)}
	})
}

func (a *adminServer) SetKeyEnabled(ctx context.Context, r *kmspb.SetEnabledRequest) (*kmspb.Effect, error) {
	set, err := setEnabled("key", r)
	if err != nil {
		return nil, err
	}
	e, err := a.server.backend.Keys.SetKeyEnabled(ctx, callerOf(ctx), set)
	return converted(e, err, effectPB)
}

func setEnabled(what string, r *kmspb.SetEnabledRequest) (kms.SetEnabled, error) {
	set := kms.SetEnabled{Vault: r.GetVault(), Name: r.GetName(), Version: dek.Version(r.GetVersion()), Enabled: r.GetEnabled()}
	return set, first(named("vault", r.GetVault()), named(what, r.GetName()))
}

// progressEvery bounds the messages of a long act.
const progressEvery = 200 * time.Millisecond

// RewrapKey streams how far it is. When the client goes away the act stops
// after the item it is at; another call goes on from there.
func (a *adminServer) RewrapKey(r *kmspb.RewrapKeyRequest, stream grpc.ServerStreamingServer[kmspb.RewrapProgress]) error {
	if err := first(named("vault", r.GetVault()), named("key", r.GetName())); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	var last time.Time
	var total int
	n, err := a.server.backend.Keys.RewrapKey(ctx, callerOf(ctx), r.GetVault(), r.GetName(), func(done, of int) {
		total = of
		if now := time.Now(); done < of && now.Sub(last) >= progressEvery {
			last = now
			if err := stream.Send(progressPB(done, of)); err != nil {
				cancel(err)
			}
		}
	})
	if err != nil {
		return err
	}
	total = max(total, n)
	return stream.Send(progressPB(total, total))
}

func progressPB(done, total int) *kmspb.RewrapProgress {
	return &kmspb.RewrapProgress{Done: uint32(done), Total: uint32(total)} //nolint:gosec // counts of keyrings
}

func (a *adminServer) CreateKeyring(ctx context.Context, r *kmspb.CreateKeyringRequest) (*kmspb.Keyring, error) {
	if err := first(requestIDField(r.GetRequestId()), named("vault", r.GetVault()), named("keyring", r.GetName()), named("master_key", r.GetMasterKey())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keyrings.CreateKeyring(ctx, callerOf(ctx), kms.CreateKeyring{
		RequestID: r.GetRequestId(), Vault: r.GetVault(), Name: r.GetName(), MasterKey: r.GetMasterKey(), ServerKey: r.GetServerKey(),
	})
	return converted(k, err, keyringPB)
}

func (a *adminServer) RollKeyring(ctx context.Context, r *kmspb.RollKeyringRequest) (*kmspb.Keyring, error) {
	if err := first(requestIDField(r.GetRequestId()), named("vault", r.GetVault()), named("keyring", r.GetName())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keyrings.RollKeyring(ctx, callerOf(ctx), kms.RollKeyring{
		RequestID: r.GetRequestId(), Vault: r.GetVault(), Name: r.GetName(),
	})
	return converted(k, err, keyringPB)
}

func (a *adminServer) GetKeyring(ctx context.Context, r *kmspb.GetKeyringRequest) (*kmspb.Keyring, error) {
	if err := first(named("vault", r.GetVault()), named("keyring", r.GetName())); err != nil {
		return nil, err
	}
	k, err := a.server.backend.Keyrings.Keyring(ctx, callerOf(ctx), r.GetVault(), r.GetName())
	return converted(k, err, keyringPB)
}

func (a *adminServer) ListKeyrings(ctx context.Context, r *kmspb.ListKeyringsRequest) (*kmspb.ListKeyringsResponse, error) {
	if err := first(named("vault", r.GetVault())); err != nil {
		return nil, err
	}
	list, err := a.server.backend.Keyrings.Keyrings(ctx, callerOf(ctx), r.GetVault())
	return converted(list, err, func(l []kms.Keyring) *kmspb.ListKeyringsResponse {
		return &kmspb.ListKeyringsResponse{Keyrings: each(l, keyringPB)}
	})
}

func (a *adminServer) SetKeyringEnabled(ctx context.Context, r *kmspb.SetEnabledRequest) (*kmspb.Effect, error) {
	set, err := setEnabled("keyring", r)
	if err != nil {
		return nil, err
	}
	e, err := a.server.backend.Keyrings.SetKeyringEnabled(ctx, callerOf(ctx), set)
	return converted(e, err, effectPB)
}

// grantField parses a grant as people write it into the form that is kept.
func grantField(r *kmspb.Grant) (kms.Grant, error) {
	role, err := access.ParseRole(r.GetRole())
	if err := first(principalField(r.GetPrincipal()), err, scopeField(r.GetScope())); err != nil {
		return kms.Grant{}, err
	}
	return kms.Grant{Principal: r.GetPrincipal(), Role: role.String(), Scope: r.GetScope()}, nil
}
