package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

// A hub hands notices to the Watch streams. Telling never waits for a stream:
// what a watcher has not taken yet is kept once per keyring and kind.
type hub struct {
	mu sync.Mutex
	by map[string]map[*watcher]struct{} // instance -> its streams
}

// A watcher is one stream.
type watcher struct {
	mu      sync.Mutex
	pending []Notice
	wake    chan struct{} // capacity 1
}

func (h *hub) init() { h.by = make(map[string]map[*watcher]struct{}) }

func (h *hub) enter(instance string) *watcher {
	w := &watcher{wake: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.by[instance] == nil {
		h.by[instance] = make(map[*watcher]struct{})
	}
	h.by[instance][w] = struct{}{}
	return w
}

func (h *hub) exit(instance string, w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.by[instance], w)
	if len(h.by[instance]) == 0 {
		delete(h.by, instance)
	}
}

func (h *hub) connected(instance string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.by[instance]) > 0
}

// put adds n behind what waits, in place of an equal older one.
func (w *watcher) put(n Notice) {
	w.mu.Lock()
	w.pending = slices.DeleteFunc(w.pending, func(o Notice) bool { return o.Kind == n.Kind && o.Keyring == n.Keyring })
	w.pending = append(w.pending, n)
	w.mu.Unlock()
	w.poke()
}

func (w *watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() []Notice {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.pending
	w.pending = nil
	return out
}

// tell notifies the instances of v that use one of the keyrings, and says which
// of them listen.
func (h *hub) tell(v *view, vault string, rings []string, kind NoticeKind) Effect {
	return h.tellIf(v, kind, func(_ string, inst *instanceRecord) []string {
		if inst.Vault != vault {
			return nil
		}
		return slices.DeleteFunc(slices.Clone(rings), func(r string) bool { return !slices.Contains(inst.Keyrings, r) })
	})
}

// tellIf notifies instances about the keyrings that f gives for them.
func (h *hub) tellIf(v *view, kind NoticeKind, f func(name string, inst *instanceRecord) []string) Effect {
	var out Effect
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, inst := range v.instances.all() {
		if !inst.Revoked.IsZero() {
			continue
		}
		rings := f(name, inst)
		if len(rings) == 0 {
			continue
		}
		if len(h.by[name]) == 0 {
			out.Absent = append(out.Absent, name)
			continue
		}
		out.Notified = append(out.Notified, name)
		for w := range h.by[name] {
			for _, ring := range rings {
				w.put(Notice{Kind: kind, Keyring: ring, Generation: v.change})
			}
		}
	}
	slices.Sort(out.Notified)
	slices.Sort(out.Absent)
	return out
}

// revoke ends the streams of the instances that f picks.
func (h *hub) revoke(v *view, f func(name string, inst *instanceRecord) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, inst := range v.instances.all() {
		if !f(name, inst) {
			continue
		}
		for w := range h.by[name] {
			w.put(Notice{Kind: NoticeRevoked, Generation: v.change})
		}
	}
}

// wakeAll has every stream look whether the service still serves.
func (h *hub) wakeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, ws := range h.by {
		for w := range ws {
			w.poke()
		}
	}
}

// WatchInstance calls f with what happens to the instance's keyrings, beginning
// with a ping and then one at least every 10 seconds, until ctx ends, f fails,
// or the caller loses the right. Meanwhile the instance counts as connected.
// It returns the error of f or ctx, or wraps dek.ErrDenied or what stopped the
// service.
func (s *Service) WatchInstance(ctx context.Context, c Caller, instance string, f func(Notice) error) error {
	a, _, err := s.beginOwn(ctx, c, OpKeyringWatch, instance)
	if err != nil {
		return err
	}
	// In before the outcome: what changes from here on is told.
	w := s.hub.enter(instance)
	defer s.hub.exit(instance, w)
	if err := a.end(ctx, nil); err != nil {
		return err
	}
	tick := time.NewTicker(s.cfg.limits.ping)
	defer tick.Stop()
	for {
		for _, n := range w.take() {
			if n.Kind == NoticeRevoked {
				continue // sent below, when the right is found gone
			}
			if err := f(n); err != nil {
				return err
			}
		}
		if err := s.mayWatch(c, instance); err != nil {
			if errors.Is(err, dek.ErrDenied) {
				err = errors.Join(f(Notice{Kind: NoticeRevoked, Generation: s.view.Load().change}), err)
			}
			return err
		}
		if err := s.ping(ctx, instance, f); err != nil {
			return err
		}
		select {
		case <-w.wake:
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ping sends the newest checkpoint.
func (s *Service) ping(ctx context.Context, instance string, f func(Notice) error) error {
	head, err := s.audit.Head(ctx)
	if err != nil {
		return fmt.Errorf("audit checkpoint: %w", classed(err))
	}
	s.sight(instance)
	return f(Notice{Kind: NoticePing, Generation: s.view.Load().change, Checkpoint: head})
}

// mayWatch decides again: rights may have gone while the stream was open.
func (s *Service) mayWatch(c Caller, instance string) error {
	if err := s.ready(); err != nil {
		return err
	}
	inst, err := s.view.Load().own(c, instance)
	if err != nil {
		return fmt.Errorf("instance %s is revoked: %w", instance, err)
	}
	for _, ring := range inst.Keyrings {
		if s.allowed(c, OpKeyringWatch, ringScope(inst.Vault, ring)) {
			return nil
		}
	}
	return fmt.Errorf("instance %s: %w", instance, dek.ErrDenied)
}
