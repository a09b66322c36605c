package connector_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/kms/kmspb"
)

// needRoot skips for people who are not root, and fails where nothing may be
// skipped.
func needRoot(t *testing.T, err error) {
	t.Helper()
	if os.Getuid() == 0 && err == nil {
		return
	}
	if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
		t.Fatalf("uid %d: %v", os.Getuid(), err)
	}
	t.Skipf("needs root: %v", err)
}

// smallDisk moves the host's state to a file system of 1 MB.
func (h *host) smallDisk(t *testing.T) {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	needRoot(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=1m,mode=0700"))
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.CopyFS(disk, os.DirFS(h.cfg.StateDir)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(disk, "identity.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.cfg.StateDir = disk
}

// fill leaves no room on the disk of dir, and returns what makes room again.
func fill(t *testing.T, dir string) (empty func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f := must(os.Create(path))
	defer f.Close()
	for block := make([]byte, 4096); ; {
		if _, err := f.Write(block); err != nil {
			return func() {
				if err := os.Remove(path); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

// A logbook keeps what was logged; it may be read while it is written.
type logbook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logbook) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logbook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// metricsOf reads the agent's metrics.
func (h *host) metricsOf() string {
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		for { // the agent opens it after the other socket
			c, err := new(net.Dialer).DialContext(ctx, "unix", h.cfg.MetricsListen)
			if err == nil || ctx.Err() != nil {
				return c, err
			}
			runtime.Gosched()
		}
	}, DisableKeepAlives: true}, Timeout: 10 * time.Second}
	resp, err := client.Get("http://agent/metrics")
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	return string(must(io.ReadAll(resp.Body)))
}

// wantSaved checks Health and metrics, and that the state directory holds one
// whole file and nothing half written.
func (h *host) wantSaved(want bool) {
	h.t.Helper()
	in := h.a.Health()[0]
	if got := in.Unsaved == ""; got != want {
		h.t.Errorf("saved %v, want %v: %+v", got, want, in)
	}
	if !want && !strings.Contains(in.Unsaved, h.cfg.StateDir) {
		h.t.Errorf("%q does not name the place", in.Unsaved)
	}
	if line := fmt.Sprintf(`keyward_agent_state_unsaved{instance="shop"} %d`, map[bool]int{true: 0, false: 1}[want]); !strings.Contains(h.metricsOf(), line) {
		h.t.Errorf("metrics do not say %q", line)
	}
	names := must(os.ReadDir(filepath.Join(h.cfg.StateDir, "instances")))
	if len(names) != 1 || names[0].Name() != "shop.json" {
		h.t.Errorf("the state directory holds %v", names)
	}
}

// A state directory that is full takes nothing from a running agent, not even
// over a restart; it says so, and recovers by itself.
func TestAgentStateDiskFull(t *testing.T) {
	kms, h := newShop(t)
	h.smallDisk(t)
	said := new(logbook)
	h.cfg.Logger, h.cfg.MetricsListen = said.logger(), filepath.Join(t.TempDir(), "m", "metrics.sock")
	h.start()
	p := connector.NewProcess("mariadb", "shop")
	s := h.mustDial(p)
	awaitWatch(kms)
	h.wantSaved(true)
	file := filepath.Join(h.cfg.StateDir, "instances", "shop.json")
	before := must(os.ReadFile(file))
	roll := func(latest uint32) {
		kms.addVersion("orders", 1)
		kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
		awaitList(t, s, func(l connector.Listing) bool { return l.Keyrings[0].Latest == latest })
	}

	empty := fill(t, h.cfg.StateDir)
	roll(5)
	getKey(t, s, 1, 5, "orders", 3)
	h.mustDial(connector.NewProcess("mariadb", "shop")) // a cold start of another server
	h.wantSaved(false)
	if now := must(os.ReadFile(file)); !bytes.Equal(now, before) {
		t.Errorf("the state file was touched: %d bytes, was %d", len(now), len(before))
	}
	if !strings.Contains(said.String(), "agent state not saved") || !strings.Contains(said.String(), "no space left") {
		t.Errorf("the log does not say so:\n%s", said)
	}

	h.stop() // an agent that starts on the full disk serves as well
	h.start()
	p.Cold = false
	s = h.mustDial(p)
	awaitList(t, s, func(l connector.Listing) bool {
		return l.Keyrings[0].Latest == 5 && l.Keyrings[0].State == connector.ListActive
	})
	getKey(t, s, 1, 5, "orders", 3)
	awaitWatch(kms)

	empty()
	roll(7)
	h.wantSaved(true) // publication and save are under one lock, which Health takes
	if now := must(os.ReadFile(file)); !bytes.Contains(now, []byte(`"announced":7`)) {
		t.Errorf("the state was not saved: %s", now)
	}
}
