package kms_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/storetest"
)

// tamperings are what the owner of the store can do to its records; old are
// those of an earlier moment.
var tamperings = []struct {
	name  string
	do    func(m map[string]kms.Record, old map[string]kms.Record)
	names string // in the error
}{
	{"flipped bit", func(m, _ map[string]kms.Record) { flip(m, "keyrings/v/r/1") }, "keyrings/v/r/1"},
	{"flipped boot", func(m, _ map[string]kms.Record) { flip(m, "boot") }, "boot"},
	{"flipped head", func(m, _ map[string]kms.Record) { flip(m, "head") }, "head"},
	{"swapped", func(m, _ map[string]kms.Record) {
		a, b := m["keyrings/v/r/1"], m["keyrings/v/r/2"]
		a.Value, b.Value = b.Value, a.Value
		m[a.Path], m[b.Path] = a, b
	}, "keyrings/v/r/"},
	{"moved", func(m, _ map[string]kms.Record) {
		r := m["keyrings/v/r/1"]
		r.Path = "keyrings/v/other/1"
		m[r.Path] = r
	}, "keyrings/v/other/1"},
	{"older copy", func(m, old map[string]kms.Record) { m["keys/v/k/1"] = old["keys/v/k/1"] }, "keys/v/k/1"},
	{"removed", func(m, _ map[string]kms.Record) { delete(m, "keyrings/v/r/2") }, "keyrings/v/r/2"},
	{"removed grants", func(m, _ map[string]kms.Record) { delete(m, "grants/person/auditor") }, "digest"},
	{"removed head", func(m, _ map[string]kms.Record) { delete(m, "head") }, "head"},
	{"removed boot", func(m, _ map[string]kms.Record) { delete(m, "boot") }, "boot"},
	{"foreign record", func(m, _ map[string]kms.Record) {
		m["notes"] = kms.Record{Path: "notes", Value: []byte("hello"), Revision: 1}
	}, "notes"},
	{"older head", func(m, old map[string]kms.Record) { m["head"] = old["head"] }, "record"},
	{"whole rollback", func(m, old map[string]kms.Record) {
		clear(m)
		for k, v := range old {
			m[k] = v
		}
	}, "rollback suspected"},
}

// TestTamper: whoever owns the store can only stop the service, and it says
// where to look.
func TestTamper(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	_, err := h.s.RollKeyring(t.Context(), officer, kms.RollKeyring{Vault: "v", Name: "r"})
	check(t, err)
	old := snapshot(t, h.store)
	_, err = h.s.SetKeyEnabled(t.Context(), officer, kms.SetEnabled{Vault: "v", Name: "k", Version: 1})
	check(t, err)
	h.s.Close()
	good := snapshot(t, h.store)
	log := h.journal
	for _, c := range tamperings {
		t.Run(c.name, func(t *testing.T) {
			records := make(map[string]kms.Record)
			for k, r := range good {
				r.Value = append([]byte(nil), r.Value...)
				records[k] = r
			}
			c.do(records, old)
			h2 := *h
			h2.store, h2.journal = storeOf(t, records), log.copy()
			err := h2.tryOpen()
			if !errors.Is(err, dek.ErrCorrupt) {
				t.Fatalf("open: %v, want %v", err, dek.ErrCorrupt)
			}
			if !strings.Contains(err.Error(), c.names) {
				t.Errorf("%q does not name %q", err, c.names)
			}
		})
	}
	t.Run("untouched", func(t *testing.T) {
		h2 := *h
		h2.store, h2.journal = storeOf(t, good), log.copy()
		h2.t = t
		h2.open()
	})
	t.Run("log cut", func(t *testing.T) {
		h2 := *h
		h2.store, h2.journal = storeOf(t, good), &journal{}
		if err := h2.tryOpen(); !errors.Is(err, dek.ErrCorrupt) {
			t.Errorf("open with an empty log: %v", err)
		}
	})
}

// TestEveryBit flips one bit in every record: nothing changed is ever served.
func TestEveryBit(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	h.s.Close()
	good := snapshot(t, h.store)
	for path, r := range good {
		for at := 0; at < len(r.Value); at += 1 + len(r.Value)/8 {
			records := make(map[string]kms.Record)
			for k, v := range good {
				records[k] = v
			}
			v := append([]byte(nil), r.Value...)
			v[at] ^= 1 << (at % 8)
			records[path] = kms.Record{Path: path, Value: v, Revision: r.Revision}
			h2 := *h
			h2.store, h2.journal = storeOf(t, records), h.journal.copy()
			if err := h2.tryOpen(); err == nil {
				h2.s.Close()
				t.Errorf("%s, byte %d: opened", path, at)
			}
		}
	}
}

func flip(m map[string]kms.Record, path string) {
	r := m[path]
	r.Value[len(r.Value)/2] ^= 4
	m[path] = r
}

func snapshot(t testing.TB, m *storetest.Memory) map[string]kms.Record {
	t.Helper()
	out := make(map[string]kms.Record)
	_, err := m.Load(t.Context(), func(r kms.Record) error {
		out[r.Path] = r
		return nil
	})
	check(t, err)
	return out
}

func storeOf(t testing.TB, records map[string]kms.Record) *storetest.Memory {
	t.Helper()
	m := storetest.NewMemory()
	var cs []kms.Change
	for path, r := range records {
		cs = append(cs, kms.Change{Path: path, Value: r.Value})
	}
	_, err := m.Commit(t.Context(), cs)
	check(t, err)
	return m
}

// TestTakenOver: a second process on the same store ends the first one's
// serving.
func TestTakenOver(t *testing.T) {
	h := newHouse(t, "")
	h.furnish()
	w := h.wraps()[0]
	first := h.s
	h2 := *h
	h2.open()
	for {
		_, err := first.Unwrap(t.Context(), db1, w)
		if errors.Is(err, dek.ErrPrecondition) {
			break
		}
		if err != nil || t.Context().Err() != nil {
			t.Fatalf("first process: %v", err)
		}
	}
	h2.bytesOf(w)
}

// TestSealRoll: a system or vault seal key that has sealed enough is rolled,
// and everything under the older ones opens.
func TestSealRoll(t *testing.T) {
	h := newHouse(t, "")
	h.s.Close()
	h.edit = func(c *kms.Config) { *c = c.WithLimits(20, 4, 0, 0, 0) }
	h.open()
	h.furnish()
	for i := range 30 {
		_, err := h.s.RollKeyring(t.Context(), officer, kms.RollKeyring{RequestID: fmt.Sprint("n", i), Vault: "v", Name: "r"})
		check(t, err)
		if i%10 == 0 {
			h.reopen()
		}
	}
	h.reopen()
	if got := len(h.wraps()); got != 31 {
		t.Fatalf("%d versions, want 31", got)
	}
	for _, w := range h.wraps() {
		h.bytesOf(w)
	}
	if v := must(h.s.Vaults(t.Context(), officer)); v[0].SealVersion < 2 {
		t.Errorf("vault seal key version %d, want it rolled", v[0].SealVersion)
	}
}
