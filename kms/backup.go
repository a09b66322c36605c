package kms

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// Backup writes one sealed, consistent file (FORMAT.md, "Backup") to w: every
// record of one state, verified, and the newest audit checkpoint. Nothing in
// it opens without the root of this token or the recovery shares. It wraps
// dek.ErrDenied, dek.ErrCorrupt (the store does not match), or
// dek.ErrUnavailable. A file that ends early is refused by Restore.
func (s *Service) Backup(ctx context.Context, c Caller, w io.Writer) error {
	return s.do(ctx, c, OpBackup, "/", nil, func(a *act) error {
		n, err := s.writeBackup(ctx, w)
		if err != nil {
			return err
		}
		a.ev.Note = fmt.Sprintf("state of change %d", n)
		return s.saver.made(ctx, s, n)
	})
}

// writeBackup writes the state of the store and returns its change number.
func (s *Service) writeBackup(ctx context.Context, w io.Writer) (uint64, error) {
	s.mu.Lock()
	sealer := *s.w.sealer
	sealer.keys = maps.Clone(sealer.keys)
	s.w.sealer.used++ // the backup's own key is sealed once under it
	s.mu.Unlock()
	at := s.view.Load()
	records, head, err := s.readConsistent(ctx, &sealer, at)
	if err != nil {
		return 0, fmt.Errorf("backup: %w", err)
	}
	checkpoint, err := s.audit.Head(ctx)
	if err != nil {
		return 0, fmt.Errorf("backup: audit checkpoint: %w", classed(err))
	}
	boot, err := parseBoot(records)
	if err != nil {
		return 0, err
	}
	seal := boot.Seals[len(boot.Seals)-1]
	h := backupHeader{
		change: head.Change, created: s.cfg.Clock.Now().Unix(), root: dek.ObjectID(boot.Root), seal: seal.Version,
		installation: boot.Installation, token: s.cfg.Token.Describe(), recipient: at.system.Recipient,
		sealed: seal.Sealed, recovery: seal.Recovery,
	}
	key := sealer.keys[seal.Version]
	if key == nil {
		return 0, fmt.Errorf("%w: the system seal key was rolled meanwhile", dek.ErrConflict)
	}
	return head.Change, encodeBackup(w, h, key, records, checkpoint)
}

// readConsistent reads every record of one revision and compares the whole
// with the digest in the head.
func (s *Service) readConsistent(ctx context.Context, sealer *sealer, at *view) (map[string]Record, headRecord, error) {
	l := &loaded{records: make(map[string]Record), w: &writer{sealer: sealer, index: make(map[string]located)}}
	if _, err := s.cfg.Store.Load(ctx, func(r Record) error {
		l.records[r.Path] = r
		return nil
	}); err != nil {
		return nil, headRecord{}, fmt.Errorf("store: %w", err)
	}
	boot, err := parseBoot(l.records)
	if err != nil {
		return nil, headRecord{}, err
	}
	if err := l.openHead(); err != nil {
		return nil, headRecord{}, err
	}
	var digest sum
	for path, r := range l.records {
		n := boot.Change
		switch {
		case path == pathHead:
			continue
		case path == pathBoot:
		case len(r.Value) < recordHead:
			return nil, headRecord{}, fmt.Errorf("%w: record %q was changed", dek.ErrCorrupt, path)
		default:
			n = binary.BigEndian.Uint64(r.Value[5:])
		}
		digest = digest.add(sealer.term(path, n, r.Value))
	}
	if l.w.head.Change < at.change || !bytes.Equal(digest.bytes(), l.w.head.Digest) {
		return nil, headRecord{}, fmt.Errorf("%w: the store does not hold the state that was written", dek.ErrCorrupt)
	}
	return l.records, l.w.head, nil
}

// backupPause is how long changes that need no backup before they hold may
// wait for one.
const backupPause = 10 * time.Minute

// lastBackupStep is how much newer a backup is before the record says so.
const lastBackupStep = time.Hour

// A saver brings backups to the target. Callers at the same time share one.
type saver struct {
	busy   keyedMutex // one backup at a time
	mu     sync.Mutex
	change uint64 // newest state in the target
	tried  time.Time
	at     time.Time
	err    error
}

// save returns when the target holds the state as it is now.
func (b *saver) save(ctx context.Context, s *Service) error {
	if s.cfg.Backups == nil {
		return nil
	}
	need := s.view.Load().change
	unlock, err := b.busy.lock(ctx, "backup")
	if err != nil {
		return err
	}
	defer unlock()
	b.mu.Lock()
	done := b.change >= need
	b.tried = s.cfg.Clock.Now()
	b.mu.Unlock()
	if done {
		return nil
	}
	n, err := s.putBackup(ctx)
	b.mu.Lock()
	b.err = err
	b.mu.Unlock()
	if err != nil {
		return err
	}
	return b.made(ctx, s, n)
}

// putBackup streams one backup into the target, under the name of the day.
func (s *Service) putBackup(ctx context.Context) (uint64, error) {
	r, w := io.Pipe()
	type written struct {
		n   uint64
		err error
	}
	done := make(chan written, 1)
	go func() {
		n, err := s.writeBackup(ctx, w)
		w.CloseWithError(err) // nil: end of file
		done <- written{n, err}
	}()
	name := "keyward-" + s.cfg.Clock.Now().UTC().Format(time.DateOnly) + ".backup"
	err := s.cfg.Backups.Put(ctx, name, r)
	r.CloseWithError(errors.Join(err, io.ErrClosedPipe))
	wr := <-done
	switch {
	case wr.err != nil && !errors.Is(wr.err, io.ErrClosedPipe):
		return 0, wr.err
	case err != nil:
		return 0, fmt.Errorf("backup target: %w", classed(err))
	case wr.err != nil:
		return 0, fmt.Errorf("%w: the backup target did not read to the end", dek.ErrUnavailable)
	}
	return wr.n, nil
}

// made notes a backup of state n.
func (b *saver) made(ctx context.Context, s *Service, n uint64) error {
	now := s.now()
	b.mu.Lock()
	b.change, b.at = max(b.change, n), now
	b.mu.Unlock()
	// Bookkeeping: no record names this change, so that a backup is not older
	// than the log because it was made.
	ch, err := s.keepBooks(ctx, func(v *view) ([]mut, error) {
		if now.Sub(v.system.LastBackup) < lastBackupStep {
			return nil, nil
		}
		next := v.system
		next.LastBackup = now
		return []mut{{pathSystem, &next}}, nil
	})
	if err != nil || ch.n == 0 {
		return err
	}
	b.mu.Lock()
	if b.change == ch.n-1 { // nothing else is newer than the backup
		b.change = ch.n
	}
	b.mu.Unlock()
	return nil
}

// catchUp brings changes that did not wait for a backup to the target.
func (b *saver) catchUp(ctx context.Context, s *Service) error {
	b.mu.Lock()
	wait := s.cfg.Clock.Now().Sub(b.tried)
	due := s.view.Load().change > b.change && (b.err != nil || wait >= backupPause || wait < 0)
	b.mu.Unlock()
	if s.cfg.Backups == nil || !due {
		return nil
	}
	return b.save(ctx, s)
}

func (b *saver) last(stored time.Time) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at.After(stored) {
		return b.at
	}
	return stored
}

func (b *saver) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// sortedPaths are the paths of records in the order of the file.
func sortedPaths(records map[string]Record) []string { return slices.Sorted(maps.Keys(records)) }
