package connector_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func TestAgentPeerCredentials(t *testing.T) {
	_, h := newShop(t)
	h.cfg.Instances = []connector.InstanceRule{{UID: uint32(os.Getuid()) + 4711, Instance: "shop"}}
	h.start()
	_, err := h.dial(connector.NewProcess("mariadb", "shop"))
	if !errors.Is(err, dek.ErrDenied) || !strings.Contains(err.Error(), fmt.Sprint("uid ", os.Getuid())) {
		t.Errorf("got %v", err)
	}
}

func TestAgentChoosesInstance(t *testing.T) {
	_, h := newShop(t)
	uid := uint32(os.Getuid())
	h.cfg.Instances = []connector.InstanceRule{{UID: uid, Instance: "shop"}, {UID: uid, Instance: "crm"}, {UID: uid + 1, Instance: "other"}}
	h.start()
	for _, tc := range []struct {
		instance string
		want     error
	}{{"shop", nil}, {"crm", nil}, {"", dek.ErrInvalid}, {"other", dek.ErrDenied}, {"absent", dek.ErrDenied}} {
		if _, err := h.dial(connector.NewProcess("mariadb", tc.instance)); !errors.Is(err, tc.want) {
			t.Errorf("instance %q: got %v, want %v", tc.instance, err, tc.want)
		}
	}
}

func TestAgentConnectionLimit(t *testing.T) {
	_, h := newShop(t)
	h.cfg.MaxConnsPerUser = 2
	h.start()
	a := h.mustDial(connector.NewProcess("mariadb", "shop"))
	h.mustDial(connector.NewProcess("mariadb", "shop"))
	if _, err := h.dial(connector.NewProcess("mariadb", "shop")); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	_ = a.Close() // also while it waits, the place is free again
	for {
		if s, err := h.dial(connector.NewProcess("mariadb", "shop")); err == nil {
			_ = s.Close()
			return
		}
	}
}

// A WAIT ends with its connection: a server that goes away leaves nothing.
func TestAgentWaitHangup(t *testing.T) {
	_, h := newShop(t)
	h.cfg.MaxConnsPerUser = 1
	h.start()
	for range 3 {
		var s *connector.Socket
		for s == nil {
			s, _ = h.dial(connector.NewProcess("mariadb", "shop"))
		}
		l := must(s.List(testContext(t)))
		ctx, cancel := context.WithCancel(testContext(t))
		done := make(chan error, 1)
		go func() {
			_, err := s.Wait(ctx, l.Generation, time.Minute)
			done <- err
		}()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		_ = s.Close()
	}
}

func TestAgentSocketPlace(t *testing.T) {
	_, h := newShop(t)
	dir := filepath.Dir(h.cfg.Socket)
	for _, tc := range []struct {
		name    string
		prepare func() error
		want    error
	}{
		{"world-writable directory", func() error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chmod(dir, 0o777)
		}, dek.ErrInvalid},
		{"a file in its place", func() error {
			return errors.Join(os.Mkdir(dir, 0o750), os.WriteFile(h.cfg.Socket, nil, 0o600))
		}, dek.ErrInvalid},
		{"stale socket", func() error {
			if err := os.Mkdir(dir, 0o750); err != nil {
				return err
			}
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.cfg.Socket, Net: "unix"})
			if err != nil {
				return err
			}
			l.SetUnlinkOnClose(false)
			return l.Close()
		}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer os.RemoveAll(dir)
			if err := tc.prepare(); err != nil {
				t.Fatal(err)
			}
			a, err := connector.NewAgent(h.cfg)
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			if err == nil {
				_ = a.Close()
			}
		})
	}
	t.Run("second agent", func(t *testing.T) {
		h.start()
		if _, err := connector.NewAgent(h.cfg); !errors.Is(err, dek.ErrExists) {
			t.Errorf("same state: %v", err)
		}
		other := newHost(t, h.kms)
		other.cfg.Socket = h.cfg.Socket
		if _, err := connector.NewAgent(other.cfg); !errors.Is(err, dek.ErrExists) {
			t.Errorf("same socket: %v", err)
		}
		h.mustDial(connector.NewProcess("mariadb", "shop")) // the first one is unharmed
	})
}
