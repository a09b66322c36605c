package connector

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"math"
	"time"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// An Admin is what people and scripts ask of a key service. Its methods are
// safe for concurrent use; errors are those of Client. Whoever creates or
// rolls names a request id, so that a repeated request has one effect; an
// empty one gets a random id, which covers the retries of this call only.
type Admin struct{ c *Client }

// NewAdmin returns the management calls of c.
func NewAdmin(c *Client) *Admin { return &Admin{c} }

// ask is one call of service Admin.
func ask[R any](ctx context.Context, a *Admin, m method, f func(context.Context, kmspb.AdminClient) (R, error)) (R, error) {
	return invoke(ctx, a.c, m, func(ctx context.Context, cc grpc.ClientConnInterface) (R, error) {
		return f(ctx, kmspb.NewAdminClient(cc))
	})
}

// makeTimeout bounds a call that makes keys in a token: RSA-4096 takes its time.
const makeTimeout = time.Minute

func reads(format string, args ...any) method {
	return method{op: fmt.Sprintf(format, args...), safety: hedged}
}

func sets(format string, args ...any) method {
	return method{op: fmt.Sprintf(format, args...), safety: repeatable}
}

func makes(format string, args ...any) method {
	return method{op: fmt.Sprintf(format, args...), safety: repeatable, timeout: makeTimeout}
}

func onlyOnce(format string, args ...any) method {
	return method{op: fmt.Sprintf(format, args...), timeout: makeTimeout}
}

func requestID(id string) string {
	if id != "" {
		return id
	}
	return rand.Text()
}

// CreateVault makes a vault. A name that is taken gives dek.ErrExists.
func (a *Admin) CreateVault(ctx context.Context, name string) (Vault, error) {
	r, err := ask(ctx, a, onlyOnce("create vault %s", name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Vault, error) {
		return s.CreateVault(ctx, &kmspb.CreateVaultRequest{Name: name})
	})
	if err != nil {
		return Vault{}, err
	}
	return vaultFrom(r), nil
}

// Vaults lists the vaults the caller may see.
func (a *Admin) Vaults(ctx context.Context) ([]Vault, error) {
	r, err := ask(ctx, a, reads("list vaults"), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.ListVaultsResponse, error) {
		return s.ListVaults(ctx, &kmspb.ListVaultsRequest{})
	})
	if err != nil {
		return nil, err
	}
	return convert(r.GetVaults(), vaultFrom), nil
}

// A NewKey describes a master key to be made.
type NewKey struct {
	RequestID string // see Admin
	Vault     string
	Name      string
	Bits      int // 2048, 3072 or 4096; 0: 3072
}

// CreateKey makes a master key in the token.
func (a *Admin) CreateKey(ctx context.Context, k NewKey) (MasterKey, error) {
	bits, err := fitUint32("bits", k.Bits)
	if err != nil {
		return MasterKey{}, err
	}
	req := &kmspb.CreateKeyRequest{RequestId: requestID(k.RequestID), Vault: k.Vault, Name: k.Name, Bits: bits}
	return a.masterKey(ctx, makes("create key %s/%s", k.Vault, k.Name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.MasterKey, error) {
		return s.CreateKey(ctx, req)
	})
}

// RollKey makes a new version of a master key; rewrap moves data keys to it.
func (a *Admin) RollKey(ctx context.Context, request, vault, name string) (MasterKey, error) {
	req := &kmspb.RollKeyRequest{RequestId: requestID(request), Vault: vault, Name: name}
	return a.masterKey(ctx, makes("roll key %s/%s", vault, name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.MasterKey, error) {
		return s.RollKey(ctx, req)
	})
}

// Key returns one master key.
func (a *Admin) Key(ctx context.Context, vault, name string) (MasterKey, error) {
	return a.masterKey(ctx, reads("get key %s/%s", vault, name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.MasterKey, error) {
		return s.GetKey(ctx, &kmspb.GetKeyRequest{Vault: vault, Name: name})
	})
}

func (a *Admin) masterKey(ctx context.Context, m method, f func(context.Context, kmspb.AdminClient) (*kmspb.MasterKey, error)) (MasterKey, error) {
	r, err := ask(ctx, a, m, f)
	if err != nil {
		return MasterKey{}, err
	}
	return masterKeyFrom(r), nil
}

// Keys lists the master keys of a vault.
func (a *Admin) Keys(ctx context.Context, vault string) ([]MasterKey, error) {
	r, err := ask(ctx, a, reads("list keys of %s", vault), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.ListKeysResponse, error) {
		return s.ListKeys(ctx, &kmspb.ListKeysRequest{Vault: vault})
	})
	if err != nil {
		return nil, err
	}
	return convert(r.GetKeys(), masterKeyFrom), nil
}

// A Switch names what is enabled or disabled.
type Switch struct {
	Vault   string
	Name    string
	Version dek.Version // 0: all versions
	Enabled bool
}

func (s Switch) request() *kmspb.SetEnabledRequest {
	return &kmspb.SetEnabledRequest{Vault: s.Vault, Name: s.Name, Version: uint32(s.Version), Enabled: s.Enabled}
}

func (s Switch) method(what string) method {
	verb := "disable"
	if s.Enabled {
		verb = "enable"
	}
	return sets("%s %s %s/%s", verb, what, s.Vault, s.Name)
}

// SetKeyEnabled enables or disables versions of a master key. When it returns,
// every live node of the service acts on it.
func (a *Admin) SetKeyEnabled(ctx context.Context, s Switch) (Effect, error) {
	return a.effect(ctx, s.method("key"), func(ctx context.Context, c kmspb.AdminClient) (*kmspb.Effect, error) {
		return c.SetKeyEnabled(ctx, s.request())
	})
}

// SetKeyringEnabled does the same for versions of a keyring.
func (a *Admin) SetKeyringEnabled(ctx context.Context, s Switch) (Effect, error) {
	return a.effect(ctx, s.method("keyring"), func(ctx context.Context, c kmspb.AdminClient) (*kmspb.Effect, error) {
		return c.SetKeyringEnabled(ctx, s.request())
	})
}

func (a *Admin) effect(ctx context.Context, m method, f func(context.Context, kmspb.AdminClient) (*kmspb.Effect, error)) (Effect, error) {
	r, err := ask(ctx, a, m, f)
	if err != nil {
		return Effect{}, err
	}
	return effectFrom(r), nil
}

// A NewKeyring describes a keyring to be made.
type NewKeyring struct {
	RequestID string // see Admin
	Vault     string
	Name      string
	MasterKey string
	ServerKey uint32 // key id a MariaDB server knows it by, 0: none
}

// CreateKeyring makes a keyring with its first version.
func (a *Admin) CreateKeyring(ctx context.Context, k NewKeyring) (Keyring, error) {
	req := &kmspb.CreateKeyringRequest{RequestId: requestID(k.RequestID), Vault: k.Vault, Name: k.Name, MasterKey: k.MasterKey, ServerKey: k.ServerKey}
	return a.keyring(ctx, makes("create keyring %s/%s", k.Vault, k.Name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Keyring, error) {
		return s.CreateKeyring(ctx, req)
	})
}

// RollKeyring makes a new data key version; databases use it within a second
// and re-encrypt in the background.
func (a *Admin) RollKeyring(ctx context.Context, request, vault, name string) (Keyring, error) {
	req := &kmspb.RollKeyringRequest{RequestId: requestID(request), Vault: vault, Name: name}
	return a.keyring(ctx, makes("roll keyring %s/%s", vault, name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Keyring, error) {
		return s.RollKeyring(ctx, req)
	})
}

// Keyring returns one keyring.
func (a *Admin) Keyring(ctx context.Context, vault, name string) (Keyring, error) {
	return a.keyring(ctx, reads("get keyring %s/%s", vault, name), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.Keyring, error) {
		return s.GetKeyring(ctx, &kmspb.GetKeyringRequest{Vault: vault, Name: name})
	})
}

func (a *Admin) keyring(ctx context.Context, m method, f func(context.Context, kmspb.AdminClient) (*kmspb.Keyring, error)) (Keyring, error) {
	r, err := ask(ctx, a, m, f)
	if err != nil {
		return Keyring{}, err
	}
	return keyringFrom(r), nil
}

// Keyrings lists the keyrings of a vault.
func (a *Admin) Keyrings(ctx context.Context, vault string) ([]Keyring, error) {
	r, err := ask(ctx, a, reads("list keyrings of %s", vault), func(ctx context.Context, s kmspb.AdminClient) (*kmspb.ListKeyringsResponse, error) {
		return s.ListKeyrings(ctx, &kmspb.ListKeyringsRequest{Vault: vault})
	})
	if err != nil {
		return nil, err
	}
	return convert(r.GetKeyrings(), keyringFrom), nil
}

// RewrapKey moves every data key of a master key to its current version and
// calls progress as it goes. One that was stopped goes on where it was.
func (a *Admin) RewrapKey(ctx context.Context, vault, name string, progress func(Progress)) (Progress, error) {
	op := fmt.Sprintf("rewrap key %s/%s", vault, name)
	var last Progress
	err := follow(ctx, a, op, func(ctx context.Context, s kmspb.AdminClient) (grpc.ServerStreamingClient[kmspb.RewrapProgress], error) {
		return s.RewrapKey(ctx, &kmspb.RewrapKeyRequest{Vault: vault, Name: name})
	}, func(p *kmspb.RewrapProgress) error {
		last = Progress{Done: int(p.GetDone()), Total: int(p.GetTotal())}
		if progress != nil {
			progress(last)
		}
		return nil
	})
	return last, err
}

// Backup writes one sealed, consistent file to w and returns its size in bytes.
// On an error what was written is incomplete and must be discarded.
func (a *Admin) Backup(ctx context.Context, w io.Writer) (int64, error) {
	return copyChunks(ctx, a, "backup", w, func(ctx context.Context, s kmspb.AdminClient) (grpc.ServerStreamingClient[kmspb.Chunk], error) {
		return s.Backup(ctx, &kmspb.BackupRequest{})
	})
}

// ExportAudit writes a tar archive of the audit log to w, for verification
// offline, and returns its size in bytes.
func (a *Admin) ExportAudit(ctx context.Context, w io.Writer) (int64, error) {
	return copyChunks(ctx, a, "export audit log", w, func(ctx context.Context, s kmspb.AdminClient) (grpc.ServerStreamingClient[kmspb.Chunk], error) {
		return s.ExportAudit(ctx, &kmspb.ExportAuditRequest{})
	})
}

// ReadAudit calls f with the records of the filter, newest last. With Follow
// it goes on until ctx ends or f fails.
func (a *Admin) ReadAudit(ctx context.Context, filter AuditFilter, f func(AuditRecord) error) error {
	limit, err := fitUint32("limit", filter.Limit)
	if err != nil {
		return err
	}
	req := &kmspb.ReadAuditRequest{
		AfterUnix: unixSeconds(filter.After), BeforeUnix: unixSeconds(filter.Before), Principal: filter.Principal,
		Operation: filter.Operation, Object: filter.Object, FromSequence: filter.FromSequence, Limit: limit, Follow: filter.Follow,
	}
	return follow(ctx, a, "read audit log", func(ctx context.Context, s kmspb.AdminClient) (grpc.ServerStreamingClient[kmspb.AuditRecord], error) {
		return s.ReadAudit(ctx, req)
	}, func(r *kmspb.AuditRecord) error {
		return f(AuditRecord{Sequence: r.GetSequence(), Line: r.GetLine()})
	})
}

// follow reads a stream to its end.
func follow[M any](ctx context.Context, a *Admin, op string, open func(context.Context, kmspb.AdminClient) (grpc.ServerStreamingClient[M], error), f func(*M) error) error {
	s, at, done, err := streamOnce(ctx, a.c, op, func(ctx context.Context, cc grpc.ClientConnInterface) (grpc.ServerStreamingClient[M], error) {
		return open(ctx, kmspb.NewAdminClient(cc))
	})
	if err != nil {
		return err
	}
	defer done()
	for {
		m, err := s.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return decodeError(ctx, op, at, err)
		}
		if err := f(m); err != nil {
			return err
		}
	}
}

func copyChunks(ctx context.Context, a *Admin, op string, w io.Writer, open func(context.Context, kmspb.AdminClient) (grpc.ServerStreamingClient[kmspb.Chunk], error)) (int64, error) {
	var size int64
	err := follow(ctx, a, op, open, func(c *kmspb.Chunk) error {
		n, err := w.Write(c.GetData())
		size += int64(n)
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		return nil
	})
	return size, err
}

func fitUint32(field string, n int) (uint32, error) {
	if n < 0 || int64(n) > math.MaxUint32 {
		return 0, fmt.Errorf("%w: %s %d", dek.ErrInvalid, field, n)
	}
	return uint32(n), nil
}

// seconds rounds a lifetime up to the wire's unit.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
