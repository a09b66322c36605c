package connector_test

import (
	"crypto/x509"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

const year = 365 * 24 * time.Hour

// A wrongClock is a host's clock that can be set.
type wrongClock struct{ off atomic.Int64 }

func (c *wrongClock) set(d time.Duration) { c.off.Store(int64(d)) }

func (c *wrongClock) now() time.Time { return time.Now().Add(time.Duration(c.off.Load())) }

// namesClock wants an error that is an outage, never a no, and names the clock.
func namesClock(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, dek.ErrUnavailable) || errors.Is(err, dek.ErrDenied) {
		t.Errorf("%s: got %v, want unavailable", what, err)
	}
	if err == nil || !strings.Contains(err.Error(), "clock") {
		t.Errorf("%s: %v does not name the clock", what, err)
	}
}

// The clock of the agent's host is off by a year while it runs and when it
// starts: held keys are served, nothing counts as denied, nothing is dropped,
// and all is well once the clock is right.
func TestAgentHostClock(t *testing.T) {
	for name, off := range map[string]time.Duration{"a year ahead": year, "a year behind": -year} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			kms, h := newShop(t)
			var clock wrongClock
			said := new(logbook)
			h.cfg.Now, h.cfg.Logger = clock.now, said.logger()
			h.cfg.MetricsListen = filepath.Join(t.TempDir(), "m", "metrics.sock")
			h.start()
			p := connector.NewProcess("mariadb", "shop")
			s := h.mustDial(p)
			awaitWatch(kms)
			p.Cold = false

			clock.set(off)
			kms.hangUp()
			awaitList(t, s, inState(connector.ListStale))
			getKey(t, s, 1, 3, "orders", 2)
			getKey(t, s, 2, 1, "temp", 1)
			h.mustDial(p)
			_, err := h.dial(connector.NewProcess("mariadb", "shop"))
			namesClock(t, "a cold start", err)
			if !strings.Contains(said.String(), "the clock of this host says") {
				t.Errorf("the log does not name the clock:\n%s", said)
			}
			for _, line := range []string{"keyward_agent_cache_purged_total 0", "keyward_agent_denied_total 0", "keyward_agent_cache_keys 3"} {
				if !strings.Contains(h.metricsOf(), line) {
					t.Errorf("no %q in the metrics", line)
				}
			}

			h.stop()
			h.start()
			s = h.mustDial(p)
			if l := awaitList(t, s, inState(connector.ListStale)); l.Keyrings[0].Latest != 3 {
				t.Errorf("after a restart: %+v", l)
			}
			clock.set(0)
			awaitList(t, s, inState(connector.ListActive))
			getKey(t, s, 1, 3, "orders", 2)
			h.mustDial(connector.NewProcess("mariadb", "shop"))
		})
	}
}

// The clock of the key service is off: it takes certificates for ended, or
// shows one that it made with that clock. Neither is a no.
func TestServiceClock(t *testing.T) {
	kms, h := newShop(t)
	h.start()
	s := h.mustDial(connector.NewProcess("mariadb", "shop"))
	awaitWatch(kms)
	good := kms.tls
	cold := func(what string) {
		t.Helper()
		kms.hangUp()
		awaitList(t, s, inState(connector.ListStale))
		getKey(t, s, 1, 3, "orders", 2)
		_, err := h.dial(connector.NewProcess("mariadb", "shop"))
		namesClock(t, what, err)
	}
	ended := reason(codes.Unauthenticated, "UNAVAILABLE")
	kms.set(func() { kms.openErr, kms.watchErr = ended, ended })
	cold("certificates look ended")
	kms.set(func() { kms.openErr, kms.watchErr = nil, nil })
	awaitList(t, s, inState(connector.ListActive))
	for name, off := range map[string]time.Duration{"a year ahead": year, "a year behind": -year} {
		kms.stop()
		kms.tls = kms.ca.serverTLSAt(t, x509.ExtKeyUsageServerAuth, time.Now().Add(off))
		kms.start()
		cold(name)
		kms.stop()
		kms.tls = good
		kms.start()
		awaitList(t, s, inState(connector.ListActive))
	}
	getKey(t, s, 1, 3, "orders", 2)
}

// A certificate that a service with a wrong clock made is not taken: it would
// lock the host out once that clock is right.
func TestRenewFromTheFuture(t *testing.T) {
	for name, off := range map[string]time.Duration{"the service ahead": year, "the service behind": -year} {
		k := newFakeKMS(t, newTestCA(t, "ca"))
		c := k.client(t)
		from, to := c.Identity().Validity()
		k.set(func() { k.clock = off })
		namesClock(t, name, c.RenewIdentity(testContext(t)))
		if f, u := c.Identity().Validity(); !f.Equal(from) || !u.Equal(to) {
			t.Errorf("%s: the identity has a certificate from %v to %v", name, f, u)
		}
		k.set(func() { k.clock = 0 })
		if err := c.RenewIdentity(testContext(t)); err != nil {
			t.Errorf("%s, and right again: %v", name, err)
		}
	}
}

// A host whose clock is ahead by less than the life of a certificate finds
// each new one due at once: it must not ask for one after the other.
func TestRenewalKeepsItsPace(t *testing.T) {
	kms, h := newShop(t)
	h.cfg.Now = func() time.Time { return time.Now().Add(30 * time.Minute) } // certificates live an hour
	said := new(logbook)
	h.cfg.Logger = said.logger()
	h.start()
	for name := range kms.entered {
		if name == "Renew" {
			break
		}
	}
	for range 100 { // time in which renewals could follow one another
		s := h.mustDial(connector.NewProcess("mariadb", "shop"))
		getKey(t, s, 1, 1, "orders", 1)
		_ = s.Close()
	}
	if n := kms.count("Renew"); n != 1 {
		t.Errorf("%d renewals, want 1", n)
	}
	if !strings.Contains(said.String(), "compare the clocks") {
		t.Errorf("the log does not name the clock:\n%s", said)
	}
}

// A token is not spent on a service that the host's clock takes for ended.
func TestEnrollWithWrongClock(t *testing.T) {
	k := newFakeKMS(t, newTestCA(t, "ca"))
	dir, secret := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "secret")
	for name, off := range map[string]time.Duration{"ahead": year, "behind": -year} {
		clock := new(wrongClock)
		clock.set(off)
		o := connector.EnrollOptions{Dir: dir, HostSecretFile: secret, Now: clock.now}
		f := k.tokenFile()
		_, err := connector.Enroll(testContext(t), f, o)
		if err == nil || !strings.Contains(err.Error(), "clock") {
			t.Errorf("%s: %v does not name the clock", name, err)
		}
		f.Expires = time.Now().Add(2 * year)
		_, err = connector.Enroll(testContext(t), f, o)
		namesClock(t, name+", a long token", err)
	}
	if n := k.count("Enroll"); n != 0 {
		t.Errorf("the token was sent %d times", n)
	}
	i, err := connector.Enroll(testContext(t), k.tokenFile(), connector.EnrollOptions{Dir: dir, HostSecretFile: secret})
	if err != nil {
		t.Fatal(err)
	}
	i.Close()
}
