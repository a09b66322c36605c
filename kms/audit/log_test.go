package audit_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// testKey is made once: keys are not what is tested here.
var testKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
})

func testConfig(t testing.TB, dir string) audit.Config {
	return audit.Config{
		Dir: dir, Signer: testKey(), CheckpointEvery: 10 * time.Millisecond, RetryEvery: 20 * time.Millisecond,
		SegmentBytes: 64 << 10,
		Logger:       slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
}

func newDir(t testing.TB) string { return filepath.Join(t.TempDir(), "audit") }

func open(t testing.TB, cfg audit.Config) *audit.Log {
	t.Helper()
	l, err := audit.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return l
}

func closeLog(t testing.TB, l *audit.Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// event makes a typical event; i varies it.
func event(i int, phase kms.Phase) kms.Event {
	return kms.Event{
		Time: time.Date(2026, 1, 2, 3, 4, 5, i%1000, time.UTC), Phase: phase, Operation: kms.OpKeyringUnwrap,
		Principal: "host/db1", Serial: "5f2b9d3c11", Remote: "192.0.2.17:40122", Correlation: fmt.Sprintf("c0ffee%08d", i),
		Object: "/vaults/payroll/keyrings/main", Version: 3, Count: 1, Rule: "service encryption user at /vaults/payroll",
	}
}

func mustAppend(t testing.TB, l *audit.Log, e kms.Event) uint64 {
	t.Helper()
	seq, err := l.Append(t.Context(), e)
	if err != nil {
		t.Fatalf("append: %v", err)
	}
	return seq
}

// act appends n pairs of intent and outcome.
func act(t testing.TB, l *audit.Log, n int) {
	t.Helper()
	for i := range n {
		e := event(i, kms.PhaseOutcome)
		e.Intent, e.Result = mustAppend(t, l, event(i, kms.PhaseIntent)), "ok"
		mustAppend(t, l, e)
	}
}

func verify(t testing.TB, dir string, exported ...[]byte) (audit.Report, error) {
	t.Helper()
	return audit.Verify(t.Context(), os.DirFS(dir), audit.Check{Keys: []crypto.PublicKey{testKey().Public()}, Exported: exported})
}

func mustVerify(t testing.TB, dir string) audit.Report {
	t.Helper()
	r, err := verify(t, dir)
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	return r
}

func TestAppend(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, 500) // several segments of 64 KiB
	closeLog(t, l)
	r := mustVerify(t, dir)
	if r.Last != 1001 || r.Newest.Size != 1001 || r.Uncovered != 0 || r.Torn != 0 || r.First != 1 {
		t.Errorf("got %+v, want 1001 records, all covered", r)
	}
	segs, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(segs) < 3 {
		t.Errorf("%d segments (%v), want several", len(segs), err)
	}
	l = open(t, testConfig(t, dir))
	defer closeLog(t, l)
	if got := l.Recovery(); got.Torn != 0 || len(got.Orphans) != 0 || got.Rebuilt {
		t.Errorf("a clean log needed mending: %+v", got)
	}
	if got := mustAppend(t, l, event(1, kms.PhaseRefused)); got != 1002 {
		t.Errorf("next sequence %d, want 1002", got)
	}
	var n uint64
	for rec, err := range l.Records(t.Context(), audit.Filter{}) {
		if n++; err != nil || rec.Seq != n {
			t.Fatalf("record %d: sequence %d, %v", n, rec.Seq, err)
		}
	}
	if n != 1002 {
		t.Errorf("read %d records, want 1002", n)
	}
}

func TestConcurrent(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	const callers, each = 64, 50
	var mu sync.Mutex
	got := map[uint64]string{}
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range each {
				e := event(c*each+i, kms.PhaseRefused)
				seq, err := l.Append(context.Background(), e)
				if err != nil {
					t.Errorf("append: %v", err)
					return
				}
				mu.Lock()
				got[seq] = e.Correlation
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(got) != callers*each {
		t.Fatalf("%d sequences for %d records", len(got), callers*each)
	}
	for rec, err := range l.Records(t.Context(), audit.Filter{From: 2}) {
		if err != nil || got[rec.Seq] != rec.Event.Correlation {
			t.Fatalf("record %d is %q, want %q (%v)", rec.Seq, rec.Event.Correlation, got[rec.Seq], err)
		}
	}
	closeLog(t, l)
	mustVerify(t, dir)
}

func TestFilter(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	base := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	for i, e := range []kms.Event{
		{Operation: kms.OpKeyRoll, Principal: "person/alice", Object: "/vaults/a/keys/k"},
		{Operation: kms.OpKeyRoll, Principal: "person/bob", Object: "/vaults/a"},
		{Operation: kms.OpKeyRead, Principal: "person/alice", Object: "/vaults/ab"},
	} {
		e.Phase, e.Time = kms.PhaseRefused, base.Add(time.Duration(i)*time.Hour)
		mustAppend(t, l, e)
	}
	for _, c := range []struct {
		name string
		f    audit.Filter
		want []uint64
	}{
		{"all", audit.Filter{}, []uint64{1, 2, 3, 4}},
		{"sequences", audit.Filter{From: 2, To: 3}, []uint64{2, 3}},
		{"beyond the end", audit.Filter{From: 4, To: 99}, []uint64{4}},
		{"principal", audit.Filter{Principal: "person/alice"}, []uint64{2, 4}},
		{"operation", audit.Filter{Operation: kms.OpKeyRoll}, []uint64{2, 3}},
		{"object and below", audit.Filter{Object: "/vaults/a"}, []uint64{2, 3}},
		{"time", audit.Filter{From: 2, Since: base.Add(time.Hour), Till: base.Add(2 * time.Hour)}, []uint64{3}},
	} {
		var got []uint64
		for rec, err := range l.Records(t.Context(), c.f) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, rec.Seq)
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
}

func TestTail(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	for _, c := range []uint64{1, 3, 2} {
		e := event(int(c), kms.PhaseOutcome)
		e.Change, e.State, e.Result = c, []byte{byte(c)}, "unavailable"
		mustAppend(t, l, e)
	}
	check := func(l *audit.Log) {
		t.Helper()
		change, state, err := l.StateTail(t.Context())
		if change != 3 || !bytes.Equal(state, []byte{3}) || err != nil {
			t.Errorf("tail %d %x (%v), want 3 03", change, state, err)
		}
		var got []uint64
		err = l.EventsAfter(t.Context(), 1, func(_ uint64, e kms.Event) error { got = append(got, e.Change); return nil })
		if fmt.Sprint(got) != "[3 2]" || err != nil {
			t.Errorf("events after 1: %v (%v), want [3 2]", got, err)
		}
	}
	check(l)
	closeLog(t, l)
	l = open(t, testConfig(t, dir))
	defer closeLog(t, l)
	check(l)
}

func TestOrphans(t *testing.T) {
	dir := newDir(t)
	l := open(t, testConfig(t, dir))
	act(t, l, 3)
	lost := mustAppend(t, l, event(7, kms.PhaseIntent))
	closeLog(t, l)
	l = open(t, testConfig(t, dir))
	if got := l.Recovery().Orphans; len(got) != 1 || got[0] != lost {
		t.Errorf("orphans %v, want [%d]", got, lost)
	}
	var last audit.Record
	for rec, err := range l.Records(t.Context(), audit.Filter{}) {
		if last = rec; err != nil {
			t.Fatal(err)
		}
	}
	if e := last.Event; e.Intent != lost || e.Phase != kms.PhaseOutcome || e.Result != "unknown" || e.Operation != kms.OpKeyringUnwrap {
		t.Errorf("closing record %+v", e)
	}
	closeLog(t, l)
	l = open(t, testConfig(t, dir))
	defer closeLog(t, l)
	if got := l.Recovery().Orphans; len(got) != 0 {
		t.Errorf("orphans %v again", got)
	}
}

func TestLateIntent(t *testing.T) {
	cfg := testConfig(t, newDir(t))
	cfg.OrphanAfter = time.Nanosecond
	l := open(t, cfg)
	defer closeLog(t, l)
	intent := mustAppend(t, l, event(1, kms.PhaseIntent))
	for l.Newest().Open != l.Newest().Size+1 || l.Size() < intent+1 {
		if err := t.Context().Err(); err != nil {
			t.Fatal("the intent was never closed")
		}
	}
}

func TestRefusals(t *testing.T) {
	weak, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	readable := newDir(t)
	if err := os.Mkdir(readable, 0o755); err != nil {
		t.Fatal(err)
	}
	used := newDir(t)
	defer closeLog(t, open(t, testConfig(t, used)))
	for _, c := range []struct {
		name, text string
		edit       func(*audit.Config)
		want       error
	}{
		{"relative", "absolute", func(c *audit.Config) { c.Dir = "audit" }, dek.ErrInvalid},
		{"no key", "no audit key", func(c *audit.Config) { c.Signer = nil }, dek.ErrInvalid},
		{"P-384", "can't sign", func(c *audit.Config) { c.Signer = weak }, dek.ErrInvalid},
		{"segment", "below", func(c *audit.Config) { c.SegmentBytes = 1 }, dek.ErrInvalid},
		{"checkpoints", "at most 1s", func(c *audit.Config) { c.CheckpointEvery = time.Minute }, dek.ErrInvalid},
		{"others can read", "0700", func(c *audit.Config) { c.Dir = readable }, dek.ErrInvalid},
		{"in use", "another process", func(c *audit.Config) { c.Dir = used }, dek.ErrPrecondition},
	} {
		cfg := testConfig(t, newDir(t))
		c.edit(&cfg)
		if _, err := audit.Open(t.Context(), cfg); !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: got %v, want %v with %q", c.name, err, c.want, c.text)
		}
	}
	l := open(t, testConfig(t, newDir(t)))
	for name, edit := range map[string]func(*kms.Event){
		"no phase":      func(e *kms.Event) { e.Phase = 0 },
		"unknown phase": func(e *kms.Event) { e.Phase = 9 },
		"no operation":  func(e *kms.Event) { e.Operation = "" },
		"no principal":  func(e *kms.Event) { e.Principal = "" },
		"negative":      func(e *kms.Event) { e.Count = -1 },
		"future intent": func(e *kms.Event) { e.Intent = 99 },
		"far year":      func(e *kms.Event) { e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"too long":      func(e *kms.Event) { e.Note = strings.Repeat("x", audit.MaxRecord) },
	} {
		e := event(1, kms.PhaseOutcome)
		edit(&e)
		if _, err := l.Append(t.Context(), e); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	if l.Size() != 1 {
		t.Errorf("refused events left %d records", l.Size()-1)
	}
	closeLog(t, l)
	if _, err := l.Append(t.Context(), event(1, kms.PhaseIntent)); !errors.Is(err, dek.ErrUnavailable) {
		t.Errorf("closed: got %v, want ErrUnavailable", err)
	}
}

func TestRSA(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	dir := newDir(t)
	cfg := testConfig(t, dir)
	cfg.Signer = key
	l := open(t, cfg)
	act(t, l, 5)
	closeLog(t, l)
	if _, err := audit.Verify(t.Context(), os.DirFS(dir), audit.Check{Keys: []crypto.PublicKey{key.Public()}}); err != nil {
		t.Errorf("verify: %v", err)
	}
	if _, err := verify(t, dir); !errors.Is(err, dek.ErrCorrupt) {
		t.Errorf("foreign key: got %v, want ErrCorrupt", err)
	}
}
