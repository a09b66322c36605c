// Package etcdstore keeps the records of the key service in etcd: an embedded
// single member that opens no port, or external endpoints, with the same code.
//
// It promises durability and order, nothing about content: records are sealed
// by the layer above, which alone can tell whether a byte was changed. What it
// refuses: to start on a directory that others can read, on a write-ahead log
// that etcd had to cut, and on a database whose structure is damaged.
package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// loadPage bounds how many records Load holds in memory at once.
const loadPage = 1000

// A Store keeps records in etcd. It implements kms.Store; all methods may be
// called concurrently.
type Store struct {
	cfg    Config
	client *clientv3.Client
	member *member // nil with external endpoints

	life context.Context // ends, with a cause, when the store can't go on
	end  context.CancelCauseFunc

	fatalOnce sync.Once

	loads     sync.RWMutex // held for reading by Load, for writing by a compaction
	compacted atomic.Int64 // newest revision compaction was asked for
	compact   chan int64   // capacity 1: the newest revision seen
	wg        sync.WaitGroup
}

var _ kms.Store = (*Store)(nil)

// Open opens the store of cfg and waits until it serves. Errors wrap
// dek.ErrInvalid (configuration, mode of the directory), dek.ErrCorrupt
// (damaged files: the text names the directory and the way on),
// dek.ErrPrecondition (another process has the directory open), dek.ErrExhausted
// (no space) or dek.ErrUnavailable (external etcd not reachable).
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	s := &Store{cfg: cfg, compact: make(chan int64, 1)}
	s.life, s.end = context.WithCancelCause(context.Background())
	ctx, cancel := context.WithTimeout(ctx, cfg.ReadyTimeout)
	defer cancel()
	if cfg.Dir != "" {
		err = s.openEmbedded(ctx)
	} else {
		err = s.openRemote(ctx)
	}
	if err != nil {
		s.end(err)
		return nil, err
	}
	return s, nil
}

// Close stops the embedded member or the connections. Calls under way fail
// with dek.ErrUnavailable. What was acknowledged is on disk with or without it.
func (s *Store) Close() error {
	err := context.Cause(s.life)
	s.end(fmt.Errorf("%w: store is closed", dek.ErrUnavailable))
	s.wg.Wait()
	if s.member != nil {
		if err != nil { // it stands still; stopping it would wait for ever
			return nil
		}
		s.member.close()
	}
	if cerr := s.client.Close(); cerr != nil && !errors.Is(cerr, context.Canceled) {
		return fmt.Errorf("close store: %w", cerr)
	}
	return nil
}

// bind ends ctx also when the store can't go on.
func (s *Store) bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(context.Cause(s.life)) })
	return ctx, func() { stop(); cancel(nil) }
}

// Load implements kms.Store. It reads in pages of one revision; an error of f
// ends it. dek.ErrUnavailable: read again from the start.
func (s *Store) Load(ctx context.Context, f func(kms.Record) error) (int64, error) {
	s.loads.RLock() // the revision being read must not be compacted under us
	defer s.loads.RUnlock()
	ctx, cancel := s.bind(ctx)
	defer cancel()

	end := clientv3.GetPrefixRangeEnd(s.cfg.Prefix)
	key, rev := s.cfg.Prefix, int64(0)
	for {
		resp, err := s.client.Get(ctx, key, clientv3.WithRange(end), clientv3.WithRev(rev), clientv3.WithLimit(loadPage))
		if err != nil {
			return 0, s.classify(ctx, "load", err)
		}
		rev = max(rev, resp.Header.Revision)
		if key != s.cfg.Prefix { // pages after the first name the revision of the first
			rev = max(rev, 1)
		}
		for _, kv := range resp.Kvs {
			r := kms.Record{Path: strings.TrimPrefix(string(kv.Key), s.cfg.Prefix), Value: present(kv.Value), Revision: kv.ModRevision}
			if err := f(r); err != nil {
				return 0, err
			}
		}
		if !resp.More || len(resp.Kvs) == 0 {
			return rev, nil
		}
		key = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

// present makes an empty value distinct from a deleted one.
func present(v []byte) []byte {
	if v == nil {
		return []byte{}
	}
	return v
}

// Commit implements kms.Store: one transaction of at most MaxChanges changes
// and MaxBytes. Beside the classes of the interface it wraps dek.ErrInvalid
// (empty, too large, a path twice) and dek.ErrExhausted (quota reached; nothing
// happened).
func (s *Store) Commit(ctx context.Context, changes []kms.Change) (int64, error) {
	if err := checkChanges(changes); err != nil {
		return 0, err
	}
	ctx, cancel := s.bind(ctx)
	defer cancel()
	conds := make([]clientv3.Cmp, 0, len(changes))
	ops := make([]clientv3.Op, 0, len(changes))
	for _, c := range changes {
		key := s.cfg.Prefix + c.Path
		conds = append(conds, clientv3.Compare(clientv3.ModRevision(key), "=", c.Expect))
		if c.Value == nil {
			ops = append(ops, clientv3.OpDelete(key))
		} else {
			ops = append(ops, clientv3.OpPut(key, string(c.Value)))
		}
	}
	resp, err := s.client.Txn(ctx).If(conds...).Then(ops...).Commit()
	if err != nil {
		return 0, s.classify(ctx, "commit", err)
	}
	if !resp.Succeeded {
		return 0, fmt.Errorf("%w: store: a record of the transaction has another revision", dek.ErrConflict)
	}
	s.noteRevision(resp.Header.Revision)
	return resp.Header.Revision, nil
}

// checkChanges refuses what etcd would refuse late or differently.
func checkChanges(changes []kms.Change) error {
	if len(changes) == 0 || len(changes) > MaxChanges {
		return fmt.Errorf("%w: store: a transaction has 1 to %d changes, not %d", dek.ErrInvalid, MaxChanges, len(changes))
	}
	seen, size := make(map[string]struct{}, len(changes)), 0
	for _, c := range changes {
		if _, twice := seen[c.Path]; twice || c.Path == "" {
			return fmt.Errorf("%w: store: path %q is empty or twice in a transaction", dek.ErrInvalid, c.Path)
		}
		if c.Expect < 0 || c.Value == nil && c.Expect == 0 {
			return fmt.Errorf("%w: store: path %q: expected revision %d", dek.ErrInvalid, c.Path, c.Expect)
		}
		seen[c.Path] = struct{}{}
		size += len(c.Path) + len(c.Value)
	}
	if size > MaxBytes {
		return fmt.Errorf("%w: store: transaction of %d bytes is above %d", dek.ErrInvalid, size, MaxBytes)
	}
	return nil
}

// Watch implements kms.Store. It returns the error of f, ctx's error, or
// dek.ErrConflict when the history after the revision was compacted (Load
// again), or dek.ErrUnavailable (Load again or Watch from the last revision).
func (s *Store) Watch(ctx context.Context, after int64, f func([]kms.Record, int64) error) error {
	bound, cancel := s.bind(ctx)
	defer cancel()
	ch := s.client.Watch(clientv3.WithRequireLeader(bound), s.cfg.Prefix, clientv3.WithPrefix(), clientv3.WithRev(after+1))
	for resp := range ch {
		if err := resp.Err(); err != nil {
			return s.classify(bound, "watch", err)
		}
		if err := s.deliver(resp.Events, f); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.classify(bound, "watch", errors.New("stream ended"))
}

// deliver hands events to f, one call per transaction. A response never splits
// a revision (fragments are joined by the client).
func (s *Store) deliver(events []*clientv3.Event, f func([]kms.Record, int64) error) error {
	for len(events) > 0 {
		rev, n := events[0].Kv.ModRevision, 0
		var recs []kms.Record
		for ; n < len(events) && events[n].Kv.ModRevision == rev; n++ {
			r := kms.Record{Path: strings.TrimPrefix(string(events[n].Kv.Key), s.cfg.Prefix), Revision: rev}
			if events[n].Type == clientv3.EventTypePut {
				r.Value = present(events[n].Kv.Value)
			}
			recs = append(recs, r)
		}
		if err := f(recs, rev); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

// Health proves by a linearizable read that the store answers.
func (s *Store) Health(ctx context.Context) error {
	ctx, cancel := s.bind(ctx)
	defer cancel()
	_, err := s.client.Get(ctx, s.cfg.Prefix, clientv3.WithCountOnly())
	return s.classify(ctx, "health", err)
}
