package identity_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyward/keyward/kms/identity"
)

// The clock of the service is a year off for an hour: nothing of what it did
// then outlives it, and the hosts' certificates are good again.
func TestClockOffForAnHour(t *testing.T) {
	for name, off := range map[string]time.Duration{"ahead": 365 * 24 * time.Hour, "behind": -365 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				var by atomic.Int64
				c := w.config()
				c.Now = func() time.Time { return time.Now().Add(time.Duration(by.Load())) }
				a, err := identity.Open(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				ctx, stop := context.WithCancel(t.Context())
				ended := make(chan struct{})
				go func() { a.Run(ctx); close(ended) }()
				host, roots := issue(t, a, "host/db1"), len(a.Roots())

				by.Store(int64(off))
				time.Sleep(time.Hour)
				if _, err := a.Verify(host); err == nil {
					t.Error("a certificate of another year is taken")
				}
				by.Store(0)
				time.Sleep(time.Minute + time.Second)
				if leaf, now := serverLeaf(t, a), time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
					t.Errorf("a minute after the clock was set the server shows a certificate of %v to %v", leaf.NotBefore, leaf.NotAfter)
				}
				if p, err := a.Verify(host); err != nil || p.Standing(c.Now()) != identity.Full {
					t.Errorf("the host's certificate: %v, %v", p.Standing(c.Now()), err)
				}
				if n := len(a.Roots()); n != roots {
					t.Errorf("%d roots, were %d", n, roots)
				}
				stop()
				<-ended
				if _, err := identity.Open(t.Context(), c); err != nil {
					t.Errorf("a start afterwards: %v", err)
				}
			})
		})
	}
}
