package connector_test

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms/kmspb"
)

func wrapped(t testing.TB, keyring string, version uint32) dek.Wrapped {
	return must(dek.ParseWrapped(wrapKey(t, keyring, version, 0)))
}

func wantKey(t testing.TB, k *dek.Key, want []byte) {
	t.Helper()
	w := must(dek.KeyFrom(want))
	defer w.Destroy()
	if !k.Equal(w) {
		t.Error("got another key")
	}
}

func TestUnwrap(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	c := kms.client(t)
	k, err := c.Unwrap(testContext(t), wrapped(t, "orders", 3))
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy()
	wantKey(t, k, plainKey("orders", 3))
}

// The wire's classes come back as ours, with and without a reason.
func TestErrorClasses(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	c := kms.client(t)
	for _, tc := range []struct {
		name string
		err  error
		want error
	}{
		{"denied", errNo, dek.ErrDenied},
		{"denied by code", status.Error(codes.PermissionDenied, ""), dek.ErrDenied},
		{"nobody", status.Error(codes.Unauthenticated, ""), dek.ErrDenied},
		{"expired certificate", reason(codes.Unauthenticated, "UNAVAILABLE"), dek.ErrUnavailable},
		{"auth", reason(codes.InvalidArgument, "AUTH"), dek.ErrAuth},
		{"invalid", reason(codes.InvalidArgument, "INVALID"), dek.ErrInvalid},
		{"not found", reason(codes.NotFound, "NOT_FOUND"), dek.ErrNotFound},
		{"exists", reason(codes.AlreadyExists, "EXISTS"), dek.ErrExists},
		{"conflict", reason(codes.Aborted, "CONFLICT"), dek.ErrConflict},
		{"precondition", reason(codes.FailedPrecondition, "PRECONDITION"), dek.ErrPrecondition},
		{"exhausted", reason(codes.ResourceExhausted, "EXHAUSTED"), dek.ErrExhausted},
		{"corrupt", reason(codes.DataLoss, "CORRUPT"), dek.ErrCorrupt},
		{"foreign reason", status.Error(codes.NotFound, "NOT_OURS"), dek.ErrNotFound},
		{"unknown", status.Error(codes.Unknown, ""), dek.ErrUnavailable},
		{"internal", status.Error(codes.Internal, ""), dek.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kms.set(func() { kms.unwrapErr = tc.err })
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			_, err := c.Unwrap(ctx, wrapped(t, "orders", 1))
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if errors.Is(err, dek.ErrUnavailable) && errors.Is(err, dek.ErrDenied) {
				t.Errorf("%v is both denied and unavailable", err)
			}
			if !strings.Contains(err.Error(), kms.addr) || !strings.Contains(err.Error(), "acme/orders/1") {
				t.Errorf("%q names no endpoint or key", err)
			}
		})
	}
}

// An endpoint that fails in any way costs less than three seconds.
func TestFailover(t *testing.T) {
	ca := newTestCA(t, "ca")
	bad := map[string]func(t *testing.T) string{
		"refused":      refusedAddress,
		"hangs at TCP": func(t *testing.T) string { return serveRaw(t, func(c net.Conn) { hold(t, c) }) },
		"truncates TLS": func(t *testing.T) string {
			return serveRaw(t, func(c net.Conn) { _, _ = c.Write([]byte{22, 3}); _ = c.Close() })
		},
		"speaks nonsense": func(t *testing.T) string {
			return serveRaw(t, func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 no\r\n\r\n")); hold(t, c) })
		},
		"foreign CA": func(t *testing.T) string { return newFakeKMS(t, newTestCA(t, "evil")).addr },
		"client certificate as server": func(t *testing.T) string {
			k := newFakeKMS(t, ca)
			k.stop()
			k.tls = ca.serverTLS(t, x509.ExtKeyUsageClientAuth)
			k.start()
			return k.addr
		},
		"hangs at the call": func(t *testing.T) string {
			k := newFakeKMS(t, ca)
			k.gate = make(chan struct{})
			t.Cleanup(func() { close(k.gate) })
			return k.addr
		},
		"sick token": func(t *testing.T) string {
			k := newFakeKMS(t, ca)
			k.unwrapErr = reason(codes.Unavailable, "UNAVAILABLE")
			return k.addr
		},
	}
	for name, open := range bad {
		t.Run(name, func(t *testing.T) {
			good := newFakeKMS(t, ca)
			c := good.client(t, open(t), refusedAddress(t), good.addr)
			start := time.Now()
			k, err := c.Unwrap(testContext(t), wrapped(t, "orders", 1))
			if err != nil {
				t.Fatal(err)
			}
			k.Destroy()
			if d := time.Since(start); d > 3*time.Second {
				t.Errorf("took %v", d)
			}
			// What answered is asked first from now on.
			start = time.Now()
			k, err = c.Unwrap(testContext(t), wrapped(t, "orders", 2))
			if err != nil {
				t.Fatal(err)
			}
			k.Destroy()
			if d := time.Since(start); d > 400*time.Millisecond {
				t.Errorf("the second call took %v", d)
			}
		})
	}
}

func refusedAddress(t *testing.T) string {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return l.Addr().String()
}

// serveRaw runs f for each connection.
func serveRaw(t *testing.T, f func(net.Conn)) string {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { f(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

// hold keeps a connection open, answering nothing, until the test ends.
func hold(t *testing.T, c net.Conn) {
	<-t.Context().Done() // before cleanups
	_ = c.Close()
}

// A denial is an answer: nobody else is asked.
func TestDeniedIsFinal(t *testing.T) {
	ca := newTestCA(t, "ca")
	one, two := newFakeKMS(t, ca), newFakeKMS(t, ca)
	one.unwrapErr = errNo
	c := one.client(t, one.addr, two.addr)
	_, err := c.Unwrap(testContext(t), wrapped(t, "orders", 1))
	if !errors.Is(err, dek.ErrDenied) {
		t.Fatalf("got %v, want denied", err)
	}
	if n := two.count("Unwrap"); n != 0 {
		t.Errorf("the other endpoint was asked %d times", n)
	}
}

func TestSingleflight(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	kms.gate = make(chan struct{})
	c := kms.client(t)
	w := wrapped(t, "orders", 1)
	ctx := testContext(t)
	gone, leave := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Unwrap(gone, w); !errors.Is(err, dek.ErrUnavailable) || !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
	})
	for name := range kms.entered {
		if name == "Unwrap" {
			break
		}
	}
	const callers = 64
	for range callers {
		wg.Go(func() {
			k, err := c.Unwrap(ctx, w)
			if err != nil {
				t.Error(err)
				return
			}
			wantKey(t, k, plainKey("orders", 1))
			k.Destroy()
		})
	}
	for c.Boarded() < callers+1 {
		runtime.Gosched()
	}
	leave()
	close(kms.gate)
	wg.Wait()
	if n := kms.count("Unwrap"); n != 1 {
		t.Errorf("%d calls for %d callers", n, callers)
	}
}

func TestUnwrapBatch(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	kms.disabled["secret"] = true
	c := kms.client(t)
	ws := []dek.Wrapped{wrapped(t, "orders", 1), wrapped(t, "secret", 1), wrapped(t, "orders", 2)}
	rs, err := c.UnwrapBatch(testContext(t), ws)
	if err != nil {
		t.Fatal(err)
	}
	if !errors.Is(rs[1].Err, dek.ErrDenied) || rs[1].Key != nil {
		t.Errorf("disabled item: got %v", rs[1].Err)
	}
	wantKey(t, rs[0].Key, plainKey("orders", 1))
	wantKey(t, rs[2].Key, plainKey("orders", 2))
	rs[0].Key.Destroy()
	rs[2].Key.Destroy()
	many := make([]dek.Wrapped, 2500)
	for i := range many {
		many[i] = ws[0]
	}
	rs, err = c.UnwrapBatch(testContext(t), many)
	if err != nil || len(rs) != len(many) {
		t.Fatalf("got %d results, %v", len(rs), err)
	}
	for _, r := range rs {
		r.Key.Destroy()
	}
}

// The stream comes back by itself, and says so.
func TestWatchReconnects(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	c := kms.client(t)
	notices := make(chan connector.Notice, 100)
	ctx, cancel := context.WithCancel(testContext(t))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Watch(ctx, "shop", func(n connector.Notice) { notices <- n }); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	defer wg.Wait()
	defer cancel()
	next := func(want connector.NoticeKind) connector.Notice {
		t.Helper()
		for n := range notices {
			if n.Kind == want {
				return n
			}
			if n.Kind != connector.NoticePing && n.Kind != connector.NoticeLost { // Lost comes again and again
				t.Fatalf("got %v, want %v", n, want)
			}
		}
		panic("closed")
	}
	next(connector.NoticeConnected)
	kms.notify(kmspb.Notice_KIND_ROLLED, "orders")
	if n := next(connector.NoticeRolled); n.Keyring != "orders" || len(n.Checkpoint) == 0 {
		t.Errorf("got %+v", n)
	}
	kms.stop()
	if n := next(connector.NoticeLost); !errors.Is(n.Err, dek.ErrUnavailable) {
		t.Errorf("lost: %v", n.Err)
	}
	kms.start()
	next(connector.NoticeConnected)
	if err := c.Reconnect(); err != nil { // as after a renewal: not an outage
		t.Fatal(err)
	}
	next(connector.NoticeConnected)
	kms.set(func() { kms.watchErr = errNo })
	kms.stop()
	next(connector.NoticeLost)
	kms.start()
	if n := next(connector.NoticeDenied); !errors.Is(n.Err, dek.ErrDenied) {
		t.Errorf("denied: %v", n.Err)
	}
	kms.set(func() { kms.watchErr = nil })
	next(connector.NoticeConnected)
}

// GOAWAY during calls loses none of them.
func TestGoAway(t *testing.T) {
	kms := newFakeKMS(t, newTestCA(t, "ca"))
	c := kms.client(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for v := uint32(1); ; v++ {
				select {
				case <-stop:
					return
				default:
				}
				k, err := c.Unwrap(testContext(t), wrapped(t, "orders", v*4+uint32(i)))
				if err != nil {
					t.Errorf("call lost: %v", err)
					return
				}
				k.Destroy()
			}
		})
	}
	for range 3 {
		for range 20 {
			<-kms.entered
		}
		kms.server.GracefulStop()
		kms.served.Wait()
		kms.start()
	}
	close(stop)
	wg.Wait()
}
