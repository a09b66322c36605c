package kms_test

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/access"
	"github.com/keyward/keyward/kms/storetest"
)

// A journal is an Auditor in memory with faults: fail decides about each
// record before (not done) and after (done) it is kept.
type journal struct {
	mu     sync.Mutex
	events []kms.Event
	fail   func(n int, e kms.Event) storetest.Fault
	before func(kms.Event) // called first, without the lock; nil: nothing
	stale  []byte          // a checkpoint that the log does not extend
}

func (j *journal) Append(_ context.Context, e kms.Event) (uint64, error) {
	if j.before != nil {
		j.before(e)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	var f storetest.Fault
	if j.fail != nil {
		f = j.fail(len(j.events)+1, e)
	}
	if f == storetest.FailedNotDone {
		return 0, fmt.Errorf("%w: the log's disk", dek.ErrUnavailable)
	}
	j.events = append(j.events, e)
	if f == storetest.FailedButDone {
		return 0, fmt.Errorf("%w: the log's disk", dek.ErrUnavailable)
	}
	return uint64(len(j.events)), nil
}

func (j *journal) Head(context.Context) ([]byte, error) {
	n, _, _ := j.StateTail(context.Background())
	j.mu.Lock()
	defer j.mu.Unlock()
	return fmt.Appendf(nil, "test/log\n%d\nchange %d -\n", len(j.events), n), nil
}

func (j *journal) Extends(_ context.Context, old []byte) error {
	if j.stale != nil && bytes.Equal(old, j.stale) {
		return fmt.Errorf("%w: behind", dek.ErrCorrupt)
	}
	return nil
}

func (j *journal) StateTail(context.Context) (n uint64, state []byte, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.events {
		if e.Change > n {
			n, state = e.Change, e.State
		}
	}
	return n, state, nil
}

func (j *journal) EventsAfter(_ context.Context, change uint64, f func(uint64, kms.Event) error) error {
	j.mu.Lock()
	events := j.events
	j.mu.Unlock()
	for i, e := range events {
		if e.Change > change || e.Result == kms.ResultUnknown {
			if err := f(uint64(i+1), e); err != nil {
				return err
			}
		}
	}
	return nil
}

// closeIntents does what a log does at start with intents that have no outcome.
func (j *journal) closeIntents() {
	j.mu.Lock()
	defer j.mu.Unlock()
	open := make(map[uint64]kms.Event)
	for i, e := range j.events {
		if e.Phase == kms.PhaseIntent {
			open[uint64(i+1)] = e
		}
		delete(open, e.Intent)
	}
	for seq, e := range open {
		e.Phase, e.Intent, e.Result = kms.PhaseOutcome, seq, kms.ResultUnknown
		j.events = append(j.events, e)
	}
}

func (j *journal) copy() *journal {
	j.mu.Lock()
	defer j.mu.Unlock()
	return &journal{events: append([]kms.Event(nil), j.events...)}
}

// of returns the events of an operation.
func (j *journal) of(op kms.Operation) (out []kms.Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.events {
		if e.Operation == op {
			out = append(out, e)
		}
	}
	return out
}

// A clock is set by the test; unset it is the system's.
type clock struct {
	mu     sync.Mutex
	offset time.Duration
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.offset)
}

func (c *clock) jump(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offset += d
}

// A token is the fake with a name and a hash.
type token struct{ *hsmtest.Fake }

func (t token) OAEPHash() crypto.Hash         { return crypto.SHA256 }
func (t token) RestsOnRSA(sealed []byte) bool { return hsm.RestsOnRSA(sealed) }
func (t token) Describe() string              { return "fake" }

// A target keeps the newest backup.
type target struct {
	mu   sync.Mutex
	name string
	data []byte
	puts int
	err  error
}

func (t *target) Put(_ context.Context, name string, r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return t.err
	}
	t.name, t.data = name, b
	t.puts++
	return nil
}

func (t *target) String() string { return "memory" }

// A house is one installation with everything around it.
type house struct {
	t       testing.TB
	store   *storetest.Memory
	token   token
	tokenIn string
	journal *journal
	clock   *clock
	target  *target
	policy  *access.Policy
	edit    func(*kms.Config)
	s       *kms.Service
	first   *kms.EnrolmentToken
}

var (
	admin   = kms.Caller{Principal: "person/admin", Remote: "10.0.0.1:1"}
	officer = kms.Caller{Principal: "person/officer", Remote: "10.0.0.2:1"}
	auditor = kms.Caller{Principal: "person/auditor"}
	db1     = kms.Caller{Principal: "host/db1", Remote: "10.0.1.1:1"}
	db2     = kms.Caller{Principal: "host/db2", Remote: "10.0.1.2:1"}
	root    = kms.Caller{Principal: access.LocalRoot}
)

// newHouse makes an installation and opens it.
func newHouse(t testing.TB, recipient string) *house {
	t.Helper()
	h := &house{t: t, store: storetest.NewMemory(), journal: &journal{}, clock: &clock{}, tokenIn: t.TempDir() + "/token"}
	h.token = token{hsmtest.OpenFake(t, h.tokenIn)}
	h.policy = must(access.New(kms.Operations()...))
	h.init(recipient)
	h.open()
	return h
}

func (h *house) config() kms.Config {
	cfg := kms.Config{Token: h.token, Store: h.store, Clock: h.clock, Authorizer: h.policy, Auditor: h.journal}
	if h.target != nil {
		cfg.Backups = h.target
	}
	if h.edit != nil {
		h.edit(&cfg)
	}
	return cfg
}

func (h *house) init(recipient string) {
	h.t.Helper()
	var err error
	h.first, err = kms.Init(h.t.Context(), h.config(), kms.InitRequest{Recipient: recipient, FirstAdministrator: admin.Principal})
	check(h.t, err)
}

func (h *house) open() {
	h.t.Helper()
	check(h.t, h.tryOpen())
	s := h.s
	h.t.Cleanup(func() { s.Close() })
}

func (h *house) tryOpen() (err error) {
	h.s, err = kms.Open(h.t.Context(), h.config())
	return err
}

// reopen is a restart after a crash or a stop.
func (h *house) reopen() {
	h.t.Helper()
	h.s.Close()
	h.open()
}

// furnish makes vault v, key k (RSA-2048), keyring r, instance db1 and the
// grants of officer and auditor.
func (h *house) furnish() {
	h.t.Helper()
	ctx := h.t.Context()
	check(h.t, h.s.AddGrant(ctx, admin, kms.Grant{Principal: officer.Principal, Role: "crypto officer", Scope: "/"}))
	check(h.t, h.s.AddGrant(ctx, admin, kms.Grant{Principal: auditor.Principal, Role: "auditor", Scope: "/"}))
	_, err := h.s.CreateVault(ctx, officer, "v")
	check(h.t, err)
	_, err = h.s.CreateKey(ctx, officer, kms.CreateKey{RequestID: "k1", Vault: "v", Name: "k", Bits: 2048})
	check(h.t, err)
	_, err = h.s.CreateKeyring(ctx, officer, kms.CreateKeyring{RequestID: "r1", Vault: "v", Name: "r", MasterKey: "k", ServerKey: 1})
	check(h.t, err)
	_, _, err = h.s.PrepareInstance(ctx, officer, kms.PrepareInstance{RequestID: "i1", Kind: "mariadb", Name: "db1", Vault: "v", Keyrings: []string{"r"}})
	check(h.t, err)
}

// wraps returns the wrapped DEKs that db1 gets.
func (h *house) wraps() []dek.Wrapped {
	h.t.Helper()
	v, err := h.s.OpenInstance(h.t.Context(), db1, kms.OpenInstance{Instance: "db1"})
	check(h.t, err)
	var out []dek.Wrapped
	for _, r := range v.Keyrings {
		for _, m := range r.Versions {
			if len(m.Wrapped) > 0 {
				out = append(out, must(dek.ParseWrapped(m.Wrapped)))
			}
		}
	}
	return out
}

// bytesOf unwraps w as db1 and returns a copy of the key's bytes.
func (h *house) bytesOf(w dek.Wrapped) []byte {
	h.t.Helper()
	k, err := h.s.Unwrap(h.t.Context(), db1, w)
	check(h.t, err)
	defer k.Destroy()
	var out []byte
	check(h.t, k.Use(func(b []byte) error { out = bytes.Clone(b); return nil }))
	return out
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
