package identity_test

import (
	"context"
	"crypto/x509"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/identity"
)

func serverLeaf(t *testing.T, a *identity.Authority) *x509.Certificate {
	t.Helper()
	c, err := a.ServerCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf
}

func TestServerCertificate(t *testing.T) {
	w := newWorld(t)
	a := w.open(t)
	leaf := serverLeaf(t, a)
	for _, name := range []string{"kms.example", "127.0.0.1"} {
		opts := x509.VerifyOptions{Roots: x509.NewCertPool(), DNSName: name, CurrentTime: w.now}
		opts.Roots.AddCert(a.Root())
		if _, err := leaf.Verify(opts); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	c, _ := a.ServerCertificate(nil)
	if len(c.Certificate) != 2 || string(c.Certificate[1]) != string(a.Root().Raw) {
		t.Error("the chain does not end in the root, which a new host needs")
	}
	if !serverLeaf(t, w.open(t)).Equal(leaf) {
		t.Error("a restart made another server certificate")
	}
}

func TestServerRenewsBeforeItListens(t *testing.T) {
	tests := []struct {
		name  string
		edit  func(w *world, c *identity.Config)
		fresh bool
	}{
		{"29 days old", func(w *world, _ *identity.Config) { w.now = w.now.AddDate(0, 0, 29) }, false},
		{"31 days old", func(w *world, _ *identity.Config) { w.now = w.now.AddDate(0, 0, 31) }, true},
		{"ended", func(w *world, _ *identity.Config) { w.now = w.now.AddDate(0, 0, 100) }, true},
		{"clock went back a year", func(w *world, _ *identity.Config) { w.now = w.now.AddDate(-1, 0, 0) }, true},
		{"another name", func(_ *world, c *identity.Config) { c.Names = append(c.Names, "kms2.example") }, true},
		{"a name less", func(_ *world, c *identity.Config) { c.Names = c.Names[:1] }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			old := serverLeaf(t, w.open(t))
			c := w.config()
			tt.edit(w, &c)
			a, err := identity.Open(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			got := serverLeaf(t, a)
			if got.Equal(old) == tt.fresh {
				t.Errorf("renewed: got %v, want %v", !got.Equal(old), tt.fresh)
			}
			if tt.fresh && (w.now.Before(got.NotBefore) || w.now.After(got.NotAfter)) {
				t.Errorf("certificate of %v to %v shown at %v", got.NotBefore, got.NotAfter, w.now)
			}
		})
	}
}

func TestRunRenewsWithoutRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.config()
		c.Now, c.ServerLifetime = time.Now, time.Hour
		a, err := identity.Open(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { a.Run(ctx); close(ended) }()

		serials := map[string]bool{}
		for range 24 * 60 { // a day, a minute at a time
			time.Sleep(time.Minute) // the bubble's clock
			leaf := serverLeaf(t, a)
			if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
				t.Fatalf("at %v the server shows a certificate of %v to %v", now, leaf.NotBefore, leaf.NotAfter)
			}
			serials[leaf.SerialNumber.String()] = true
		}
		if len(serials) < 60 {
			t.Errorf("certificates in a day at an hour's life: got %d, want at least 60", len(serials))
		}

		// A device that is gone delays renewal; the old certificate stays.
		w.device.gone.Store(true)
		before := serverLeaf(t, a)
		time.Sleep(30 * time.Minute)
		if !serverLeaf(t, a).Equal(before) {
			t.Error("a renewal that failed replaced the certificate")
		}
		w.device.gone.Store(false)
		time.Sleep(5 * time.Minute)
		if serverLeaf(t, a).Equal(before) {
			t.Error("the device is back and nothing was renewed")
		}
		stop()
		<-ended
	})
}

func TestOpenFailsClosed(t *testing.T) {
	t.Run("device gone", func(t *testing.T) {
		w := newWorld(t)
		w.device.gone.Store(true)
		if _, err := identity.Open(t.Context(), w.config()); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("got %v, want dek.ErrUnavailable", err)
		}
	})
	for _, done := range []bool{false, true} {
		w := newWorld(t)
		w.shelf.fail, w.shelf.done = dek.ErrUnavailable, done
		if _, err := identity.Open(t.Context(), w.config()); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("store failed, done %v: got %v, want dek.ErrUnavailable", done, err)
		}
		w.shelf.fail = nil
		a := w.open(t)
		if _, err := a.Verify(issue(t, a, "host/db1")); err != nil {
			t.Errorf("store failed, done %v, then started again: %v", done, err)
		}
	}
	for _, name := range []string{"tls/ca", "tls/server"} {
		t.Run("corrupt "+name, func(t *testing.T) {
			w := newWorld(t)
			w.open(t)
			for _, bad := range []string{"", "{}", "null", "[]", `{"version":2}`, `{"version":1,"extra":1}`} {
				w.shelf.kept[name] = []byte(bad)
				if _, err := identity.Open(t.Context(), w.config()); !errors.Is(err, dek.ErrCorrupt) {
					t.Errorf("%q: got %v, want dek.ErrCorrupt", bad, err)
				}
			}
		})
	}
	t.Run("server record of another installation", func(t *testing.T) {
		w, other := newWorld(t), newWorld(t)
		w.open(t)
		other.open(t)
		w.shelf.kept["tls/server"] = other.shelf.kept["tls/server"]
		if _, err := identity.Open(t.Context(), w.config()); !errors.Is(err, dek.ErrCorrupt) {
			t.Errorf("got %v, want dek.ErrCorrupt", err)
		}
	})
}

// TestNewTokenAfterDisaster: the restored service has another CA key. Hosts
// that trust the old root must be able to connect, be recognised, and learn
// the new root, without anyone touching them.
func TestNewTokenAfterDisaster(t *testing.T) {
	w := newWorld(t)
	a := w.open(t)
	oldRoot, host, server := a.Root(), issue(t, a, "host/db1"), serverLeaf(t, a)

	w.device = newDevice(t)
	w.now = w.now.AddDate(0, 0, 5) // restored five days later
	a = w.open(t)
	if a.Root().Equal(oldRoot) {
		t.Fatal("the new device kept the old root")
	}
	if !serverLeaf(t, a).Equal(server) {
		t.Error("hosts don't trust the new root yet, but the server shows it")
	}
	if roots := a.Roots(); len(roots) != 2 || string(roots[0]) != string(oldRoot.Raw) {
		t.Errorf("roots: got %d, want 2 with the issuer of the server's certificate first", len(roots))
	}
	if _, err := a.Verify(host); err != nil {
		t.Errorf("old host: %v", err)
	}
	renewed := issue(t, a, "host/db1")
	if err := renewed.CheckSignatureFrom(a.Root()); err != nil {
		t.Errorf("renewed under the new root: %v", err)
	}
	if _, err := a.Verify(renewed); err != nil {
		t.Errorf("renewed host: %v", err)
	}

	// Long before the old server certificate ends, a new one takes its place.
	w.now = server.NotAfter.AddDate(0, 0, -8)
	a = w.open(t)
	if err := serverLeaf(t, a).CheckSignatureFrom(a.Root()); err != nil {
		t.Errorf("server certificate eight days before its end: %v", err)
	}
	// When nothing the lost key signed can be alive, it counts no more.
	if _, err := a.Verify(host); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("host of a root retired long ago: got %v, want dek.ErrDenied", err)
	}
	if got := len(a.Roots()); got != 1 {
		t.Errorf("roots: got %d, want 1", got)
	}
}

func TestRootIsIssuedAnew(t *testing.T) {
	w := newWorld(t)
	a := w.open(t)
	old, host := a.Root(), issue(t, a, "host/db1")
	w.now = host.NotAfter
	if got := w.open(t).Root(); !got.Equal(old) {
		t.Error("renewed too soon")
	}
	w.now = old.NotAfter.AddDate(0, -11, 0)
	a = w.open(t)
	if a.Root().Equal(old) {
		t.Fatal("eleven months before its end the root is still in use")
	}
	leaf := issue(t, a, "host/db1")
	if err := leaf.CheckSignatureFrom(old); err != nil {
		t.Errorf("a host with the old root only refuses the new certificate: %v", err)
	}
	if got := len(a.Roots()); got != 2 {
		t.Errorf("roots: got %d, want 2", got)
	}
}

func FuzzParseRecords(f *testing.F) {
	w := newWorld(f)
	a := w.open(f)
	seeds := [][]byte{w.shelf.kept["tls/ca"], w.shelf.kept["tls/server"], []byte("{}"), []byte("null"), nil}
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := a.ParseServer(b); err != nil && !errors.Is(err, dek.ErrCorrupt) {
			t.Errorf("server record: got %v, want dek.ErrCorrupt", err)
		}
		roots, err := identity.ParseRoots(b)
		if err != nil {
			if !errors.Is(err, dek.ErrCorrupt) || roots != nil {
				t.Errorf("roots: got %v, %v, want dek.ErrCorrupt", roots, err)
			}
			return
		}
		enc, err := identity.EncodeRoots(roots)
		if err != nil {
			t.Fatal(err)
		}
		again, err := identity.ParseRoots(enc)
		if err != nil || len(again) != len(roots) {
			t.Errorf("parse, encode, parse: got %d roots, %v, want %d", len(again), err, len(roots))
		}
	})
}
