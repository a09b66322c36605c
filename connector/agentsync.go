package connector

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"

	"github.com/keyward/keyward/dek"
)

// manyKeys is from how many versions on memory is given back at once.
const manyKeys = 1000

// coldTime bounds what a database start waits for the key service; the plugin
// waits a little longer for the words of the refusal.
const coldTime = 5 * time.Second

// syncRounds bounds how often a sync starts anew because of denials meanwhile.
const syncRounds = 5

var errOvertaken = errors.New("connector: denied meanwhile")

// sync asks the service what the instance may use and fetches the keys. Cold
// asks for a database that starts. It is nil if every keyring can be used; else
// the first keyring's error, of class denied before unavailable.
func (in *instance) sync(ctx context.Context, cold bool, d depth) error {
	if cold { // somebody watches a database start, also while another sync has the turn
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, coldTime)
		defer cancel()
	}
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%w: open instance %s: %w", dek.ErrUnavailable, in.name, context.Cause(ctx))
	}
	defer func() { <-in.turn }()
	var err error
	for range syncRounds {
		if err = in.syncOnce(ctx, cold, d); !errors.Is(err, errOvertaken) {
			break
		}
		err = fmt.Errorf("%w: open instance %s: disabled while it was opened", dek.ErrDenied, in.name)
	}
	in.mu.Lock()
	in.lastErr = err
	in.mu.Unlock()
	return err
}

func (in *instance) syncOnce(ctx context.Context, cold bool, d depth) error {
	in.mu.Lock()
	epoch, checkpoint := in.epoch, in.state.Checkpoint
	in.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, in.cfg.CallTimeout)
	defer cancel()
	opened, err := in.client.OpenInstance(ctx, in.name, cold, checkpoint)
	in.count.outcome(err)
	switch {
	case errors.Is(err, dek.ErrDenied):
		if cold {
			in.request(syncChanged) // is it the start that is refused, or all?
		} else {
			in.deny(func(dek.KeyringID) bool { return true })
			in.save()
		}
		return err
	case errors.Is(err, dek.ErrCorrupt):
		in.lost(err)
		return fmt.Errorf("%w: the key service is behind what this host has seen of its audit log (restored from an old copy?): %w", dek.ErrUnavailable, err)
	case err != nil:
		in.lost(err)
		return err
	}
	wanted := in.merge(opened, d)
	many := 0
	for i := range opened.Keyrings {
		many += len(opened.Keyrings[i].Versions)
	}
	results, err := in.fetch(ctx, wanted)
	if err != nil {
		in.lost(err)
		return err
	}
	err = in.apply(ctx, epoch, wanted, results)
	if many >= manyKeys {
		// The messages were several times the size of what is kept; an agent
		// is then idle for hours, in which nothing else would return them.
		runtime.GC() // twice: buffer pools survive one collection
		debug.FreeOSMemory()
	}
	return err
}

// merge takes over names, numbers and wraps and returns the versions whose
// keys are to be fetched.
func (in *instance) merge(o Opened, d depth) []dek.Wrapped {
	in.mu.Lock()
	defer in.mu.Unlock()
	all := d == syncChanged && o.Generation != in.state.Generation
	in.state.Opened, in.state.Contact, in.dirty = true, in.cfg.Now().UTC().Truncate(time.Second), true
	in.state.Generation = o.Generation
	in.trusted = true
	if newerCheckpoint(in.state.Checkpoint, o.Checkpoint) {
		in.state.Checkpoint = o.Checkpoint
	}
	in.stale, in.expired = false, false
	gone := in.state.Keyrings
	in.state.Keyrings = nil
	for _, k := range o.Keyrings {
		next := keyringState{Vault: k.Vault, Name: k.Name, MasterKey: k.MasterKey, ServerKey: k.ServerKey}
		old := takeKeyring(&gone, next.id())
		next.Announced = old.Announced
		next.Versions = in.mergeVersions(k, old)
		in.state.Keyrings = append(in.state.Keyrings, next)
	}
	for _, k := range gone { // no longer ours to use; a server may still ask
		k.Gone = true
		for j := range k.Versions {
			k.Versions[j].Denied = true
		}
		in.state.Keyrings = append(in.state.Keyrings, k)
	}
	return in.missing(all)
}

// takeKeyring removes and returns the keyring named id, or a zero one.
func takeKeyring(list *[]keyringState, id dek.KeyringID) keyringState {
	i := slices.IndexFunc(*list, func(k keyringState) bool { return k.id() == id })
	if i < 0 {
		return keyringState{}
	}
	k := (*list)[i]
	*list = slices.Delete(*list, i, i+1)
	return k
}

// mergeVersions keeps every version a server may have seen, also one that the
// service no longer names.
func (in *instance) mergeVersions(k Keyring, old keyringState) []versionState {
	out := old.Versions
	for _, v := range k.Versions {
		if v.State == "pending" || v.State == "failed" || v.ServerVersion == 0 {
			continue
		}
		i := slices.IndexFunc(out, func(have versionState) bool { return have.Version == v.Version })
		if i < 0 {
			out = append(out, versionState{Version: v.Version, ServerVersion: v.ServerVersion})
			i = len(out) - 1
		}
		if len(v.Wrapped) > 0 {
			out[i].Wrapped = v.Wrapped
		}
		if v.State == "disabled" || v.State == "destroyed" {
			if !out[i].Denied {
				out[i].Denied, in.deniedAt = true, in.cfg.Now()
			}
			out[i].err = fmt.Errorf("%w: version %d is %s", dek.ErrDenied, v.Version, v.State)
		} else {
			out[i].err = nil
		}
	}
	slices.SortFunc(out, func(a, b versionState) int { return int(int64(a.ServerVersion) - int64(b.ServerVersion)) })
	return out
}

// missing returns the wraps whose keys shall be fetched; in.mu is held.
func (in *instance) missing(all bool) []dek.Wrapped {
	var out []dek.Wrapped
	in.each(func(k *keyringState, v *versionState) {
		if v.err != nil || len(v.Wrapped) == 0 {
			return // the service has just called it disabled
		}
		if !all && !v.Denied && v.Seen {
			if lease, ok := in.cache.Peek(k.key(v)); ok {
				lease.Release()
				return
			}
		}
		w, err := dek.ParseWrapped(v.Wrapped)
		if err == nil && w.ID() != k.key(v) {
			err = fmt.Errorf("%w: it names %s", dek.ErrAuth, w.ID())
		}
		if err != nil {
			v.err = fmt.Errorf("wrapped key of %s: %w", k.key(v), err)
			return
		}
		out = append(out, w)
	})
	return out
}

func (in *instance) fetch(ctx context.Context, ws []dek.Wrapped) ([]UnwrapResult, error) {
	if len(ws) == 0 {
		return nil, nil
	}
	in.count.unwraps.Add(uint64(len(ws)))
	results, err := in.client.UnwrapBatch(ctx, ws)
	in.count.outcome(err)
	return results, err
}

// apply puts the fetched keys to use, announces what is complete and publishes.
// Answers from before a denial are thrown away.
func (in *instance) apply(ctx context.Context, epoch uint64, ws []dek.Wrapped, results []UnwrapResult) error {
	got := make(map[dek.KeyID]error, len(ws))
	fresh := map[dek.KeyID]bool{}              // what was not held before
	names := map[dek.KeyringID]dek.KeyringID{} // the cache keeps one copy of each
	for i, w := range ws {
		id := w.ID()
		if _, ok := names[id.KeyringID]; !ok {
			names[id.KeyringID] = id.KeyringID
		}
		id.KeyringID = names[id.KeyringID]
		loaded, err := in.hold(ctx, id, results[i])
		got[id] = err
		if loaded {
			fresh[id] = true
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.epoch != epoch {
		// Within a grace time what was held before the denial stays.
		in.purgeDeniedOf(func(id dek.KeyID) bool { return in.cfg.DenialGrace == 0 || fresh[id] })
		in.publish()
		return errOvertaken
	}
	in.each(func(k *keyringState, v *versionState) {
		if err, asked := got[k.key(v)]; asked {
			in.applyResult(v, err)
		}
	})
	if in.cfg.DenialGrace == 0 {
		in.purgeDenied()
	}
	var denied, other error
	for i := range in.state.Keyrings {
		err := in.announce(&in.state.Keyrings[i])
		if errors.Is(err, dek.ErrDenied) && denied == nil {
			denied = err
		} else if err != nil && other == nil {
			other = err
		}
	}
	in.publish()
	in.saveLocked()
	if denied != nil {
		return denied
	}
	return other
}

// hold gives a fetched key to the cache, and reports whether the cache took it:
// it did not if it held the key already.
func (in *instance) hold(ctx context.Context, id dek.KeyID, r UnwrapResult) (loaded bool, err error) {
	if r.Err != nil {
		return false, r.Err
	}
	// The cache may hold it, be loading it, or abandon this load: it gets a
	// clone, and this one ends here in every case.
	defer r.Key.Destroy()
	var took atomic.Bool // an abandoned load may end after Get
	lease, err := in.cache.Get(ctx, id, func(context.Context) (*dek.Key, error) {
		took.Store(true)
		return r.Key.Clone()
	})
	lease.Release()
	if err != nil {
		return took.Load(), fmt.Errorf("hold key: %w", err)
	}
	return took.Load(), nil
}

// applyResult notes what the service said of one version; in.mu is held.
func (in *instance) applyResult(v *versionState, err error) {
	v.err = err
	switch {
	case err == nil:
		v.Seen, v.Denied = true, false
	case errors.Is(err, dek.ErrDenied):
		in.count.denied.Add(1)
		if !v.Denied {
			v.Denied, in.deniedAt = true, in.cfg.Now()
		}
	}
}

// announce moves the keyring to its newest usable version and says what keeps
// it from being used; in.mu is held. It never goes back: a server has pages of
// every version it was told of.
func (in *instance) announce(k *keyringState) error {
	if k.Gone {
		return nil
	}
	for i := range k.Versions {
		v := &k.Versions[i]
		if v.Seen && !v.Denied && v.err == nil && v.ServerVersion > k.Announced {
			k.Announced = v.ServerVersion
		}
	}
	if len(k.Versions) == 0 {
		return fmt.Errorf("%w: keyring %s has no version: create it again", dek.ErrNotFound, k.id())
	}
	n := k.Announced
	if n == 0 {
		n = k.Versions[len(k.Versions)-1].ServerVersion
	}
	v := k.version(n)
	if v == nil {
		return fmt.Errorf("%w: keyring %s has no version %d", dek.ErrNotFound, k.id(), n)
	}
	switch {
	case v.Denied && v.err != nil:
		return fmt.Errorf("%s (server key %d version %d): %w", k.key(v), k.ServerKey, n, v.err)
	case v.Denied:
		return fmt.Errorf("%s (server key %d version %d): %w by the key service", k.key(v), k.ServerKey, n, dek.ErrDenied)
	case v.err != nil:
		return fmt.Errorf("%s (server key %d version %d): %w", k.key(v), k.ServerKey, n, v.err)
	}
	return nil
}
