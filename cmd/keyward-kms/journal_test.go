package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"path/filepath"
	"testing"

	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
	"github.com/keyward/keyward/kms/rpc"
)

// newJournal opens a log with n records beside its first.
func newJournal(t *testing.T, n int) journal {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	l, err := audit.Open(t.Context(), audit.Config{Dir: filepath.Join(t.TempDir(), "audit"), Signer: key, SegmentBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	j := journal{l}
	j.append(t, n)
	return j
}

func (j journal) append(t *testing.T, n int) {
	t.Helper()
	for i := range n {
		e := kms.Event{Phase: kms.PhaseRefused, Operation: kms.OpKeyRead, Principal: "person/even", Result: "denied"}
		if i%2 == 1 {
			e.Principal = "person/odd"
		}
		if _, err := j.log.Append(context.Background(), e); err != nil {
			t.Error(err)
			return
		}
	}
}

// TestJournalNewest: the newest that match, in order, no more than asked for.
func TestJournalNewest(t *testing.T) {
	j := newJournal(t, 1500) // records 2 to 1501
	for name, c := range map[string]struct {
		q           rpc.AuditQuery
		first, last uint64
		n           int
	}{
		"eight":       {rpc.AuditQuery{Limit: 8}, 1494, 1501, 8},
		"no limit":    {rpc.AuditQuery{}, 502, 1501, defaultRecords},
		"of one":      {rpc.AuditQuery{Limit: 3, Principal: "person/odd"}, 1497, 1501, 3},
		"from":        {rpc.AuditQuery{Limit: 100, From: 1500}, 1500, 1501, 2},
		"past it all": {rpc.AuditQuery{Limit: 100, From: 9999}, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var got []uint64
			err := j.Read(t.Context(), c.q, func(seq uint64, _ []byte) error { got = append(got, seq); return nil })
			if err != nil || len(got) != c.n {
				t.Fatalf("got %d records (%v), want %d", len(got), err, c.n)
			}
			if c.n > 0 && (got[0] != c.first || got[c.n-1] != c.last) {
				t.Errorf("got %d to %d, want %d to %d", got[0], got[c.n-1], c.first, c.last)
			}
		})
	}
}

// TestJournalFollow: a reader that follows misses nothing that is appended
// while it reads, and gets nothing twice.
func TestJournalFollow(t *testing.T) {
	const before, during = 20, 3000
	j := newJournal(t, before)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go j.append(t, during)
	var got []uint64
	err := j.Read(ctx, rpc.AuditQuery{Limit: 5, Follow: true}, func(seq uint64, _ []byte) error {
		if n := len(got); n > 0 && seq != got[n-1]+1 {
			t.Errorf("record %d follows %d", seq, got[n-1])
		}
		if got = append(got, seq); seq == 1+before+during {
			cancel()
		}
		return nil
	})
	if err != nil || len(got) < during {
		t.Errorf("got %d records (%v), want at least %d", len(got), err, during)
	}
}
