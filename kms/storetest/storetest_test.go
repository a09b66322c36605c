package storetest_test

import (
	"context"
	"errors"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(*testing.T) kms.Store { return storetest.NewMemory() })
}

func count(t *testing.T, m *storetest.Memory) int {
	t.Helper()
	n := 0
	if _, err := m.Load(t.Context(), func(kms.Record) error { n++; return nil }); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestFaults(t *testing.T) {
	change := []kms.Change{{Path: "a", Value: []byte("1")}}
	for _, c := range []struct {
		name  string
		fault storetest.Fault
		want  int
	}{
		{"failed, not done", storetest.FailedNotDone, 0},
		{"failed, but done", storetest.FailedButDone, 1},
	} {
		m := storetest.NewMemory()
		m.Inject(storetest.FailNth("commit", 1, c.fault), nil)
		if _, err := m.Commit(t.Context(), change); !errors.Is(err, dek.ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrUnavailable", c.name, err)
		}
		if got := count(t, m); got != c.want {
			t.Errorf("%s: %d records, want %d", c.name, got, c.want)
		}
	}
}

func TestAttacker(t *testing.T) {
	m := storetest.NewMemory()
	if _, err := m.Commit(t.Context(), []kms.Change{{Path: "a", Value: []byte("1")}}); err != nil {
		t.Fatal(err)
	}
	old := m.Snapshot()
	m.Tamper(func(v map[string][]byte) { v["a"][0] ^= 1; v["b"] = []byte("planted") })
	if got := count(t, m); got != 2 {
		t.Errorf("after tampering: %d records, want 2", got)
	}
	if got := count(t, old); got != 1 {
		t.Errorf("snapshot: %d records, want 1", got)
	}
	if err := m.Compact(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := m.Watch(t.Context(), 1, func([]kms.Record, int64) error { return context.Canceled })
	if !errors.Is(err, dek.ErrConflict) {
		t.Errorf("watch of compacted history: got %v, want ErrConflict", err)
	}
}
