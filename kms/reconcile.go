package kms

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// A watchdog keeps what the rounds of the reconciler found, for Status.
type watchdog struct {
	mu sync.Mutex
	watchdogState
	wall time.Time // of the last round, by the Clock
	mono time.Time // of the last round, by the process's own clock
}

type watchdogState struct {
	health      error
	quarantined []dek.ObjectID
	missing     []string // enabled versions without their object
	jump        string   // the last clock jump
	work        error    // of the last round
}

func (w *watchdog) init(now time.Time) { w.wall, w.mono = now, time.Now() }

func (w *watchdog) read() watchdogState {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.watchdogState
}

func (w watchdogState) problems() []Problem {
	var out []Problem
	for _, m := range w.missing {
		out = append(out, Problem{red, "the token does not hold " + m, "the token was put back in time or replaced: bring the right one back, or restore a backup with the recovery shares"})
	}
	if n := len(w.quarantined); n > 0 {
		out = append(out, Problem{yellow, fmt.Sprintf("%d objects in the token are not known to the state", n),
			"they are never destroyed: after a restore they may be the only copy of a key; look at them before you remove them by hand"})
	}
	if w.jump != "" {
		out = append(out, Problem{yellow, w.jump, "set the clock; restart the service when it is right"})
	}
	if w.work != nil {
		out = append(out, Problem{yellow, "upkeep fails: " + w.work.Error(), "it is tried again"})
	}
	return out
}

// reconcile runs until ctx ends.
func (s *Service) reconcile(ctx context.Context) {
	tick := time.NewTicker(s.cfg.limits.tick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if s.ready() != nil {
			return
		}
		if err := s.round(ctx, false); err != nil && ctx.Err() == nil {
			s.cfg.Logger.Warn("upkeep", "error", err)
		}
	}
}

// round does one round of upkeep. At start-up PENDING versions are taken over
// whatever their age: nobody else can be at work on them.
func (s *Service) round(ctx context.Context, start bool) error {
	s.checkClock(ctx)
	health := s.cfg.Token.Health(ctx)
	s.watchdog.mu.Lock()
	s.watchdog.health = health
	s.watchdog.mu.Unlock()
	errs := []error{named(health, "token")}
	if health == nil {
		errs = append(errs, s.finishPending(ctx, start), s.compareObjects(ctx))
	}
	if !start {
		errs = append(errs, s.saver.catchUp(ctx, s), s.forgetTokens(ctx))
	}
	err := errors.Join(errs...)
	s.watchdog.mu.Lock()
	s.watchdog.work = err
	s.watchdog.mu.Unlock()
	return err
}

// tokenMemory is how long an expired enrolment token is remembered, so that a
// late second use is still told from a guess.
const tokenMemory = 30 * 24 * time.Hour

// forgetTokens removes the records of tokens that expired long ago; never on a
// clock that jumped.
func (s *Service) forgetTokens(ctx context.Context) error {
	if s.watchdog.read().jump != "" {
		return nil
	}
	limit := s.now().Add(-tokenMemory)
	_, err := s.keepBooks(ctx, func(v *view) ([]mut, error) {
		var muts []mut
		for id, t := range v.tokens.all() {
			if t.Expires.Before(limit) && t.Reused.IsZero() && len(muts) < maxMuts {
				muts = append(muts, mut{prefixToken + id, nil})
			}
		}
		return muts, nil
	})
	return named(err, "forget old tokens")
}

// checkClock finds wall time that leaves the process's own clock.
func (s *Service) checkClock(ctx context.Context) {
	w := &s.watchdog
	now, mono := s.cfg.Clock.Now(), time.Now()
	w.mu.Lock()
	jump := now.Round(0).Sub(w.wall.Round(0)) - mono.Sub(w.mono)
	w.wall, w.mono = now, mono
	if jump.Abs() <= clockJump {
		w.mu.Unlock()
		return
	}
	w.jump = fmt.Sprintf("the clock jumped by %s at %s", jump.Round(time.Second), now.UTC().Format(time.RFC3339))
	note := w.jump
	w.mu.Unlock()
	s.cfg.Logger.Warn("clock jump", "by", jump)
	if err := s.recordSystem(ctx, Event{Operation: "system.clock-jump", Note: note}); err != nil {
		s.cfg.Logger.Warn("clock jump not recorded", "error", err)
	}
}

// finishPending takes PENDING versions to their end: enabled if they are
// whole, else failed.
func (s *Service) finishPending(ctx context.Context, start bool) error {
	var errs []error
	old := func(created time.Time) bool { return start || s.now().Sub(created) >= s.cfg.limits.pending }
	v := s.view.Load()
	for _, e := range sorted(&v.keys, "") {
		for i, r := range e.value.versions {
			if r.State == Pending && old(r.Created) {
				errs = append(errs, s.takeOverVersion(ctx, "keys", e.key, dek.Version(i+1)))
			}
		}
	}
	for _, e := range sorted(&v.rings, "") {
		for i, r := range e.value.versions {
			if r.State == Pending && old(r.Created) {
				errs = append(errs, s.takeOverVersion(ctx, "keyrings", e.key, dek.Version(i+1)))
			}
		}
	}
	return errors.Join(errs...)
}

// takeOverVersion finishes one PENDING version, unless a call is at work on it.
func (s *Service) takeOverVersion(ctx context.Context, kind, id string, n dek.Version) error {
	vault, name := cutID(id)
	path := kind + "/" + id
	unlock, ok := s.work.tryLock(path)
	if !ok {
		return nil
	}
	defer unlock()
	object := versionScope(kind, vault, name)
	var ch change
	var err error
	if kind == "keys" {
		ch, err = s.finishMaster(ctx, vault, name, n, false)
	} else {
		ch, err = s.finishRing(ctx, vault, name, n, nil)
	}
	if ch.n == 0 {
		return err
	}
	note := s.view.Load().versionNote(kind, vault, name, n)
	if err != nil {
		note += ": " + err.Error()
	}
	return s.recordSystem(ctx, Event{
		Operation: opFinishPending, Object: object, Version: n, Result: resultOK, Change: ch.n, State: ch.state, Note: note,
	})
}

// compareObjects finds objects the state does not know (quarantined, never
// destroyed), enabled versions whose object is gone, and what failed creations
// left behind (destroyed: the state itself recorded those ids and never enabled
// them).
func (s *Service) compareObjects(ctx context.Context) error {
	objects, err := s.cfg.Token.Objects(ctx)
	if err != nil {
		return fmt.Errorf("list the token's objects: %w", err)
	}
	there := make(map[dek.ObjectID]bool, len(objects))
	for _, o := range objects {
		there[o] = true
	}
	v := s.view.Load() // after the list: an object in it was recorded before it was made
	known := map[dek.ObjectID]State{
		dek.ObjectID(v.boot.Root): Enabled, dek.ObjectID(v.boot.Audit): Enabled, dek.ObjectID(v.boot.CA): Enabled,
	}
	var missing []string
	for _, e := range sorted(&v.keys, "") {
		for i, r := range e.value.versions {
			known[dek.ObjectID(r.Object)] = r.State
			if (r.State == Enabled || r.State == Disabled) && !there[dek.ObjectID(r.Object)] {
				missing = append(missing, fmt.Sprintf("key %s version %d", e.key, i+1))
			}
		}
	}
	var quarantined []dek.ObjectID
	var errs []error
	for _, o := range objects {
		switch state, ok := known[o]; {
		case !ok:
			quarantined = append(quarantined, o)
		case state == Failed:
			errs = append(errs, named(s.cfg.Token.DestroyPair(ctx, o), "clean up after a failed creation"))
		}
	}
	s.watchdog.mu.Lock()
	s.watchdog.missing, s.watchdog.quarantined = missing, quarantined
	s.watchdog.mu.Unlock()
	return errors.Join(errs...)
}

// fence follows the head in the store: another process that takes the store
// over ends this one's serving at once.
func (s *Service) fence(ctx context.Context) {
	for ctx.Err() == nil && s.ready() == nil {
		s.mu.Lock()
		after := s.w.revision
		s.mu.Unlock()
		err := s.cfg.Store.Watch(ctx, after, func(rs []Record, _ int64) error {
			for _, r := range rs {
				if r.Path == pathHead {
					s.lookAtHead(r)
				}
			}
			return s.ready()
		})
		if ctx.Err() != nil || s.ready() != nil {
			return
		}
		s.cfg.Logger.Warn("watch of the store ended", "error", err)
		retry := time.NewTimer(time.Second)
		select {
		case <-retry.C:
		case <-ctx.Done():
			retry.Stop()
		}
	}
}

// lookAtHead compares a head that the store showed with the one in memory.
func (s *Service) lookAtHead(r Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Revision <= s.w.headRev || s.w.unsure {
		return
	}
	plain, _, err := s.w.sealer.open(pathHead, r.Value)
	var head headRecord
	if err == nil {
		err = decodeStrict(plain, &head)
	}
	switch {
	case err != nil:
		s.halt(fmt.Errorf("%w: the head of the store was changed by someone else", dek.ErrCorrupt))
	case head.Epoch != s.w.head.Epoch:
		s.halt(fmt.Errorf("%w: another process has taken this store over; this one stops serving", dek.ErrPrecondition))
	}
}

// cutID takes "vault/name" apart.
func cutID(id string) (vault, name string) {
	for i := range id {
		if id[i] == '/' {
			return id[:i], id[i+1:]
		}
	}
	return id, ""
}
