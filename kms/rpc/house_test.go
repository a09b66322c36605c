package rpc_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/rpc"
)

// A house stands in for the service where a test is about the door: it answers
// everything, notes who came, and fails as it is told. The real service is
// behind the door in service_test.go.
type house struct {
	calls    atomic.Int64
	mu       sync.Mutex
	fail     error // answer of every call
	last     kms.Caller
	deadline time.Time // of the last call's context, zero if none
	revoked  map[string]bool
	token    string // the one enrolment token, empty once it is used
	enter    func(ctx context.Context) error
	notices  chan kms.Notice
}

func (h *house) in(ctx context.Context, c kms.Caller) error {
	h.calls.Add(1)
	h.mu.Lock()
	h.last = c
	h.deadline, _ = ctx.Deadline()
	fail, enter := h.fail, h.enter
	h.mu.Unlock()
	if enter != nil {
		if err := enter(ctx); err != nil {
			return err
		}
	}
	return fail
}

func (h *house) set(edit func(*house)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	edit(h)
}

func (h *house) seen() (kms.Caller, time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last, h.deadline
}

func (h *house) CreateVault(ctx context.Context, c kms.Caller, name string) (kms.Vault, error) {
	return kms.Vault{Name: name}, h.in(ctx, c)
}
func (h *house) Vaults(ctx context.Context, c kms.Caller) ([]kms.Vault, error) {
	return nil, h.in(ctx, c)
}
func (h *house) CreateKey(ctx context.Context, c kms.Caller, r kms.CreateKey) (kms.MasterKey, error) {
	return kms.MasterKey{Vault: r.Vault, Name: r.Name, Bits: r.Bits}, h.in(ctx, c)
}
func (h *house) RollKey(ctx context.Context, c kms.Caller, r kms.RollKey) (kms.MasterKey, error) {
	return kms.MasterKey{Vault: r.Vault, Name: r.Name}, h.in(ctx, c)
}
func (h *house) Key(ctx context.Context, c kms.Caller, vault, name string) (kms.MasterKey, error) {
	return kms.MasterKey{Vault: vault, Name: name}, h.in(ctx, c)
}
func (h *house) Keys(ctx context.Context, c kms.Caller, _ string) ([]kms.MasterKey, error) {
	return nil, h.in(ctx, c)
}
func (h *house) SetKeyEnabled(ctx context.Context, c kms.Caller, _ kms.SetEnabled) (kms.Effect, error) {
	return kms.Effect{}, h.in(ctx, c)
}
func (h *house) RewrapKey(ctx context.Context, c kms.Caller, _, _ string, progress func(done, total int)) (int, error) {
	if err := h.in(ctx, c); err != nil {
		return 0, err
	}
	for i := range 5 {
		progress(i+1, 5)
	}
	return 5, nil
}
func (h *house) CreateKeyring(ctx context.Context, c kms.Caller, r kms.CreateKeyring) (kms.Keyring, error) {
	return kms.Keyring{Vault: r.Vault, Name: r.Name}, h.in(ctx, c)
}
func (h *house) RollKeyring(ctx context.Context, c kms.Caller, r kms.RollKeyring) (kms.Keyring, error) {
	return kms.Keyring{Vault: r.Vault, Name: r.Name}, h.in(ctx, c)
}
func (h *house) Keyring(ctx context.Context, c kms.Caller, vault, name string) (kms.Keyring, error) {
	return kms.Keyring{Vault: vault, Name: name}, h.in(ctx, c)
}
func (h *house) Keyrings(ctx context.Context, c kms.Caller, _ string) ([]kms.Keyring, error) {
	return nil, h.in(ctx, c)
}
func (h *house) SetKeyringEnabled(ctx context.Context, c kms.Caller, _ kms.SetEnabled) (kms.Effect, error) {
	return kms.Effect{}, h.in(ctx, c)
}
func (h *house) PrepareInstance(ctx context.Context, c kms.Caller, r kms.PrepareInstance) (kms.Instance, *kms.EnrolmentToken, error) {
	return kms.Instance{Name: r.Name, Kind: r.Kind}, &kms.EnrolmentToken{Principal: "host/" + r.Name, Text: "made-token"}, h.in(ctx, c)
}
func (h *house) Instances(ctx context.Context, c kms.Caller) ([]kms.Instance, error) {
	return nil, h.in(ctx, c)
}
func (h *house) RevokeInstance(ctx context.Context, c kms.Caller, _ string) error {
	return h.in(ctx, c)
}
func (h *house) OpenInstance(ctx context.Context, c kms.Caller, r kms.OpenInstance) (kms.InstanceView, error) {
	return kms.InstanceView{Instance: kms.Instance{Name: r.Instance}}, h.in(ctx, c)
}
func (h *house) WatchInstance(ctx context.Context, c kms.Caller, _ string, f func(kms.Notice) error) error {
	if err := h.in(ctx, c); err != nil {
		return err
	}
	if err := f(kms.Notice{Kind: kms.NoticePing}); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case n := <-h.notices:
			if err := f(n); err != nil {
				return err
			}
		}
	}
}
func (h *house) ReportUsage(ctx context.Context, c kms.Caller, _ string, _ []kms.Usage) error {
	return h.in(ctx, c)
}
func (h *house) Unwrap(ctx context.Context, c kms.Caller, w dek.Wrapped) (*dek.Key, error) {
	if err := h.in(ctx, c); err != nil {
		return nil, err
	}
	b := make([]byte, dek.KeySize)
	for i := range b {
		b[i] = byte(w.ID().Version)
	}
	return dek.KeyFrom(b)
}
func (h *house) UnwrapBatch(ctx context.Context, c kms.Caller, ws []dek.Wrapped) ([]*dek.Key, []error, error) {
	keys, errs := make([]*dek.Key, len(ws)), make([]error, len(ws))
	for i, w := range ws {
		if w.ID().Version == 13 {
			errs[i] = dek.ErrDenied
			continue
		}
		keys[i], errs[i] = h.Unwrap(ctx, c, w)
	}
	return keys, errs, h.in(ctx, c)
}
func (h *house) AddGrant(ctx context.Context, c kms.Caller, _ kms.Grant) error { return h.in(ctx, c) }
func (h *house) RemoveGrant(ctx context.Context, c kms.Caller, _ kms.Grant) error {
	return h.in(ctx, c)
}
func (h *house) Grants(ctx context.Context, c kms.Caller, _ string) ([]kms.Grant, error) {
	return nil, h.in(ctx, c)
}
func (h *house) NewEnrolmentToken(ctx context.Context, c kms.Caller, principal string, _ time.Duration) (*kms.EnrolmentToken, error) {
	return &kms.EnrolmentToken{Principal: principal, Text: "made-token"}, h.in(ctx, c)
}
func (h *house) Redeem(ctx context.Context, c kms.Caller, text kms.TokenText, issue func(string) error) error {
	if err := h.in(ctx, c); err != nil {
		return err
	}
	h.mu.Lock()
	ok := h.token != "" && text.Reveal() == h.token
	if ok {
		h.token = ""
	}
	h.mu.Unlock()
	if !ok {
		return dek.ErrDenied
	}
	return issue("host/db1")
}
func (h *house) Renew(ctx context.Context, c kms.Caller, issue func(string) error) error {
	if err := h.in(ctx, c); err != nil {
		return err
	}
	return issue(c.Principal)
}
func (h *house) RevokeIdentity(ctx context.Context, c kms.Caller, principal string) error {
	err := h.in(ctx, c)
	if err == nil {
		h.set(func(h *house) { h.revoked[principal] = true })
	}
	return err
}
func (h *house) Revoked(principal, _ string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.revoked[principal]
}
func (h *house) Status(ctx context.Context, c kms.Caller) (kms.Status, error) {
	return kms.Status{Token: "house"}, h.in(ctx, c)
}
func (h *house) Backup(ctx context.Context, c kms.Caller, w io.Writer) error {
	if err := h.in(ctx, c); err != nil {
		return err
	}
	_, err := w.Write(make([]byte, 600<<10))
	return err
}
func (h *house) AuthorizeAudit(ctx context.Context, c kms.Caller, _ kms.Operation, _ string) error {
	return h.in(ctx, c)
}

// Read and Export are the log's side.
func (h *house) Read(_ context.Context, _ rpc.AuditQuery, f func(uint64, []byte) error) error {
	return errors.Join(f(1, []byte(`{"n":1}`)), f(2, []byte(`{"n":2}`)))
}

func (h *house) Export(_ context.Context, w io.Writer) error {
	_, err := w.Write([]byte("tar"))
	return err
}

// A ledger keeps records in memory.
type ledger struct {
	mu     sync.Mutex
	events []kms.Event
	fail   error
}

func (l *ledger) Append(_ context.Context, e kms.Event) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return 0, l.fail
	}
	l.events = append(l.events, e)
	return uint64(len(l.events)), nil
}

func (l *ledger) take() []kms.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.events
	l.events = nil
	return e
}

// A shelf keeps the authority's blobs.
type shelf struct {
	mu   sync.Mutex
	kept map[string][]byte
}

func (s *shelf) Blob(name string) ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.kept[name]
	return slices.Clone(b), ok
}

func (s *shelf) PutBlob(_ context.Context, name string, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept == nil {
		s.kept = make(map[string][]byte)
	}
	s.kept[name] = slices.Clone(b)
	return nil
}

// wrapped makes a wrapped DEK of a version under a seal key of the test's.
func wrapped(t testing.TB, version dek.Version) []byte {
	t.Helper()
	seal, err := dek.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	defer seal.Destroy()
	w, err := dek.Wrap(header(version), seal, make([]byte, 256))
	if err != nil {
		t.Fatal(err)
	}
	return w.Bytes()
}
