package connector_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

// takers ask for a key all the time, and complain of one that is handed out
// within a denial.
type takers struct {
	phase atomic.Int64 // odd: denied; it moves before anything is enabled again
	end   chan struct{}
	all   sync.WaitGroup
}

func newTakers() *takers { return &takers{end: make(chan struct{})} }

func (x *takers) add(t *testing.T, c *connector.Socket) {
	x.all.Go(func() {
		for {
			select {
			case <-x.end:
				return
			default:
			}
			before := x.phase.Load()
			k, err := c.Get(context.Background(), connector.ServerKey{ID: 1, Version: 3})
			switch {
			case err == nil && before%2 == 1 && x.phase.Load() == before:
				t.Error("a key was handed out after the denial")
			case err != nil && !errors.Is(err, dek.ErrDenied):
				t.Errorf("got %v", err)
			}
			k.Destroy()
		}
	})
}

func (x *takers) stop() {
	close(x.end)
	x.all.Wait()
}

// Disabled while callers run: within a second, not one key is handed out after
// the list says so, and the cache is empty. Enabled: all is well without a
// restart.
func TestAgentDisableUnderLoad(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	p := connector.NewProcess("mariadb", "shop")
	s := h.mustDial(p)
	awaitWatch(kms)
	load := newTakers()
	for range 4 {
		load.add(t, h.mustDial(p))
	}
	p.Cold = false
	for range 5 {
		start := time.Now()
		kms.setDisabled("orders", true)
		l := awaitList(t, s, inState(connector.ListDenied))
		load.phase.Add(1)
		if d := time.Since(start); d > time.Second {
			t.Errorf("a disable took %v, want a second at most", d)
		}
		wantOrdersDenied(t, h, s, l)
		if warm, err := h.dial(p); err != nil {
			t.Errorf("reconnect of a running server: %v", err)
		} else {
			_ = warm.Close()
		}
		load.phase.Add(1)
		kms.setDisabled("orders", false)
		awaitList(t, s, inState(connector.ListActive))
	}
	load.stop()
	getKey(t, s, 1, 1, "orders", 1)
}

// wantOrdersDenied checks that the one keyring is refused in clear words, and
// the other is not.
func wantOrdersDenied(t *testing.T, h *host, s *connector.Socket, l connector.Listing) {
	t.Helper()
	if k := l.Keyrings[0]; k.Latest != 3 || len(k.Versions) != 2 {
		t.Errorf("a denied keyring lost versions: %+v", k)
	}
	if l.Keyrings[1].State != connector.ListActive {
		t.Errorf("the other keyring: %+v", l.Keyrings[1])
	}
	getKey(t, s, 2, 1, "temp", 1)
	_, err := s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 1})
	for _, word := range []string{"key 1 version 1", "acme/orders/1", h.kms.addr, "security officer"} {
		if !strings.Contains(fmt.Sprint(err), word) {
			t.Errorf("%v does not name %q", err, word)
		}
	}
	if _, err := h.dial(connector.NewProcess("mariadb", "shop")); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("cold start: %v", err)
	}
}

// A revoked instance loses everything at once; that is no outage.
func TestAgentRevoked(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.set(func() { kms.openErr, kms.watchErr = errNo, errNo })
	kms.notify(kmspb.Notice_KIND_REVOKED, "")
	l := awaitList(t, s, func(l connector.Listing) bool {
		return l.Keyrings[0].State == connector.ListDenied && l.Keyrings[1].State == connector.ListDenied
	})
	if len(l.Keyrings) != 2 {
		t.Errorf("got %+v", l)
	}
	if _, err := s.Get(testContext(t), connector.ServerKey{ID: 2, Version: 1}); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("got %v", err)
	}
}

// Denied keys are served from memory for the grace time, shown as denied at
// once, and dropped at its end.
func TestAgentDenialGrace(t *testing.T) {
	kms, h := newShop(t)
	var ahead atomic.Int64 // the agent's clock
	h.cfg.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	h.cfg.DenialGrace = time.Minute
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.setDisabled("orders", true)
	awaitList(t, s, inState(connector.ListDenied))
	getKey(t, s, 1, 3, "orders", 2)
	ahead.Store(int64(2 * time.Minute))
	if _, err := s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 3}); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("after the grace time: %v", err)
	}
}

// A denial that comes while keys are fetched takes what came with it, and
// leaves what was held before to the grace time.
func TestAgentDenialGraceDuringFetch(t *testing.T) {
	kms, h := newShop(t)
	h.cfg.DenialGrace = time.Minute
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	await := func(call string) {
		for kms.count(call) == 0 && t.Context().Err() == nil {
			<-kms.entered
		}
	}
	gate := make(chan struct{})
	kms.set(func() { kms.gate, kms.calls = gate, map[string]int{} })
	kms.addVersion("orders", 1)
	kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
	await("UnwrapBatch") // the new version is on its way
	kms.setDisabled("orders", true)
	awaitList(t, s, inState(connector.ListDenied))
	kms.set(func() { kms.gate, kms.calls = nil, map[string]int{} })
	close(gate)
	await("Open") // the answer was thrown away and the service is asked anew
	getKey(t, s, 1, 1, "orders", 1)
	getKey(t, s, 1, 3, "orders", 2)
	if _, err := s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 5}); err == nil {
		t.Error("a version was handed out that came after the denial")
	}
}
