package connector

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyward/keyward/dek"
)

// A depth says how much a sync asks the service about.
type depth int

const (
	syncNothing depth = iota
	syncMissing       // keys that are not held or were denied
	syncChanged       // all, if the service's generation moved; else what is missing
)

// staleTime bounds a GET that needs a key service which is known to be away.
const staleTime = time.Second

// An instance is one database on this host, as the agent sees it.
//
// Locks: turn (one sync at a time) before mu. A denial marks first and purges
// then; whoever fills the cache looks at the marks afterwards and purges again,
// so that no answer from before a denial brings a key back for good. The cache
// is never filled under mu: a load it may have to wait for takes mu itself.
type instance struct {
	name   string
	cfg    *AgentConfig
	client *Client
	cache  *dek.Cache
	log    *slog.Logger
	count  *agentCounters

	view atomic.Pointer[view]
	turn chan struct{} // holds one token while a sync runs
	kick chan struct{} // wakes the worker
	tell chan struct{} // wakes the reporter

	mu       sync.Mutex
	state    instanceState
	epoch    uint64 // moves with every denial: older answers no longer count
	stale    bool   // the service can't be reached
	since    time.Time
	expired  bool // stale for longer than the outage limit
	deniedAt time.Time
	trusted  bool  // the service of this stream has shown that it extends our checkpoint
	dirty    bool  // state differs from the file
	unsaved  error // why the file could not be written the last time
	want     depth
	lastErr  error
	usage    map[dek.KeyID]time.Time
	reported bool // usage was sent as it is
}

func newInstance(name string, a *Agent) (*instance, error) {
	state, err := loadState(a.cfg.StateDir, name)
	if err != nil {
		return nil, err
	}
	in := &instance{
		name: name, cfg: &a.cfg, client: a.client, cache: a.cache, log: a.cfg.Logger, count: &a.count,
		turn: make(chan struct{}, 1), kick: make(chan struct{}, 1), tell: make(chan struct{}, 1),
		state: state,
		usage: map[dek.KeyID]time.Time{}, reported: true,
		stale: state.Opened, since: a.cfg.Now(), deniedAt: a.cfg.Now(),
	}
	// A random start: a plugin that outlived an agent sees a new generation.
	in.view.Store(&view{generation: rand.Uint64() >> 1, changed: make(chan struct{})}) //nolint:gosec // not a secret
	in.mu.Lock()
	in.publish()
	in.mu.Unlock()
	return in, nil
}

// loadKey asks the service for one key: the way of a miss.
func (in *instance) loadKey(ctx context.Context, id dek.KeyID) (*dek.Key, error) {
	in.mu.Lock()
	var wrapped []byte
	denied, limit := false, in.cfg.CallTimeout
	if in.stale {
		limit = min(limit, staleTime)
	}
	in.each(func(k *keyringState, v *versionState) {
		if k.key(v) == id {
			wrapped, denied = v.Wrapped, v.Denied
		}
	})
	in.mu.Unlock()
	if denied {
		return nil, fmt.Errorf("%w by the key service", dek.ErrDenied)
	}
	w, err := dek.ParseWrapped(wrapped)
	if err != nil {
		return nil, fmt.Errorf("wrapped key: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	in.count.unwraps.Add(1)
	k, err := in.client.Unwrap(ctx, w)
	in.count.outcome(err)
	if errors.Is(err, dek.ErrDenied) || err == nil && limit == staleTime {
		in.request(syncMissing) // it concerns more than this key
	}
	return k, err
}

// each calls f for every version; in.mu is held.
func (in *instance) each(f func(*keyringState, *versionState)) {
	for i := range in.state.Keyrings {
		k := &in.state.Keyrings[i]
		for j := range k.Versions {
			f(k, &k.Versions[j])
		}
	}
}

// deny refuses the versions that match from now on and, without a grace time,
// wipes their keys before it returns.
func (in *instance) deny(match func(dek.KeyringID) bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.epoch++
	in.deniedAt = in.cfg.Now()
	in.each(func(k *keyringState, v *versionState) {
		if match(k.id()) {
			v.Denied, in.dirty = true, true
		}
	})
	in.publish()
	if in.cfg.DenialGrace == 0 {
		in.purgeDenied()
	}
	wake(in.kick) // the worker has a deadline to keep now
}

// purgeDenied wipes every denied key; in.mu is held.
func (in *instance) purgeDenied() { in.purgeDeniedOf(func(dek.KeyID) bool { return true }) }

// purgeDeniedOf wipes the denied keys that match; in.mu is held.
func (in *instance) purgeDeniedOf(match func(dek.KeyID) bool) {
	denied := map[dek.KeyID]bool{}
	in.each(func(k *keyringState, v *versionState) {
		if id := k.key(v); v.Denied && match(id) {
			denied[id] = true
		}
	})
	if len(denied) > 0 {
		in.cache.Purge(func(id dek.KeyID) bool { return denied[id] })
	}
}

// notice acts on a change at once and leaves the questions to the worker.
func (in *instance) notice(n Notice) {
	switch n.Kind {
	case NoticeConnected:
		in.log.Info("key service connected", "instance", in.name)
		in.mu.Lock()
		in.trusted = false
		in.mu.Unlock()
		in.request(syncChanged)
	case NoticeLost:
		in.lost(n.Err)
	case NoticeDenied, NoticeRevoked:
		in.log.Error("key service denies the instance", "instance", in.name, "err", n.Err)
		in.deny(func(dek.KeyringID) bool { return true })
		in.request(syncMissing)
	case NoticeDisabled:
		in.log.Warn("keyring disabled", "instance", in.name, "keyring", n.Keyring)
		in.deny(func(id dek.KeyringID) bool { return n.Keyring == "" || matchesKeyring(id, n.Keyring) })
		in.request(syncMissing)
	case NoticeRolled, NoticeEnabled, NoticeRewrapped:
		in.log.Info("keyring changed", "instance", in.name, "keyring", n.Keyring)
		in.request(syncMissing)
	}
	in.keepCheckpoint(n.Checkpoint)
}

// matchesKeyring accepts "keyring" and "vault/keyring".
func matchesKeyring(id dek.KeyringID, name string) bool {
	return id.Keyring == name || id.String() == name
}

// keepCheckpoint remembers the newest checkpoint, but none of a service that
// has not yet shown that it extends what we know.
func (in *instance) keepCheckpoint(b []byte) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.trusted && newerCheckpoint(in.state.Checkpoint, b) {
		in.state.Checkpoint, in.dirty = b, true
	}
}

// lost marks the state stale: an outage, nothing is taken away.
func (in *instance) lost(err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.stale {
		return
	}
	in.stale, in.since = true, in.cfg.Now()
	in.log.Warn("key service unreachable; held keys stay in use", "instance", in.name, "endpoints", in.client.Endpoints(), "err", err)
	in.publish()
	wake(in.kick) // the worker has a deadline to keep now
}

// request asks the worker for a sync.
func (in *instance) request(d depth) {
	in.mu.Lock()
	in.want = max(in.want, d)
	in.mu.Unlock()
	wake(in.kick)
}

func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run follows the instance until ctx ends.
func (in *instance) run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { _ = in.client.Watch(ctx, in.name, in.notice) })
	wg.Go(func() { in.report(ctx) })
	in.work(ctx)
	wg.Wait()
	in.save()
	return nil
}

// work syncs when asked, at the refresh time, and again, with back-off, after a
// sync that failed.
func (in *instance) work(ctx context.Context) {
	retry := firstRetry
	timer := time.NewTimer(in.cfg.Refresh)
	defer timer.Stop()
	for {
		var grace <-chan time.Time
		if d, ok := in.nextDeadline(); ok {
			grace = time.After(d)
		}
		select {
		case <-ctx.Done():
			return
		case <-grace:
			in.enforce()
			continue
		case <-in.kick:
		case <-timer.C:
			in.request(syncChanged)
			<-in.kick
		}
		in.mu.Lock()
		want := in.want
		in.want = syncNothing
		in.mu.Unlock()
		if want == syncNothing {
			continue
		}
		next := in.cfg.Refresh
		if err := in.sync(ctx, false, want); err != nil && ctx.Err() == nil {
			in.log.Warn("key state not refreshed", "instance", in.name, "err", err)
			next = min(retry/2+jitter(retry), in.cfg.Refresh)
			retry = min(retry*2, longestRetry)
		} else {
			retry = firstRetry
		}
		timer.Reset(next)
	}
}

// nextDeadline is when a grace time or the outage limit ends.
func (in *instance) nextDeadline() (time.Duration, bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	var at time.Time
	if in.cfg.OutageLimit > 0 && in.stale && !in.expired {
		at = in.since.Add(in.cfg.OutageLimit)
	}
	if in.cfg.DenialGrace > 0 {
		end := in.deniedAt.Add(in.cfg.DenialGrace)
		if end.After(in.cfg.Now()) && (at.IsZero() || end.Before(at)) {
			at = end
		}
	}
	if at.IsZero() {
		return 0, false
	}
	return max(0, at.Sub(in.cfg.Now())), true
}

// enforce wipes what may no longer be held.
func (in *instance) enforce() {
	in.mu.Lock()
	defer in.mu.Unlock()
	now := in.cfg.Now()
	if !now.Before(in.deniedAt.Add(in.cfg.DenialGrace)) {
		in.purgeDenied()
	}
	if in.cfg.OutageLimit > 0 && in.stale && !in.expired && !now.Before(in.since.Add(in.cfg.OutageLimit)) {
		in.expired = true
		in.log.Error("outage limit reached: keys dropped", "instance", in.name, "limit", in.cfg.OutageLimit)
		in.purgeAll()
		in.publish()
	}
}

// purgeAll wipes every key of the instance; in.mu is held.
func (in *instance) purgeAll() {
	held := map[dek.KeyID]bool{}
	in.each(func(k *keyringState, v *versionState) { held[k.key(v)] = true })
	in.cache.Purge(func(id dek.KeyID) bool { return held[id] })
}

// save writes the state if it changed. A failure takes nothing from what is
// served: it costs the wraps and the checkpoint of a start meanwhile, shows in
// Health, metrics and log, and is tried again with the next change and every
// minute.
func (in *instance) save() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.saveLocked()
}

func (in *instance) saveLocked() {
	if !in.dirty {
		return
	}
	failed := in.unsaved != nil
	in.unsaved = saveState(in.cfg.StateDir, &in.state)
	switch {
	case in.unsaved != nil:
		in.log.Error("agent state not saved: keys are served on; make room on its disk, it is tried again", "instance", in.name, "err", in.unsaved)
		return
	case failed:
		in.log.Info("agent state saved again", "instance", in.name)
	}
	in.dirty = false
}
