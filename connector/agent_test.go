package connector_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

func TestAgentServes(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", ""))
	if w := s.Welcome(); w.Instance != "shop" || w.Endpoints != kms.addr || w.Refresh != time.Hour {
		t.Errorf("welcome: got %+v", w)
	}
	l := must(s.List(testContext(t)))
	if len(l.Keyrings) != 2 {
		t.Fatalf("got %+v", l)
	}
	if k := l.Keyrings[0]; k.ID != 1 || k.Latest != 3 || k.State != connector.ListActive || k.Keyring != "acme/orders" || fmt.Sprint(k.Versions) != "[1 3]" {
		t.Errorf("got %+v", k)
	}
	before := kms.count("Unwrap")
	getKey(t, s, 1, 1, "orders", 1)
	getKey(t, s, 1, 3, "orders", 2)
	getKey(t, s, 2, 1, "temp", 1)
	if n := kms.count("Unwrap") - before; n != 0 {
		t.Errorf("%d GETs went to the key service", n)
	}
	_, err := s.Get(testContext(t), connector.ServerKey{ID: 9, Version: 1})
	if !errors.Is(err, dek.ErrNotFound) || !strings.Contains(err.Error(), "key 9 version 1") || !strings.Contains(err.Error(), kms.addr) {
		t.Errorf("unknown key: %v", err)
	}
	getKey(t, s, 1, 1, "orders", 1) // the connection goes on
	info := must(os.Stat(h.cfg.Socket))
	if info.Mode().Perm() != 0o660 {
		t.Errorf("socket mode %v", info.Mode())
	}
	if info := must(os.Stat(filepath.Dir(h.cfg.Socket))); info.Mode().Perm() != 0o750 {
		t.Errorf("socket directory mode %v", info.Mode())
	}
}

// A roll is visible within a second, through WAIT, and its key is held then.
func TestAgentRoll(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s, w := h.mustDial(connector.NewProcess("mariadb", "shop")), h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	l := must(s.List(testContext(t)))
	changed := make(chan error, 1)
	go func() {
		_, err := w.Wait(context.Background(), l.Generation, time.Minute)
		changed <- err
	}()
	start := time.Now()
	kms.addVersion("orders", 1)
	kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
	if err := <-changed; err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("a roll took %v", d)
	}
	next := must(s.List(testContext(t)))
	if k := next.Keyrings[0]; k.Latest != 5 || fmt.Sprint(k.Versions) != "[1 3 5]" || next.Generation == l.Generation {
		t.Errorf("got %+v", next)
	}
	kms.stop()
	getKey(t, s, 1, 5, "orders", 3)
}

// A change of which no notice came is seen at the refresh time.
func TestAgentRefresh(t *testing.T) {
	kms, h := newShop(t)
	h.cfg.Refresh = 20 * time.Millisecond
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.addVersion("orders", 1)
	awaitList(t, s, func(l connector.Listing) bool { return l.Keyrings[0].Latest == 5 })
	getKey(t, s, 1, 5, "orders", 3)
	kms.set(func() {
		kms.disabled["temp"] = true
		kms.generation++
	})
	l := awaitList(t, s, func(l connector.Listing) bool { return l.Keyrings[1].State == connector.ListDenied })
	if l.Keyrings[0].State != connector.ListActive {
		t.Errorf("the other keyring: %+v", l)
	}
	if _, err := s.Get(testContext(t), connector.ServerKey{ID: 2, Version: 1}); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("disabled without a notice: %v", err)
	}
}

// A version whose key can't be had is not announced.
func TestAgentAnnouncesHeldKeysOnly(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.set(func() { kms.unwrapErr = reason(codes.Unavailable, "UNAVAILABLE") })
	kms.addVersion("orders", 1)
	kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
	l := awaitList(t, s, inState(connector.ListStale))
	if k := l.Keyrings[0]; k.Latest != 3 || fmt.Sprint(k.Versions) != "[1 3]" {
		t.Errorf("announced without its key: %+v", k)
	}
	getKey(t, s, 1, 3, "orders", 2)
	kms.set(func() { kms.unwrapErr = nil })
	l = awaitList(t, s, inState(connector.ListActive))
	if k := l.Keyrings[0]; k.Latest != 5 {
		t.Errorf("not announced: %+v", k)
	}
}

// KMS down: warm sessions go on; a cold start is refused and told why; the
// agent restarted meanwhile knows its databases but holds no key.
func TestAgentOutage(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	p := connector.NewProcess("mariadb", "shop")
	s := h.mustDial(p)
	awaitWatch(kms)
	kms.stop()
	awaitList(t, s, inState(connector.ListStale))
	getKey(t, s, 1, 3, "orders", 2)
	_, err := h.dial(connector.NewProcess("mariadb", "shop"))
	if !errors.Is(err, dek.ErrUnavailable) {
		t.Fatalf("cold start without the key service: %v", err)
	}
	for _, word := range []string{"acme/orders key 1 version 3", "acme/temp key 2 version 1", kms.addr, "start the key service"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%v does not name %q", err, word)
		}
	}
	warm := connector.Process{Kind: "mariadb", Instance: "shop", Nonce: p.Nonce}
	h.mustDial(warm)

	h.stop()
	h.start()
	s = h.mustDial(warm)
	l := must(s.List(testContext(t)))
	if k := l.Keyrings[0]; k.State != connector.ListStale || k.Latest != 3 || len(k.Versions) != 2 {
		t.Errorf("after a restart: %+v", k)
	}
	_, err = s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 3})
	if !errors.Is(err, dek.ErrUnavailable) || !strings.Contains(err.Error(), "key 1 version 3") {
		t.Errorf("after a restart: %v", err)
	}
	// A process that the agent has never let in is cold, whatever it says.
	stranger := connector.NewProcess("mariadb", "shop")
	stranger.Cold = false
	if _, err := h.dial(stranger); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("unknown process: %v", err)
	}
	kms.start()
	awaitList(t, s, inState(connector.ListActive))
	getKey(t, s, 1, 3, "orders", 2)
}

// Keys are served for the outage limit, then dropped.
func TestAgentOutageLimit(t *testing.T) {
	kms, h := newShop(t)
	h.cfg.OutageLimit = time.Millisecond
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.stop()
	awaitList(t, s, inState(connector.ListStale))
	for {
		k, err := s.Get(testContext(t), connector.ServerKey{ID: 1, Version: 3})
		if err != nil {
			if !errors.Is(err, dek.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			break
		}
		k.Destroy()
	}
	kms.start()
	awaitList(t, s, inState(connector.ListActive))
	getKey(t, s, 1, 3, "orders", 2)
}

// The newest checkpoint is shown at every open, also after a restart.
func TestAgentShowsCheckpoint(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	kms.set(func() { kms.checkpoint = 41 })
	kms.addVersion("orders", 1) // checkpoint 42
	kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
	awaitList(t, s, func(l connector.Listing) bool { return l.Keyrings[0].Latest == 5 })
	h.stop()
	kms.set(func() { kms.checkpoint = 7 }) // put back in time
	h.start()
	awaitWatch(kms)
	h.mustDial(connector.NewProcess("mariadb", "shop"))
	kms.mu.Lock()
	defer kms.mu.Unlock()
	if got, want := string(kms.seen), "keyward-log\n42\nhash\n"; got != want {
		t.Errorf("shown: %q, want %q", got, want)
	}
}

// A key service behind the checkpoint opens no database, and takes nothing away.
func TestAgentRolledBackService(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	kms.set(func() { kms.openErr = reason(codes.DataLoss, "CORRUPT") })
	_, err := h.dial(connector.NewProcess("mariadb", "shop"))
	if !errors.Is(err, dek.ErrUnavailable) || !strings.Contains(err.Error(), "audit log") {
		t.Errorf("got %v", err)
	}
	getKey(t, s, 1, 3, "orders", 2)
}

func TestAgentReportsUsage(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	at := time.Unix(1_700_000_000, 0)
	if err := s.Report(testContext(t), []connector.ServerUsage{{ServerKey: connector.ServerKey{ID: 1, Version: 3}, Last: at}}); err != nil {
		t.Fatal(err)
	}
	r := <-kms.reports
	if u := r.GetUsage(); r.GetInstance() != "shop" || len(u) != 1 || u[0].GetKeyring() != "orders" || u[0].GetVersion() != 2 || u[0].GetLastUnix() != at.Unix() {
		t.Errorf("got %v", r)
	}
}

// A copy of the state directory is no identity, and holds no key.
func TestAgentStolenState(t *testing.T) {
	_, h := newShop(t)
	h.start()
	h.mustDial(connector.NewProcess("mariadb", "shop"))
	h.stop()
	loot := 0
	err := filepath.WalkDir(h.cfg.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		loot += len(b)
		if bytes.Contains(b, plainKey("orders", 1)[:8]) && bytes.Contains(b, plainKey("orders", 1)) || bytes.Contains(b, []byte("PRIVATE KEY")) {
			t.Errorf("%s holds a key", path)
		}
		return err
	})
	if err != nil || loot == 0 {
		t.Fatalf("read %d bytes, %v", loot, err)
	}
	foreign := filepath.Join(t.TempDir(), "host-secret")
	must(connector.OpenHostSecret(foreign, true)).Destroy()
	cfg := h.cfg
	cfg.HostSecretFile = foreign
	if _, err := connector.NewAgent(cfg); !errors.Is(err, dek.ErrAuth) {
		t.Errorf("under another host's secret: %v", err)
	}
	if _, err := connector.LoadIdentity(h.cfg.StateDir, ""); !errors.Is(err, dek.ErrNotFound) {
		t.Errorf("without a secret: %v", err)
	}
}

func TestAgentCorruptState(t *testing.T) {
	_, h := newShop(t)
	h.start()
	h.mustDial(connector.NewProcess("mariadb", "shop"))
	h.stop()
	path := filepath.Join(h.cfg.StateDir, "instances", "shop.json")
	good := must(os.ReadFile(path))
	for name, b := range map[string][]byte{
		"truncated": good[:len(good)/2], "empty": {}, "another instance": bytes.Replace(good, []byte(`"shop"`), []byte(`"crm"`), 1),
		"unknown field": bytes.Replace(good, []byte(`"opened"`), []byte(`"opnd"`), 1),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := connector.NewAgent(h.cfg); !errors.Is(err, dek.ErrCorrupt) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestAgentMetrics(t *testing.T) {
	_, h := newShop(t)
	h.cfg.MetricsListen = filepath.Join(t.TempDir(), "m", "metrics.sock")
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	getKey(t, s, 1, 3, "orders", 2)
	text := h.metricsOf()
	for _, want := range []string{"keyward_agent_cache_hits_total", "keyward_agent_cache_keys 3", "keyward_agent_unwraps_total 3", `keyward_agent_stale{instance="shop"} 0`, "keyward_agent_locked_bytes"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// A certificate is renewed at a third of its life, without a restart.
func TestAgentRenews(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	kms.addVersion("orders", 1)
	kms.lifetime = 2 * time.Second // begins 0.2 s ago: due at 0.53 s
	h := newHost(t, kms)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	for name := range kms.entered {
		if name == "Renew" {
			break
		}
	}
	getKey(t, s, 1, 1, "orders", 1)
	h.mustDial(connector.NewProcess("mariadb", "shop"))
}
