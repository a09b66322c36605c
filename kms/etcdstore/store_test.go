package etcdstore_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/etcdstore"
	"github.com/keyward/keyward/kms/storetest"
)

// testLog passes warnings to the log of the test.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func open(t testing.TB, dir string) *etcdstore.Store {
	t.Helper()
	s, err := etcdstore.Open(t.Context(), etcdstore.Config{Dir: dir, Logger: testLog(t)})
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

func newDir(t testing.TB) string { return filepath.Join(t.TempDir(), "store") }

func closeStore(t testing.TB, s *etcdstore.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) kms.Store {
		s := open(t, newDir(t))
		t.Cleanup(func() { closeStore(t, s) })
		return s
	})
}

// sealed makes a value like those of the layer above: random.
func sealed(n int) []byte {
	var seed [32]byte
	b := make([]byte, n)
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	_, _ = rand.NewChaCha8(seed).Read(b) // never fails
	return b
}

func TestReopen(t *testing.T) {
	dir := newDir(t)
	var rev int64
	for i := range 5 {
		start := time.Now()
		s := open(t, dir)
		t.Logf("open %d: %v", i, time.Since(start))
		n := 0
		got, err := s.Load(t.Context(), func(kms.Record) error { n++; return nil })
		if err != nil || n != i || got < rev {
			t.Fatalf("round %d: %d records at %d (%v), want %d at %d", i, n, got, err, i, rev)
		}
		if rev, err = s.Commit(t.Context(), []kms.Change{{Path: fmt.Sprint(i), Value: sealed(700)}}); err != nil {
			t.Fatal(err)
		}
		closeStore(t, s)
	}
}

func TestRefusals(t *testing.T) {
	readable := newDir(t)
	if err := os.Mkdir(readable, 0o750); err != nil {
		t.Fatal(err)
	}
	used := newDir(t)
	s := open(t, used)
	defer closeStore(t, s)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, text string
		cfg        etcdstore.Config
		want       error
	}{
		{"nothing", "directory or endpoints", etcdstore.Config{}, dek.ErrInvalid},
		{"both", "not both", etcdstore.Config{Dir: "/x", Endpoints: []string{"https://a:1"}}, dek.ErrInvalid},
		{"relative", "absolute", etcdstore.Config{Dir: "store"}, dek.ErrInvalid},
		{"no TLS", "client certificate", etcdstore.Config{Endpoints: []string{"https://a:1"}}, dek.ErrInvalid},
		{"plain http", "https://", etcdstore.Config{Endpoints: []string{"http://a:1"}}, dek.ErrInvalid},
		{"prefix", "prefix", etcdstore.Config{Dir: "/x", Prefix: "k"}, dek.ErrInvalid},
		{"quota", "quota", etcdstore.Config{Dir: "/x", QuotaBytes: 1}, dek.ErrInvalid},
		{"others can read", "chmod 0700", etcdstore.Config{Dir: readable}, dek.ErrInvalid},
		{"in use", "another process", etcdstore.Config{Dir: used}, dek.ErrPrecondition},
		{"not a directory", file, etcdstore.Config{Dir: file}, dek.ErrInvalid},
	} {
		_, err := etcdstore.Open(t.Context(), c.cfg)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v, want %v with %q", c.name, err, c.want, c.text)
		}
	}
	st, err := os.Stat(used)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory made with %v (%v), want 0700", st.Mode(), err)
	}
}

// TestNoPort looks for sockets the process did not have before.
func TestNoPort(t *testing.T) {
	before := sockets(t)
	s := open(t, newDir(t))
	defer closeStore(t, s)
	if after := sockets(t); after > before {
		t.Errorf("%d sockets before, %d after", before, after)
	}
}

func sockets(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

func TestClosed(t *testing.T) {
	s := open(t, newDir(t))
	watched := make(chan error, 1)
	go func() {
		watched <- s.Watch(context.Background(), 0, func([]kms.Record, int64) error { return nil })
	}()
	closeStore(t, s)
	if err := <-watched; !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("watch: got %v, want ErrUnavailable", err)
	}
	if _, err := s.Commit(t.Context(), []kms.Change{{Path: "a", Value: []byte("1")}}); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("commit: got %v, want ErrUnavailable", err)
	}
}

func TestCompacted(t *testing.T) {
	s := open(t, newDir(t))
	defer closeStore(t, s)
	var rev int64
	var err error
	for range 5 {
		if rev, err = s.Commit(t.Context(), []kms.Change{{Path: "a", Value: sealed(100), Expect: rev}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = s.Watch(t.Context(), 1, func([]kms.Record, int64) error { return nil })
	if !errors.Is(err, dek.ErrConflict) {
		t.Errorf("watch of forgotten history: got %v, want ErrConflict", err)
	}
}
