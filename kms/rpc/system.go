package rpc

import (
	"context"

	"google.golang.org/grpc"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/kmspb"
)

func (a *adminServer) GetStatus(ctx context.Context, _ *kmspb.GetStatusRequest) (*kmspb.Status, error) {
	st, err := a.server.backend.System.Status(ctx, callerOf(ctx))
	return converted(st, err, statusPB)
}

// A chunks cuts what is written to it into messages.
type chunks struct {
	stream grpc.ServerStreamingServer[kmspb.Chunk]
}

// Write implements io.Writer.
func (c chunks) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := p[:min(len(p), chunkBytes)]
		if err := c.stream.Send(&kmspb.Chunk{Data: piece}); err != nil {
			return n, err
		}
		n, p = n+len(piece), p[len(piece):]
	}
	return n, nil
}

// Backup streams one sealed file. A stream that ends without an error is whole.
func (a *adminServer) Backup(_ *kmspb.BackupRequest, stream grpc.ServerStreamingServer[kmspb.Chunk]) error {
	ctx := stream.Context()
	return a.server.backend.System.Backup(ctx, callerOf(ctx), chunks{stream})
}

// ReadAudit streams records as they stand in the log.
func (a *adminServer) ReadAudit(r *kmspb.ReadAuditRequest, stream grpc.ServerStreamingServer[kmspb.AuditRecord]) error {
	q, err := auditQuery(r)
	if err != nil {
		return err
	}
	ctx := stream.Context()
	if err := a.authorizeAudit(ctx); err != nil {
		return err
	}
	return a.server.config.AuditLog.Read(ctx, q, func(seq uint64, line []byte) error {
		return stream.Send(&kmspb.AuditRecord{Sequence: seq, Line: line})
	})
}

// authorizeAudit: the log is one for the whole installation.
func (a *adminServer) authorizeAudit(ctx context.Context) error {
	return a.server.backend.System.AuthorizeAudit(ctx, callerOf(ctx), kms.OpAuditRead, "/")
}

func auditQuery(r *kmspb.ReadAuditRequest) (AuditQuery, error) {
	if r.GetLimit() > maxRecords {
		return AuditQuery{}, invalid("limit %d: want at most %d (0 is 1000); export the log for more", r.GetLimit(), maxRecords)
	}
	if err := first(secondsField("after_unix", r.GetAfterUnix()), secondsField("before_unix", r.GetBeforeUnix()),
		wordField("principal", r.GetPrincipal()), wordField("operation", r.GetOperation()), wordField("object", r.GetObject())); err != nil {
		return AuditQuery{}, err
	}
	limit := int(r.GetLimit())
	if limit == 0 {
		limit = 1000
	}
	return AuditQuery{
		After: fromUnix(r.GetAfterUnix()), Before: fromUnix(r.GetBeforeUnix()), Principal: r.GetPrincipal(),
		Operation: r.GetOperation(), Object: r.GetObject(), From: r.GetFromSequence(), Limit: limit, Follow: r.GetFollow(),
	}, nil
}

// ExportAudit streams the log's files.
func (a *adminServer) ExportAudit(_ *kmspb.ExportAuditRequest, stream grpc.ServerStreamingServer[kmspb.Chunk]) error {
	ctx := stream.Context()
	if err := a.authorizeAudit(ctx); err != nil {
		return err
	}
	return a.server.config.AuditLog.Export(ctx, chunks{stream})
}
