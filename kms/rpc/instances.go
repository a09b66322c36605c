package rpc

import (
	"context"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/identity"
	"github.com/keyward/keyward/kms/kmspb"
)

// An instanceServer answers database hosts.
type instanceServer struct {
	kmspb.UnimplementedInstancesServer
	server *Server
}

// Renew certifies a new key for the caller's own name.
func (i *instanceServer) Renew(ctx context.Context, r *kmspb.RenewRequest) (*kmspb.EnrollResponse, error) {
	s := i.server
	if err := first(s.config.Identities.CheckRequest(r.GetCsr())); err != nil {
		return nil, err
	}
	var issued *identity.Issued
	err := s.backend.Enrolments.Renew(ctx, callerOf(ctx), func(principal string) (err error) {
		issued, err = s.config.Identities.IssueClient(principal, r.GetCsr())
		return err
	})
	return issuedPB(issued, err)
}

// Open authorises a database start.
func (i *instanceServer) Open(ctx context.Context, r *kmspb.OpenRequest) (*kmspb.OpenResponse, error) {
	if err := first(named("instance", r.GetInstance()), checkpointField(r.GetCheckpoint())); err != nil {
		return nil, err
	}
	v, err := i.server.backend.Instances.OpenInstance(ctx, callerOf(ctx), kms.OpenInstance{
		Instance: r.GetInstance(), Cold: r.GetCold(), Checkpoint: r.GetCheckpoint(),
	})
	if err != nil {
		return nil, err
	}
	return &kmspb.OpenResponse{
		Instance: instancePB(v.Instance), Keyrings: each(v.Keyrings, keyringPB),
		Generation: v.Generation, Checkpoint: v.Checkpoint,
	}, nil
}

// Watch streams notices until the client or the service ends it.
func (i *instanceServer) Watch(r *kmspb.WatchRequest, stream grpc.ServerStreamingServer[kmspb.Notice]) error {
	if err := first(named("instance", r.GetInstance())); err != nil {
		return err
	}
	ctx := stream.Context()
	return i.server.backend.Instances.WatchInstance(ctx, callerOf(ctx), r.GetInstance(), func(n kms.Notice) error {
		return stream.Send(noticePB(n))
	})
}

// Report keeps which versions a database asked for.
func (i *instanceServer) Report(ctx context.Context, r *kmspb.ReportRequest) (*kmspb.ReportResponse, error) {
	usage, err := usageField(r.GetUsage())
	if err := first(named("instance", r.GetInstance()), err); err != nil {
		return nil, err
	}
	if err := i.server.backend.Instances.ReportUsage(ctx, callerOf(ctx), r.GetInstance(), usage); err != nil {
		return nil, err
	}
	return &kmspb.ReportResponse{}, nil
}

func usageField(list []*kmspb.Usage) ([]kms.Usage, error) {
	if len(list) > maxUsage {
		return nil, invalid("usage: %d entries, want at most %d", len(list), maxUsage)
	}
	usage := make([]kms.Usage, 0, len(list))
	for _, u := range list {
		if u.GetVersion() == 0 {
			return nil, invalid("usage of keyring %.80q: version 0 names no version", u.GetKeyring())
		}
		if err := first(named("keyring", u.GetKeyring()), secondsField("last_unix", u.GetLastUnix())); err != nil {
			return nil, err
		}
		usage = append(usage, kms.Usage{Keyring: u.GetKeyring(), Version: dek.Version(u.GetVersion()), Last: fromUnix(u.GetLastUnix())})
	}
	return usage, nil
}
