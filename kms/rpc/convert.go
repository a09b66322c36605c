package rpc

import (
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/kmspb"
)

// toUnix turns the zero time into 0, which the wire reads as "never".
func toUnix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// fromUnix is the inverse of toUnix.
func fromUnix(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(n, 0).UTC()
}

func each[A, B any](list []A, f func(A) B) []B {
	out := make([]B, len(list))
	for i := range list {
		out[i] = f(list[i])
	}
	return out
}

func stateText(s kms.State) string {
	switch s {
	case kms.Pending:
		return "pending"
	case kms.Enabled:
		return "enabled"
	case kms.Disabled:
		return "disabled"
	case kms.Failed:
		return "failed"
	case kms.Destroyed:
		return "destroyed"
	}
	return ""
}

func vaultPB(v kms.Vault) *kmspb.Vault {
	return &kmspb.Vault{Name: v.Name, CreatedUnix: toUnix(v.Created), SealVersion: uint32(v.SealVersion)}
}

func masterKeyPB(k kms.MasterKey) *kmspb.MasterKey {
	return &kmspb.MasterKey{
		Vault: k.Vault, Name: k.Name, Bits: uint32(k.Bits), Current: uint32(k.Current), //nolint:gosec // 2048 to 4096
		Versions: each(k.Versions, func(v kms.MasterVersion) *kmspb.MasterVersion {
			return &kmspb.MasterVersion{
				Version: uint32(v.Version), State: stateText(v.State), Object: v.Object[:],
				CreatedUnix: toUnix(v.Created), Spki: v.SPKI,
			}
		}),
	}
}

func keyringPB(k kms.Keyring) *kmspb.Keyring {
	return &kmspb.Keyring{
		Vault: k.Vault, Name: k.Name, MasterKey: k.MasterKey, ServerKey: k.ServerKey, Current: uint32(k.Current),
		Versions: each(k.Versions, func(v kms.KeyringVersion) *kmspb.KeyringVersion {
			return &kmspb.KeyringVersion{
				Version: uint32(v.Version), ServerVersion: v.ServerVersion, State: stateText(v.State),
				CreatedUnix: toUnix(v.Created), Master: uint32(v.Master), Wrapped: v.Wrapped,
			}
		}),
	}
}

func instancePB(i kms.Instance) *kmspb.Instance {
	return &kmspb.Instance{
		Name: i.Name, Kind: i.Kind, Vault: i.Vault, Keyrings: i.Keyrings, Principal: i.Principal,
		PreparedUnix: toUnix(i.Prepared), EnrolledUnix: toUnix(i.Enrolled), Connected: i.Connected, LastSeenUnix: toUnix(i.LastSeen),
		Usage: each(i.Usage, func(u kms.Usage) *kmspb.Usage {
			return &kmspb.Usage{Keyring: u.Keyring, Version: uint32(u.Version), LastUnix: toUnix(u.Last)}
		}),
	}
}

func effectPB(e kms.Effect) *kmspb.Effect {
	return &kmspb.Effect{Notified: e.Notified, Absent: e.Absent}
}

func grantPB(g kms.Grant) *kmspb.Grant {
	return &kmspb.Grant{Principal: g.Principal, Role: g.Role, Scope: g.Scope, By: g.By, AtUnix: toUnix(g.At)}
}

// tokenPB completes a token with the way back to this service.
func (s *Server) tokenPB(t *kms.EnrolmentToken) *kmspb.EnrolmentToken {
	fingerprint := s.config.Identities.Fingerprint()
	return &kmspb.EnrolmentToken{
		Principal: t.Principal, ExpiresUnix: toUnix(t.Expires), Text: t.Text.Reveal(),
		CaSha256: fingerprint[:], Endpoints: s.config.Endpoints,
	}
}

func statusPB(s kms.Status) *kmspb.Status {
	return &kmspb.Status{
		Token: s.Token, TokenHealthy: s.TokenHealthy, OaepHash: s.OAEPHash, Recovery: s.Recovery,
		BackupTarget: s.BackupTarget, LastBackupUnix: toUnix(s.LastBackup), Changes: s.Changes, AuditSize: s.AuditSize,
		Quarantined: each(s.Quarantined, func(id dek.ObjectID) []byte { return id[:] }),
		Problems: each(s.Problems, func(p kms.Problem) *kmspb.Problem {
			return &kmspb.Problem{Severity: p.Severity, Text: p.Text, Remedy: p.Remedy}
		}),
		Instances: each(s.Instances, instancePB),
	}
}

func noticePB(n kms.Notice) *kmspb.Notice {
	kinds := map[kms.NoticeKind]kmspb.Notice_Kind{
		kms.NoticePing:      kmspb.Notice_KIND_PING,
		kms.NoticeRolled:    kmspb.Notice_KIND_ROLLED,
		kms.NoticeDisabled:  kmspb.Notice_KIND_DISABLED,
		kms.NoticeEnabled:   kmspb.Notice_KIND_ENABLED,
		kms.NoticeRewrapped: kmspb.Notice_KIND_REWRAPPED,
		kms.NoticeRevoked:   kmspb.Notice_KIND_REVOKED,
	}
	return &kmspb.Notice{Kind: kinds[n.Kind], Keyring: n.Keyring, Generation: n.Generation, Checkpoint: n.Checkpoint}
}
