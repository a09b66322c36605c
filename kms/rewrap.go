package kms

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/keyward/keyward/dek"
)

// rewrapChunk is how many wrapped DEKs one transaction moves.
const rewrapChunk = 32

// A wrapRef names one wrapped DEK to be moved.
type wrapRef struct {
	ring string
	n    dek.Version
	old  *ringVersionRecord
}

// RewrapKey moves every wrapped DEK under older versions of a master key to
// its current version: token decrypt, encrypt in software, proven by the token,
// compare-and-swap. No data is touched. progress (may be nil) is called after
// each transaction. What is moved already is skipped, so that it may be stopped
// by ctx and run again. It returns how many were moved and wraps
// dek.ErrDenied, dek.ErrNotFound, dek.ErrInvalid, dek.ErrPrecondition (the
// version to move from is disabled: enable it first), dek.ErrUnavailable.
func (s *Service) RewrapKey(ctx context.Context, c Caller, vault, name string, progress func(done, total int)) (int, error) {
	moved := 0
	input := errors.Join(dek.CheckName("vault", vault), dek.CheckName("key", name))
	err := s.do(ctx, c, OpKeyRewrap, keyScope(vault, name), input, func(a *act) error {
		unlock, err := s.work.lock(ctx, "rewrap/"+vault+"/"+name)
		if err != nil {
			return err
		}
		defer unlock()
		moved, err = s.rewrap(ctx, a, dek.MasterID{Vault: vault, Key: name}, progress)
		a.ev.Count = moved
		return err
	})
	return moved, err
}

func (s *Service) rewrap(ctx context.Context, a *act, m dek.MasterID, progress func(done, total int)) (int, error) {
	v := s.view.Load()
	k := v.key(m.Vault, m.Key)
	if k == nil {
		return 0, fmt.Errorf("key %s/%s: %w", m.Vault, m.Key, dek.ErrNotFound)
	}
	if m.Version = k.current(); m.Version == 0 {
		return 0, fmt.Errorf("%w: key %s/%s has no enabled version", dek.ErrPrecondition, m.Vault, m.Key)
	}
	a.ev.Version = m.Version
	todo, total := v.wrapsToMove(m)
	if progress != nil {
		progress(total-len(todo), total)
	}
	moved, stale := 0, make(map[string]bool)
	defer func() {
		s.hub.tell(s.view.Load(), m.Vault, slices.Sorted(maps.Keys(stale)), NoticeRewrapped)
	}()
	for chunk := range slices.Chunk(todo, rewrapChunk) {
		if err := ctx.Err(); err != nil {
			return moved, fmt.Errorf("%w: stopped after %d of %d: %w", dek.ErrUnavailable, moved, len(todo), err)
		}
		ch, err := s.rewrapSome(ctx, m, chunk)
		if err != nil {
			return moved, fmt.Errorf("after %d of %d: %w", moved, len(todo), err)
		}
		a.change = ch
		moved += len(chunk)
		for _, ref := range chunk {
			stale[ref.ring] = true
		}
		if progress != nil {
			progress(total-len(todo)+moved, total)
		}
	}
	return moved, nil
}

// wrapsToMove lists the wraps of m's key that are not for version m.Version.
func (v *view) wrapsToMove(m dek.MasterID) (todo []wrapRef, total int) {
	for _, e := range sorted(&v.rings, m.Vault+"/") {
		if e.value.rec.MasterKey != m.Key {
			continue
		}
		for i, r := range e.value.versions {
			if r.State != Enabled && r.State != Disabled {
				continue
			}
			total++
			if r.Master != m.Version {
				todo = append(todo, wrapRef{e.key[len(m.Vault)+1:], dek.Version(i + 1), r})
			}
		}
	}
	return todo, total
}

// rewrapSome moves one chunk.
func (s *Service) rewrapSome(ctx context.Context, m dek.MasterID, refs []wrapRef) (change, error) {
	wrapped := make([][]byte, len(refs))
	for i, ref := range refs {
		var err error
		if wrapped[i], err = s.rewrapOne(ctx, m, ref); err != nil {
			return change{}, fmt.Errorf("keyring %s/%s/%d: %w", m.Vault, ref.ring, ref.n, err)
		}
	}
	return s.update(ctx, func(v *view) ([]mut, error) {
		var muts []mut
		for i, ref := range refs {
			rec := v.ring(m.Vault, ref.ring).version(ref.n)
			if string(rec.Wrapped) != string(ref.old.Wrapped) {
				continue // moved by someone else
			}
			next := *rec // its state may have changed meanwhile: that stays
			next.Wrapped, next.Master = wrapped[i], m.Version
			muts = append(muts, mut{versionPath(ringPath(m.Vault, ref.ring), ref.n), &next})
		}
		return muts, nil
	})
}

// rewrapOne returns the new wrap of one DEK, proven.
func (s *Service) rewrapOne(ctx context.Context, m dek.MasterID, ref wrapRef) ([]byte, error) {
	v := s.view.Load()
	if from := v.key(m.Vault, m.Key).version(ref.old.Master); from == nil || from.State != Enabled {
		return nil, fmt.Errorf("%w: it is wrapped for version %d of key %s/%s, which is not enabled; enable it first", dek.ErrPrecondition, ref.old.Master, m.Vault, m.Key)
	}
	w, err := dek.ParseWrapped(ref.old.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("%w: stored wrap: %w", dek.ErrCorrupt, err)
	}
	k, err := s.openWrapped(ctx, v, w)
	if err != nil {
		return nil, err
	}
	defer k.Destroy()
	moved, err := s.wrap(ctx, w.ID(), m, k)
	if err != nil {
		return nil, err
	}
	return moved.Bytes(), s.proveRing(ctx, &ringVersionRecord{Wrapped: moved.Bytes()}, k)
}
