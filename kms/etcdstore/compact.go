package etcdstore

import (
	"context"
	"errors"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// noteRevision wakes the compactor when enough history has gathered. External
// etcds have their own rule (--auto-compaction-*).
func (s *Store) noteRevision(rev int64) {
	if s.member == nil || rev-s.compacted.Load() < 2*s.cfg.Keep {
		return
	}
	select {
	case s.compact <- rev:
	default: // one is waiting
	}
}

// compactor forgets history older than Keep revisions until the store ends.
func (s *Store) compactor() {
	for {
		select {
		case <-s.life.Done():
			return
		case rev := <-s.compact:
			if err := s.compactTo(s.life, rev-s.cfg.Keep); err != nil && s.life.Err() == nil {
				s.cfg.Logger.Warn("store: compaction failed, will be tried again", "err", err)
			}
		}
	}
}

// Compact forgets all history, so that values deleted or replaced before the
// call leave the database (the freed pages are overwritten in time; a file
// system may keep copies). Watches that lag behind get dek.ErrConflict.
func (s *Store) Compact(ctx context.Context) error {
	ctx, cancel := s.bind(ctx)
	defer cancel()
	resp, err := s.client.Get(ctx, s.cfg.Prefix, clientv3.WithCountOnly())
	if err != nil {
		return s.classify(ctx, "compact", err)
	}
	return s.compactTo(ctx, resp.Header.Revision, clientv3.WithCompactPhysical())
}

func (s *Store) compactTo(ctx context.Context, rev int64, opts ...clientv3.CompactOption) error {
	if rev <= 1 || rev <= s.compacted.Load() {
		return nil
	}
	s.loads.Lock()
	defer s.loads.Unlock()
	_, err := s.client.Compact(ctx, rev, opts...)
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return s.classify(ctx, "compact", err)
	}
	s.compacted.Store(rev)
	return nil
}

// reclaim runs at start: history that a killed process left is forgotten, and
// a member that stopped writing at its quota may write again once there is
// room (an alarm of etcd stays until it is disarmed).
func (s *Store) reclaim(ctx context.Context) error {
	resp, err := s.client.Get(ctx, s.cfg.Prefix, clientv3.WithCountOnly())
	if err != nil {
		return s.classify(ctx, "open", err)
	}
	s.noteRevision(resp.Header.Revision)
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return s.classify(ctx, "open", err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm != etcdserverpb.AlarmType_NOSPACE {
			return corrupt(s.cfg.Dir, "etcd raised the alarm %v", a.Alarm)
		}
		if err := s.disarm(ctx, resp.Header.Revision, a); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) disarm(ctx context.Context, rev int64, a *etcdserverpb.AlarmMember) error {
	if err := s.compactTo(ctx, rev, clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	if _, err := s.client.Defragment(ctx, memberName); err != nil {
		return s.classify(ctx, "open", err)
	}
	if used := s.member.server.Backend().Size(); used > s.cfg.QuotaBytes*9/10 {
		s.cfg.Logger.Error("store: the database is at its quota: writes are refused until it is raised", "bytes", used, "quota", s.cfg.QuotaBytes)
		return nil
	}
	_, err := s.client.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a))
	return s.classify(ctx, "open", err)
}
