package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// patience bounds how long a test waits for what must happen at once.
const patience = 20 * time.Second

// Run checks that the stores which open makes keep the contract of kms.Store.
// Each call of open must return an empty store of its own and clean up by t.
func Run(t *testing.T, open func(t *testing.T) kms.Store) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, kms.Store)
	}{
		{"empty", testEmpty},
		{"put, replace, delete", testLife},
		{"expectations", testExpect},
		{"all or nothing", testAtomic},
		{"refusals", testRefusals},
		{"values are opaque", testOpaque},
		{"many records", testMany},
		{"one winner", testWinner},
		{"load is consistent", testConsistent},
		{"watch", testWatch},
		{"watch is ended", testWatchEnds},
		{"load stops at an error", testLoadError},
		{"cancelled", testCancelled},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, open(t)) })
	}
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func commit(t *testing.T, s kms.Store, changes ...kms.Change) int64 {
	t.Helper()
	rev, err := s.Commit(bounded(t), changes)
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	return rev
}

func load(t *testing.T, s kms.Store) (map[string]kms.Record, int64) {
	t.Helper()
	got := map[string]kms.Record{}
	rev, err := s.Load(bounded(t), func(r kms.Record) error {
		if _, twice := got[r.Path]; twice {
			t.Errorf("load: %q twice", r.Path)
		}
		got[r.Path] = r
		return nil
	})
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return got, rev
}

func testEmpty(t *testing.T, s kms.Store) {
	got, rev := load(t, s)
	if len(got) != 0 || rev < 0 {
		t.Fatalf("empty store: %d records at revision %d", len(got), rev)
	}
}

func testLife(t *testing.T, s kms.Store) {
	_, rev0 := load(t, s)
	r1 := commit(t, s, kms.Change{Path: "vaults/a", Value: []byte("one")})
	r2 := commit(t, s, kms.Change{Path: "vaults/a", Value: []byte("two"), Expect: r1})
	if r1 <= rev0 || r2 <= r1 {
		t.Errorf("revisions %d, %d, %d do not rise", rev0, r1, r2)
	}
	got, rev := load(t, s)
	if r := got["vaults/a"]; string(r.Value) != "two" || r.Revision != r2 || rev != r2 {
		t.Errorf("got %q at %d, loaded at %d; want \"two\" at %d", r.Value, r.Revision, rev, r2)
	}
	r3 := commit(t, s, kms.Change{Path: "vaults/a", Expect: r2})
	if got, rev := load(t, s); len(got) != 0 || rev != r3 {
		t.Errorf("after the delete: %d records at %d, want none at %d", len(got), rev, r3)
	}
	commit(t, s, kms.Change{Path: "vaults/a", Value: []byte("again")}) // Expect 0: it does not exist
}

func testExpect(t *testing.T, s kms.Store) {
	r1 := commit(t, s, kms.Change{Path: "a", Value: []byte("1")})
	r2 := commit(t, s, kms.Change{Path: "a", Value: []byte("2"), Expect: r1})
	for _, c := range []struct {
		name   string
		change kms.Change
	}{
		{"create what exists", kms.Change{Path: "a", Value: []byte("x")}},
		{"old revision", kms.Change{Path: "a", Value: []byte("x"), Expect: r1}},
		{"future revision", kms.Change{Path: "a", Value: []byte("x"), Expect: r2 + 1}},
		{"absent record", kms.Change{Path: "b", Value: []byte("x"), Expect: r2}},
		{"delete at old revision", kms.Change{Path: "a", Expect: r1}},
		{"delete absent record", kms.Change{Path: "b", Expect: r2}},
	} {
		if _, err := s.Commit(bounded(t), []kms.Change{c.change}); !errors.Is(err, dek.ErrConflict) {
			t.Errorf("%s: got %v, want ErrConflict", c.name, err)
		}
	}
	if got, rev := load(t, s); string(got["a"].Value) != "2" || len(got) != 1 || rev != r2 {
		t.Errorf("refused changes left a trace: %v at %d", got, rev)
	}
}

func testAtomic(t *testing.T, s kms.Store) {
	r := commit(t, s, kms.Change{Path: "a", Value: []byte("1")}, kms.Change{Path: "b", Value: []byte("1")})
	_, err := s.Commit(bounded(t), []kms.Change{
		{Path: "a", Value: []byte("2"), Expect: r},
		{Path: "c", Value: []byte("2")},
		{Path: "b", Expect: r + 7},
	})
	if !errors.Is(err, dek.ErrConflict) {
		t.Fatalf("got %v, want ErrConflict", err)
	}
	got, _ := load(t, s)
	if len(got) != 2 || string(got["a"].Value) != "1" || string(got["b"].Value) != "1" {
		t.Errorf("half a transaction is visible: %v", got)
	}
	r2 := commit(t, s, kms.Change{Path: "a", Value: []byte("3"), Expect: r}, kms.Change{Path: "b", Expect: r})
	got, _ = load(t, s)
	if len(got) != 1 || got["a"].Revision != r2 {
		t.Errorf("got %v, want a alone at %d", got, r2)
	}
}

func testRefusals(t *testing.T, s kms.Store) {
	for name, changes := range map[string][]kms.Change{
		"empty transaction": nil,
		"empty path":        {{Value: []byte("x")}},
		"path twice":        {{Path: "a", Value: []byte("x")}, {Path: "a", Value: []byte("y")}},
		"delete of nothing": {{Path: "a"}},
		"negative revision": {{Path: "a", Value: []byte("x"), Expect: -1}},
	} {
		if _, err := s.Commit(bounded(t), changes); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	if got, _ := load(t, s); len(got) != 0 {
		t.Errorf("refused changes left a trace: %v", got)
	}
}

func testOpaque(t *testing.T, s kms.Store) {
	values := map[string][]byte{
		"empty": {}, "zeros": make([]byte, 2048), "all": nil, "path/with/ü and space": []byte("x"), "big": bytes.Repeat([]byte{7}, 512<<10),
	}
	for i := range 256 {
		values["all"] = append(values["all"], byte(i))
	}
	for p, v := range values {
		commit(t, s, kms.Change{Path: p, Value: v})
	}
	got, _ := load(t, s)
	for p, want := range values {
		if r, ok := got[p]; !ok || r.Value == nil || !bytes.Equal(r.Value, want) {
			t.Errorf("%q: got %d bytes (present %v), want %d", p, len(r.Value), ok, len(want))
		}
	}
}

func testMany(t *testing.T, s kms.Store) {
	const n, group = 2500, 100
	for i := 0; i < n; i += group {
		var changes []kms.Change
		for j := i; j < i+group; j++ {
			changes = append(changes, kms.Change{Path: fmt.Sprintf("r/%05d", j), Value: fmt.Appendf(nil, "value %d", j)})
		}
		commit(t, s, changes...)
	}
	got, _ := load(t, s)
	if len(got) != n {
		t.Fatalf("got %d records, want %d", len(got), n)
	}
	for i := range n {
		if r := got[fmt.Sprintf("r/%05d", i)]; string(r.Value) != fmt.Sprintf("value %d", i) {
			t.Fatalf("record %d: %q", i, r.Value)
		}
	}
}

// testWinner lets many writers race for one record: each revision is won once.
func testWinner(t *testing.T, s kms.Store) {
	const writers, rounds = 8, 10
	rev := commit(t, s, kms.Change{Path: "a", Value: []byte("start")})
	for range rounds {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var won []int64
		for w := range writers {
			wg.Go(func() {
				r, err := s.Commit(bounded(t), []kms.Change{{Path: "a", Value: []byte{byte(w)}, Expect: rev}})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won = append(won, r)
				} else if !errors.Is(err, dek.ErrConflict) {
					t.Errorf("got %v, want ErrConflict", err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d writers won revision %d", len(won), rev)
		}
		rev = won[0]
	}
}

// testConsistent loads while two records change together: they never differ.
func testConsistent(t *testing.T, s kms.Store) {
	rev := commit(t, s, kms.Change{Path: "a", Value: []byte("0")}, kms.Change{Path: "z", Value: []byte("0")})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			v := fmt.Appendf(nil, "%d", i)
			r, err := s.Commit(bounded(t), []kms.Change{{Path: "a", Value: v, Expect: rev}, {Path: "z", Value: v, Expect: rev}})
			if err != nil {
				t.Errorf("commit: %v", err)
				return
			}
			rev = r
		}
	})
	for range 50 {
		got, at := load(t, s)
		if a, z := got["a"], got["z"]; string(a.Value) != string(z.Value) || a.Revision > at {
			t.Errorf("a = %q, z = %q at %d, loaded at %d", a.Value, z.Value, a.Revision, at)
		}
	}
	close(stop)
	wg.Wait()
}

type seen struct {
	rev  int64
	recs []kms.Record
}

// testWatch checks that a watch from a past revision sees each transaction
// once, in order and whole.
func testWatch(t *testing.T, s kms.Store) {
	r1 := commit(t, s, kms.Change{Path: "before", Value: []byte("x")})
	r2 := commit(t, s, kms.Change{Path: "a", Value: []byte("1")}, kms.Change{Path: "b", Value: []byte{}})
	got := make(chan seen, 16)
	ctx, cancel := context.WithCancel(bounded(t))
	ended := make(chan error, 1)
	go func() {
		ended <- s.Watch(ctx, r1, func(recs []kms.Record, rev int64) error {
			got <- seen{rev, recs}
			return nil
		})
	}()
	expect := func(rev int64, n int) []kms.Record {
		t.Helper()
		select {
		case g := <-got:
			if g.rev != rev || len(g.recs) != n {
				t.Fatalf("got %d records at %d, want %d at %d", len(g.recs), g.rev, n, rev)
			}
			return g.recs
		case <-ctx.Done():
			t.Fatalf("nothing seen of revision %d", rev)
			return nil
		}
	}
	for _, r := range expect(r2, 2) {
		if r.Value == nil || r.Revision != r2 {
			t.Errorf("record %q: nil value or revision %d", r.Path, r.Revision)
		}
	}
	r3 := commit(t, s, kms.Change{Path: "a", Value: []byte("2"), Expect: r2}, kms.Change{Path: "b", Expect: r2})
	for _, r := range expect(r3, 2) {
		if (r.Value == nil) != (r.Path == "b") {
			t.Errorf("record %q: value %q", r.Path, r.Value)
		}
	}
	for range 5 {
		_, rev := load(t, s)
		expect(commit(t, s, kms.Change{Path: fmt.Sprintf("n/%d", rev), Value: []byte("x")}), 1)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("watch ended with %v, want context.Canceled", err)
	}
}

func testWatchEnds(t *testing.T, s kms.Store) {
	rev := commit(t, s, kms.Change{Path: "a", Value: []byte("1")})
	stop := errors.New("enough")
	if err := s.Watch(bounded(t), rev-1, func([]kms.Record, int64) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("got %v, want the callback's error", err)
	}
}

func testLoadError(t *testing.T, s kms.Store) {
	commit(t, s, kms.Change{Path: "a", Value: []byte("1")}, kms.Change{Path: "b", Value: []byte("1")})
	stop, n := errors.New("enough"), 0
	_, err := s.Load(bounded(t), func(kms.Record) error { n++; return stop })
	if !errors.Is(err, stop) || n != 1 {
		t.Errorf("got %v after %d records, want the callback's error after 1", err, n)
	}
}

func testCancelled(t *testing.T, s kms.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Commit(ctx, []kms.Change{{Path: "a", Value: []byte("1")}}); err != nil && !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("commit: got %v, want ErrUnavailable", err)
	}
	if _, err := s.Load(ctx, func(kms.Record) error { return nil }); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("load: got %v, want ErrUnavailable", err)
	}
	load(t, s) // and the store still works
}
