package kms_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A listener collects what a Watch tells.
type listener struct {
	mu      sync.Mutex
	notices []kms.Notice
	err     error
	done    chan struct{}
}

func (h *house) listen(ctx context.Context, c kms.Caller, instance string) *listener {
	l := &listener{done: make(chan struct{})}
	go func() {
		defer close(l.done)
		l.err = h.s.WatchInstance(ctx, c, instance, func(n kms.Notice) error {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.notices = append(l.notices, n)
			return nil
		})
	}()
	return l
}

// kinds returns the kinds but for pings, and forgets.
func (l *listener) kinds() (out []kms.NoticeKind, pings int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.notices {
		if n.Kind == kms.NoticePing {
			pings++
			continue
		}
		out = append(out, n.Kind)
	}
	l.notices = nil
	return out, pings
}

// A watchStep changes something, and tells whoever watches.
type watchStep struct {
	do   func() (kms.Effect, error)
	want kms.NoticeKind
}

func (h *house) watchSteps(ctx context.Context) []watchStep {
	return []watchStep{
		{func() (kms.Effect, error) {
			_, err := h.s.RollKeyring(ctx, officer, kms.RollKeyring{Vault: "v", Name: "r"})
			return kms.Effect{Notified: []string{"db1"}, Absent: []string{"db2"}}, err
		}, kms.NoticeRolled},
		{func() (kms.Effect, error) {
			return h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k"})
		}, kms.NoticeDisabled},
		{func() (kms.Effect, error) {
			return h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Enabled: true})
		}, kms.NoticeEnabled},
		{func() (kms.Effect, error) {
			return h.s.SetKeyringEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "r", Version: 1})
		}, kms.NoticeDisabled},
	}
}

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, "")
		h.furnish()
		ctx := t.Context()
		_, _, err := h.s.PrepareInstance(ctx, officer, kms.PrepareInstance{Kind: "mariadb", Name: "db2", Vault: "v", Keyrings: []string{"r"}})
		check(t, err)
		l := h.listen(ctx, db1, "db1")
		synctest.Wait()
		if kinds, pings := l.kinds(); pings != 1 || len(kinds) != 0 {
			t.Errorf("at the start: %v, %d pings", kinds, pings)
		}
		time.Sleep(time.Minute) // the bubble's clock
		synctest.Wait()
		if _, pings := l.kinds(); pings < 6 {
			t.Errorf("%d pings in a minute, want one per 10 s at least", pings)
		}
		for i, step := range h.watchSteps(ctx) {
			got, err := step.do()
			check(t, err)
			if !slices.Equal(got.Notified, []string{"db1"}) || !slices.Equal(got.Absent, []string{"db2"}) {
				t.Errorf("step %d: effect %+v", i, got)
			}
			synctest.Wait()
			if kinds, _ := l.kinds(); !slices.Equal(kinds, []kms.NoticeKind{step.want}) {
				t.Errorf("step %d: notices %v, want %v", i, kinds, step.want)
			}
		}
		h.wantRingOff(t)
		check(t, h.s.RevokeInstance(ctx, officer, "db1"))
		<-l.done
		if kinds, _ := l.kinds(); !errors.Is(l.err, dek.ErrDenied) || kinds[len(kinds)-1] != kms.NoticeRevoked {
			t.Errorf("after a revocation: %v, %v", kinds, l.err)
		}
		if st := must(h.s.Status(ctx, admin)); st.Instances[0].Name != "db2" || len(st.Instances) != 1 {
			t.Errorf("instances: %+v", st.Instances)
		}
	})
}

// wantRingOff switches keyring r off: a database that starts is refused, one
// that runs sees no wrapped bytes.
func (h *house) wantRingOff(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	// A cold start is refused while the keyring's newest version is fine but
	// an instance whose keyring is off gets none.
	_, err := h.s.SetKeyringEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "r"})
	check(t, err)
	if _, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1", Cold: true}); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("cold open of a disabled keyring: %v", err)
	}
	v, err := h.s.OpenInstance(ctx, db1, kms.OpenInstance{Instance: "db1"})
	check(t, err)
	for _, m := range v.Keyrings[0].Versions {
		if m.State != kms.Disabled || m.Wrapped != nil {
			t.Errorf("warm open shows %+v", m)
		}
	}
}

// TestSlowWatcher: one that does not take its notices delays nobody, and gets
// each kind once.
func TestSlowWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, "")
		h.furnish()
		ctx := t.Context()
		gate := make(chan struct{})
		var got []kms.NoticeKind
		done := make(chan error)
		wctx, cancel := context.WithCancel(ctx)
		go func() {
			done <- h.s.WatchInstance(wctx, db1, "db1", func(n kms.Notice) error {
				<-gate
				if n.Kind != kms.NoticePing {
					got = append(got, n.Kind)
				}
				return nil
			})
		}()
		synctest.Wait()
		for i := range 50 {
			_, err := h.s.SetKeyEnabled(ctx, officer, kms.SetEnabled{Vault: "v", Name: "k", Enabled: i%2 == 1})
			check(t, err)
		}
		close(gate)
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if !slices.Equal(got, []kms.NoticeKind{kms.NoticeDisabled, kms.NoticeEnabled}) {
			t.Errorf("got %v, want one of each, the newest last", got)
		}
	})
}

// TestGrantTaken: a host that loses its grant is told, and its stream ends.
func TestGrantTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, "")
		h.furnish()
		ctx := t.Context()
		w := h.wraps()[0]
		l := h.listen(ctx, db1, "db1")
		synctest.Wait()
		check(t, h.s.RemoveGrant(ctx, admin, kms.Grant{Principal: "host/db1", Role: kms.RoleServiceEncryptionUser, Scope: "/vaults/v/keyrings/r"}))
		<-l.done
		if !errors.Is(l.err, dek.ErrDenied) {
			t.Errorf("stream: %v", l.err)
		}
		if _, err := h.s.Unwrap(ctx, db1, w); !errors.Is(err, dek.ErrDenied) {
			t.Errorf("unwrap: %v", err)
		}
	})
}

// TestClockJump: wall time that leaves the process's own clock is shown and
// recorded.
func TestClockJump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t, "")
		ctx := t.Context()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(h.journal.of("system.clock-jump")); n != 0 {
			t.Fatalf("%d jumps without a jump", n)
		}
		h.clock.jump(-365 * 24 * time.Hour)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := len(h.journal.of("system.clock-jump")); n != 1 {
			t.Errorf("%d records of the jump, want 1", n)
		}
		found := slices.ContainsFunc(must(h.s.Status(ctx, admin)).Problems, func(p kms.Problem) bool { return p.Severity == "yellow" })
		if !found {
			t.Error("status does not show the jump")
		}
	})
}
