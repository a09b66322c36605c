package kms_test

import (
	"context"
	"crypto"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A freeToken decrypts for nothing, so that the benchmark shows the rules alone.
type freeToken struct {
	token
	key *dek.Key
}

func (f freeToken) DecryptKey(context.Context, dek.ObjectID, crypto.Hash, []byte) (*dek.Key, error) {
	return f.key.Clone()
}

// BenchmarkUnwrap is the cost of an unwrap without device and log.
func BenchmarkUnwrap(b *testing.B) {
	h := newHouse(b, "")
	h.furnish()
	ring := must(h.s.Keyring(b.Context(), officer, "v", "r"))
	for range 15 {
		ring = must(h.s.RollKeyring(b.Context(), officer, kms.RollKeyring{Vault: "v", Name: "r"}))
	}
	ws := h.wraps()
	if len(ws) != len(ring.Versions) {
		b.Fatal("wraps")
	}
	h.s.Close()
	free := freeToken{h.token, must(dek.NewKey())}
	defer free.key.Destroy()
	sink := &sinkJournal{journal: h.journal}
	h.edit = func(c *kms.Config) { c.Token, c.Auditor = free, sink }
	h.open()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			k, err := h.s.Unwrap(b.Context(), db1, ws[i%len(ws)])
			if err != nil {
				b.Error(err)
				return
			}
			k.Destroy()
		}
	})
}

// A sinkJournal forgets the records of unwraps.
type sinkJournal struct{ *journal }

func (s *sinkJournal) Append(ctx context.Context, e kms.Event) (uint64, error) {
	if e.Operation == kms.OpKeyringUnwrap {
		return 1, nil
	}
	return s.journal.Append(ctx, e)
}
