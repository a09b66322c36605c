package kms_test

import (
	"context"
	"crypto"
	"crypto/rsa"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// A recorder notes what happens outside the service, in order, and what the
// state of the new version is at that moment.
type recorder struct {
	mu    sync.Mutex
	steps []string
	state func() string
}

func (r *recorder) note(format string, args ...any) {
	step := fmt.Sprintf(format, args...)
	if r.state != nil {
		step += " (" + r.state() + ")"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.steps = append(r.steps, step)
}

// A noisyToken says what is asked of it.
type noisyToken struct {
	token
	r *recorder
}

func (n noisyToken) GeneratePair(ctx context.Context, id dek.ObjectID, bits int) (*rsa.PublicKey, error) {
	n.r.note("token: generate")
	return n.token.GeneratePair(ctx, id, bits)
}

func (n noisyToken) FindPair(ctx context.Context, id dek.ObjectID) (*rsa.PublicKey, error) {
	n.r.note("token: find")
	return n.token.FindPair(ctx, id)
}

func (n noisyToken) DecryptKey(ctx context.Context, id dek.ObjectID, h crypto.Hash, inner []byte) (*dek.Key, error) {
	n.r.note("token: decrypt")
	return n.token.DecryptKey(ctx, id, h, inner)
}

// A noisyTarget says when a backup comes.
type noisyTarget struct {
	target *target
	r      *recorder
}

func (n noisyTarget) Put(ctx context.Context, name string, b io.Reader) error {
	n.r.note("backup")
	return n.target.Put(ctx, name, b)
}

// watch has every outside effect of h noted from now on: the log's records, and
// the commits that touch path. A commit that makes a record expects none; one
// that moves it names the revision it read.
func (r *recorder) watch(h *house, path string) {
	h.journal.fail = func(_ int, e kms.Event) storetest.Fault {
		switch e.Phase {
		case kms.PhaseIntent:
			r.note("log: intent of %s", e.Operation)
		case kms.PhaseOutcome:
			r.note("log: outcome of %s: %s", e.Operation, e.Result)
		}
		return 0
	}
	h.store.Inject(func(op string, _ int, changes []kms.Change) storetest.Fault {
		i := slices.IndexFunc(changes, func(c kms.Change) bool { return c.Path == path })
		switch {
		case op != "commit" || i < 0:
		case changes[i].Expect == 0:
			r.note("store: make")
		default:
			r.note("store: compare and swap")
		}
		return 0
	}, nil)
}

// noisyHouse has a recipient, a backup target and the furniture.
func noisyHouse(t *testing.T) (*house, *recorder) {
	text, _ := people(t)
	h, r := newHouse(t, text), new(recorder)
	h.furnish()
	h.s.Close()
	h.edit = func(c *kms.Config) { c.Token, c.Backups = noisyToken{h.token, r}, noisyTarget{new(target), r} }
	h.open()
	r.steps = nil
	return h, r
}

var stateNames = map[kms.State]string{0: "none", kms.Pending: "pending", kms.Enabled: "enabled"}

// The create protocol in its literal order: each step is outside the service
// before the next one begins, and nothing is enabled before all of it.
func TestCreateProtocolOrder(t *testing.T) {
	t.Run("master key", func(t *testing.T) {
		h, r := noisyHouse(t)
		r.state = func() string { return stateNames[h.s.KeyState("v", "k", 2)] }
		r.watch(h, "keys/v/k/2")
		k, err := h.s.RollKey(t.Context(), officer, kms.RollKey{Vault: "v", Name: "k"})
		r.note("reply")
		check(t, err)
		r.want(t, []string{
			"log: intent of key.roll (none)",
			"store: make (none)",
			"token: find (pending)", // an earlier try may have made it
			"token: generate (pending)",
			"token: find (pending)",
			"token: decrypt (pending)", // the self-test
			"backup (pending)",
			"store: compare and swap (pending)",
			"log: outcome of key.roll: ok (enabled)",
			"reply (enabled)",
		})
		if k.Current != 2 {
			t.Errorf("got %+v", k)
		}
	})
	t.Run("keyring", func(t *testing.T) {
		h, r := noisyHouse(t)
		r.state = func() string {
			state, copied := h.s.RingState("v", "r", 2)
			return stateNames[state] + map[bool]string{true: ", recovery copy", false: ""}[copied]
		}
		r.watch(h, "keyrings/v/r/2")
		_, err := h.s.RollKeyring(t.Context(), officer, kms.RollKeyring{Vault: "v", Name: "r"})
		r.note("reply")
		check(t, err)
		r.want(t, []string{
			"log: intent of keyring.roll (none)",
			"store: make (none)",
			"token: decrypt (pending, recovery copy)", // what is stored gives the key back
			"backup (pending, recovery copy)",
			"store: compare and swap (pending, recovery copy)",
			"log: outcome of keyring.roll: ok (enabled, recovery copy)",
			"reply (enabled, recovery copy)",
		})
	})
}

func (r *recorder) want(t *testing.T, want []string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.steps, want) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(r.steps, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// The store is on the path of no unwrap: every operation of it fails, and hangs
// until the end, while keys are unwrapped.
func TestUnwrapWithoutStore(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	ws := h.wraps()
	want := h.bytesOf(ws[0])
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	for name, rule := range map[string]storetest.Rule{
		"fails": func(string, int, []kms.Change) storetest.Fault { return storetest.FailedNotDone },
		"hangs": func(string, int, []kms.Change) storetest.Fault { <-end; return storetest.FailedNotDone },
	} {
		h.store.Inject(rule, nil)
		for range 3 {
			if got := h.bytesOf(ws[0]); string(got) != string(want) {
				t.Errorf("the store %s: another key", name)
			}
		}
		keys, errs, err := h.s.UnwrapBatch(t.Context(), db1, ws)
		check(t, err)
		for i, k := range keys {
			check(t, errs[i])
			k.Destroy()
		}
		if _, err := h.s.OpenInstance(t.Context(), db1, kms.OpenInstance{Instance: "db1", Cold: true}); err != nil {
			t.Errorf("the store %s: a database start: %v", name, err)
		}
	}
}
