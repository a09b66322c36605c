package connector_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
)

// A host is a database host: state directory, host secret, socket.
type host struct {
	t   testing.TB
	kms *fakeKMS
	cfg connector.AgentConfig
	a   *connector.Agent // the one that runs
	end func()
}

func newHost(t testing.TB, kms *fakeKMS) *host {
	dir, secret := kms.identity(t)
	return &host{t: t, kms: kms, cfg: connector.AgentConfig{
		Socket: filepath.Join(t.TempDir(), "run", "agent.sock"), SocketGID: -1, StateDir: dir, HostSecretFile: secret,
		Instances: []connector.InstanceRule{{UID: uint32(os.Getuid()), Instance: "shop"}},
		Logger:    quiet(), CallTimeout: 2 * time.Second,
	}}
}

// start runs an agent until stop, or the end of the test.
func (h *host) start() {
	h.t.Helper()
	a, err := connector.NewAgent(h.cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.a = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	h.end = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("agent: %v", err)
		}
	})
	h.t.Cleanup(h.end)
}

func (h *host) stop() { h.end() }

func (h *host) dial(p connector.Process) (*connector.Socket, error) {
	s, err := connector.DialAgent(testContext(h.t), h.cfg.Socket, p)
	if err == nil {
		h.t.Cleanup(func() { _ = s.Close() })
	}
	return s, err
}

func (h *host) mustDial(p connector.Process) *connector.Socket {
	h.t.Helper()
	s, err := h.dial(p)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// awaitList waits, by WAIT, until the listing satisfies f.
func awaitList(t testing.TB, s *connector.Socket, f func(connector.Listing) bool) connector.Listing {
	t.Helper()
	ctx := testContext(t)
	for {
		l, err := s.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if f(l) {
			return l
		}
		if _, err := s.Wait(ctx, l.Generation, 10*time.Second); err != nil {
			t.Fatalf("the list never came to what was wanted; last %+v: %v", l, err)
		}
	}
}

func inState(want connector.ListState) func(connector.Listing) bool {
	return func(l connector.Listing) bool { return len(l.Keyrings) > 0 && l.Keyrings[0].State == want }
}

func getKey(t testing.TB, s *connector.Socket, id, version uint32, keyring string, v uint32) {
	t.Helper()
	k, err := s.Get(testContext(t), connector.ServerKey{ID: id, Version: version})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy()
	wantKey(t, k, plainKey(keyring, v))
}

func newShop(t testing.TB) (*fakeKMS, *host) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	kms.addVersion("orders", 1)
	kms.addVersion("orders", 1)
	kms.addVersion("temp", 2)
	return kms, newHost(t, kms)
}

// awaitWatch waits until the agent follows changes.
func awaitWatch(kms *fakeKMS) {
	for {
		kms.mu.Lock()
		n := len(kms.watchers)
		kms.mu.Unlock()
		if n > 0 {
			return
		}
		<-kms.entered
	}
}
