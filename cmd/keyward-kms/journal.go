package main

import (
	"context"
	"io"
	"time"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/rpc"
)

// followEvery is how often a reader that follows looks for new records.
const followEvery = 250 * time.Millisecond

// defaultRecords is the number of records a reader gets without a limit.
const defaultRecords = 1000

// A journal serves the audit log to the front door.
type journal struct{ log *audit.Log }

// Read implements rpc.AuditLog: the newest records that match, the oldest of
// them first, then, if asked to follow, every later one that matches until ctx
// ends.
func (j journal) Read(ctx context.Context, q rpc.AuditQuery, f func(seq uint64, line []byte) error) error {
	filter := audit.Filter{From: q.From, Since: q.After, Till: q.Before, Principal: q.Principal,
		Operation: kms.Operation(q.Operation), Object: q.Object}
	limit := q.Limit
	if limit <= 0 {
		limit = defaultRecords
	}
	filter.To = max(j.log.Size(), 1) // what comes later is for those who follow
	newest, err := j.log.Last(ctx, filter, limit)
	if err != nil {
		return err
	}
	for _, r := range newest {
		if err := f(r.Seq, r.Bytes); err != nil {
			return err
		}
	}
	if !q.Follow {
		return nil
	}
	filter.From = max(q.From, filter.To+1)
	return j.follow(ctx, filter, f)
}

// follow sends the records from filter.From on.
func (j journal) follow(ctx context.Context, filter audit.Filter, f func(seq uint64, line []byte) error) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // the reader went away
		case <-tick.C:
		}
		// The end is fixed before reading: what is appended meanwhile is for the
		// next round.
		if filter.To = j.log.Size(); filter.To < filter.From {
			continue
		}
		for r, err := range j.log.Records(ctx, filter) {
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return err
			}
			if err := f(r.Seq, r.Bytes); err != nil {
				return err
			}
		}
		filter.From = filter.To + 1
	}
}

// Export implements rpc.AuditLog.
func (j journal) Export(ctx context.Context, w io.Writer) error { return j.log.Export(ctx, w) }
