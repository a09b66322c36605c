package connector

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/keyward/keyward/dek"
)

// reportEvery is how often usage goes to the key service if only times moved.
const reportEvery = time.Minute

// hello lets a database process in. One that holds no key, or that the agent
// has never let in, needs the service's word now; the others do not.
func (in *instance) hello(ctx context.Context, h hello) error {
	in.mu.Lock()
	known := in.state.Opened && in.state.knows(h.nonce)
	in.mu.Unlock()
	if !h.cold && known {
		return nil
	}
	err := in.sync(ctx, true, syncMissing)
	if err != nil {
		return in.refuseStart(err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.state.remember(h.nonce)
	in.dirty = true
	in.saveLocked()
	return nil
}

// refuseStart names what the database cannot have, why, and the way on: the
// text goes into the server's own log.
func (in *instance) refuseStart(err error) error {
	wanted := in.wanted()
	switch {
	case errors.Is(err, dek.ErrDenied):
		return fmt.Errorf("%w: instance %s may not be started: the key service at %s refuses %s: ask the security officer whether the key is disabled or the instance revoked (keyward keyring show, keyward plugin list); detail: %w",
			dek.ErrDenied, in.name, in.client.Endpoints(), wanted, err)
	case errors.Is(err, dek.ErrUnavailable):
		return fmt.Errorf("%w: instance %s can't be started without the key service: no answer from %s, wanted %s: start the key service or repair the network, then start the database again; detail: %w",
			dek.ErrUnavailable, in.name, in.client.Endpoints(), wanted, err)
	}
	return fmt.Errorf("instance %s can't be started with the key service at %s, wanted %s: run keyward status; detail: %w", in.name, in.client.Endpoints(), wanted, err)
}

// wanted lists the keys of the instance: "acme/orders key 1 version 3".
func (in *instance) wanted() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	var parts []string
	for i := range in.state.Keyrings {
		k := &in.state.Keyrings[i]
		if k.ServerKey != 0 && k.Announced != 0 && !k.Gone {
			parts = append(parts, fmt.Sprintf("%s key %d version %d", k.id(), k.ServerKey, k.Announced))
		}
		if len(parts) == 8 {
			parts = append(parts, "and more")
			break
		}
	}
	if len(parts) == 0 {
		return "the current version of every keyring (none is known on this host yet)"
	}
	return strings.Join(parts, ", ")
}

// lease returns the key that a server knows as k; the caller releases it.
// Errors carry the text for the server's log.
func (in *instance) lease(ctx context.Context, k ServerKey) (dek.Lease, error) {
	s, known := in.view.Load().index[k]
	if !known {
		return dek.Lease{}, in.unknown(k)
	}
	if s.denied {
		return in.leaseDenied(s, k)
	}
	if s.expired {
		return dek.Lease{}, in.explain(k, s.id, fmt.Errorf("%w: the outage limit of %v has passed", dek.ErrUnavailable, in.cfg.OutageLimit))
	}
	if lease, ok := in.cache.Peek(s.id); ok {
		return lease, nil
	}
	id := s.id // s would move to the heap on every hit
	lease, err := in.cache.Get(ctx, id, func(ctx context.Context) (*dek.Key, error) { return in.loadKey(ctx, id) })
	// A denial that came meanwhile has purged before this key arrived: look
	// again, and purge again.
	if in.view.Load().index[k].denied && in.cfg.DenialGrace == 0 {
		lease.Release()
		in.mu.Lock()
		in.purgeDenied()
		in.mu.Unlock()
		return dek.Lease{}, in.explain(k, s.id, dek.ErrDenied)
	}
	if err != nil {
		return dek.Lease{}, in.explain(k, s.id, err)
	}
	return lease, nil
}

// leaseDenied serves from memory within the grace time, never from the service.
func (in *instance) leaseDenied(s slot, k ServerKey) (dek.Lease, error) {
	if in.cfg.Now().UnixNano() < s.until {
		if lease, ok := in.cache.Peek(s.id); ok {
			return lease, nil
		}
	}
	return dek.Lease{}, in.explain(k, s.id, dek.ErrDenied)
}

func (in *instance) unknown(k ServerKey) error {
	in.request(syncMissing) // it may be new
	return fmt.Errorf("%w: key %d version %d: instance %s has no keyring with it (key service %s): create the keyring with server key %d and prepare the instance with it",
		dek.ErrNotFound, k.ID, k.Version, in.name, in.client.Endpoints(), k.ID)
}

// explain names key, version, endpoint and remedy.
func (in *instance) explain(k ServerKey, id dek.KeyID, err error) error {
	what := fmt.Sprintf("key %d version %d (%s)", k.ID, k.Version, id)
	at := in.client.Endpoints()
	switch {
	case errors.Is(err, dek.ErrDenied):
		return fmt.Errorf("%w: %s: the key service at %s says no: ask the security officer whether the key is disabled or the instance revoked", dek.ErrDenied, what, at)
	case errors.Is(err, dek.ErrAuth):
		return fmt.Errorf("%w: %s: the key service at %s does not know this wrapped key as its own: was it restored from an older backup? run keyward status", errInternal, what, at)
	case errors.Is(err, dek.ErrUnavailable):
		return fmt.Errorf("%w: %s: no answer from the key service at %s: start it or repair the network; keys already loaded stay in use; detail: %w", dek.ErrUnavailable, what, at, err)
	}
	return fmt.Errorf("%w: %s at %s: %w", errInternal, what, at, err)
}

// noteUsage remembers what a server asked for. A version it asked for the
// first time is reported at once.
func (in *instance) noteUsage(usage []ServerUsage) {
	v := in.view.Load()
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, u := range usage {
		s, listed := v.index[u.ServerKey]
		if !listed {
			continue
		}
		last, known := in.usage[s.id]
		if !known || u.Last.After(last) {
			in.usage[s.id] = u.Last
			in.reported = false
		}
		if !known {
			wake(in.tell)
		}
	}
}

// report forwards usage every minute and at change, and saves the state.
func (in *instance) report(ctx context.Context) {
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-in.tell:
		}
		in.save()
		in.mu.Lock()
		usage := make([]Usage, 0, len(in.usage))
		for id, at := range in.usage {
			usage = append(usage, Usage{Keyring: id.Keyring, Version: id.Version, Last: at})
		}
		skip := in.reported || len(usage) == 0
		in.reported = true
		in.mu.Unlock()
		if skip {
			continue
		}
		if err := in.client.ReportUsage(ctx, in.name, usage); err != nil && ctx.Err() == nil {
			in.log.Warn("usage not reported", "instance", in.name, "err", err)
			in.mu.Lock()
			in.reported = false // with the next minute
			in.mu.Unlock()
		}
	}
}
