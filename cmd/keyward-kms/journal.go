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

// Read implements rpc.AuditLog.
func (j journal) Read(ctx context.Context, q rpc.AuditQuery, f func(seq uint64, line []byte) error) error {
	filter := audit.Filter{From: q.From, Since: q.After, Till: q.Before, Principal: q.Principal,
		Operation: kms.Operation(q.Operation), Object: q.Object}
	next, err := j.newest(ctx, filter, q.Limit, f)
	if err != nil || !q.Follow {
		return err
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil // the reader went away
		case <-tick.C:
		}
		if j.log.Size() < next {
			continue
		}
		filter.From = next
		for r, err := range j.log.Records(ctx, filter) {
			if err != nil {
				return err
			}
			if err := f(r.Seq, r.Bytes); err != nil {
				return err
			}
		}
		next = max(next, j.log.Size()+1)
	}
}

// newest sends the newest records that match, oldest of them first, and
// returns the sequence to go on from.
func (j journal) newest(ctx context.Context, filter audit.Filter, limit int, f func(uint64, []byte) error) (uint64, error) {
	if limit <= 0 {
		limit = defaultRecords
	}
	filter.To = j.log.Size()
	ring := make([]audit.Record, 0, min(limit, defaultRecords))
	at := 0
	for r, err := range j.log.Records(ctx, filter) {
		if err != nil {
			return 0, err
		}
		if len(ring) < limit {
			ring = append(ring, r)
			continue
		}
		ring[at] = r
		at = (at + 1) % limit
	}
	for i := range ring {
		r := ring[(at+i)%len(ring)]
		if err := f(r.Seq, r.Bytes); err != nil {
			return 0, err
		}
	}
	return filter.To + 1, nil
}

// Export implements rpc.AuditLog.
func (j journal) Export(ctx context.Context, w io.Writer) error { return j.log.Export(ctx, w) }
