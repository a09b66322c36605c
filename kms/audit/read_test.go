package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
	"github.com/keyward/keyward/kms/audit"
)

// TestLast compares reading backwards with reading everything.
func TestLast(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	act(t, l, 900) // a dozen segments, several windows
	mustAppend(t, l, kms.Event{Phase: kms.PhaseSystem, Operation: "system.rare", Principal: "system/test"})
	act(t, l, 30)
	rare := audit.Filter{Operation: "system.rare"}
	for _, c := range []struct {
		name   string
		filter audit.Filter
		n      int
	}{
		{"one", audit.Filter{}, 1},
		{"some", audit.Filter{}, 8},
		{"more than a window", audit.Filter{}, 300},
		{"all", audit.Filter{}, 1861},
		{"more than there are", audit.Filter{}, 5000},
		{"up to", audit.Filter{To: 1000}, 10},
		{"from", audit.Filter{From: 1850}, 100},
		{"between", audit.Filter{From: 100, To: 110}, 5},
		{"nothing between", audit.Filter{From: 110, To: 100}, 5},
		{"beyond the end", audit.Filter{From: 5000}, 5},
		{"one that is far back", rare, 3},
		{"an object", audit.Filter{Object: "/vaults/payroll"}, 20},
		{"nobody", audit.Filter{Principal: "person/nobody"}, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			var want []audit.Record
			for r, err := range l.Records(t.Context(), c.filter) {
				if err != nil {
					t.Fatal(err)
				}
				want = append(want, r)
			}
			want = want[max(0, len(want)-c.n):]
			got, err := l.Last(t.Context(), c.filter, c.n)
			if err != nil || len(got) != len(want) {
				t.Fatalf("got %d records (%v), want %d", len(got), err, len(want))
			}
			for i := range got {
				if got[i].Seq != want[i].Seq || !bytes.Equal(got[i].Bytes, want[i].Bytes) {
					t.Fatalf("record %d of %d: got %d, want %d", i, len(got), got[i].Seq, want[i].Seq)
				}
			}
		})
	}
	if _, err := l.Last(t.Context(), audit.Filter{}, 0); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("the newest 0 records: got %v, want ErrInvalid", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Last(ctx, rare, 1); err == nil {
		t.Error("a reader that went away was served")
	}
}

// countingReader counts what is read.
type countingReader struct {
	*bytes.Reader
	bytes int
}

func (r *countingReader) ReadAt(p []byte, off int64) (int, error) {
	n, err := r.Reader.ReadAt(p, off)
	r.bytes += n
	return n, err
}

// TestSeek finds every record of a long segment with little reading, with and
// without room made ahead, and never begins behind what was asked for.
func TestSeek(t *testing.T) {
	const first, n = 1000, 5000
	var b bytes.Buffer
	var ends []int64
	for i := range uint64(n) {
		e := event(int(i), kms.PhaseRefused)
		e.Note = fmt.Sprintf("%0*d", i%997, 0)
		b.Write(audit.EncodeRecord(first+i, e))
		b.WriteByte('\n')
		ends = append(ends, int64(b.Len()))
	}
	for _, room := range []int{0, 1, 1 << 20, 64 << 20} {
		text := append(b.Bytes()[:b.Len():b.Len()], make([]byte, room)...)
		for from := uint64(first); from < first+n+10; from += 37 {
			r := &countingReader{Reader: bytes.NewReader(text)}
			off, seq := audit.SeekOffset(r, int64(len(text)), first, from)
			if want := seq == first && off == 0 || seq > first && off == ends[seq-first-1]; !want || seq > from {
				t.Fatalf("room %d, record %d: got offset %d of record %d", room, from, off, seq)
			}
			if from < first+n && ends[from-first]-off > 100<<10 || r.bytes > 1<<20 {
				t.Fatalf("room %d, record %d: %d bytes to read on, %d were read", room, from, ends[from-first]-off, r.bytes)
			}
		}
	}
}

// TestHangLate: the timer of a slow disk that fires just as the disk answers
// must not stop a log for ever.
func TestHangLate(t *testing.T) {
	l := open(t, testConfig(t, newDir(t)))
	defer closeLog(t, l)
	l.HangLate()
	mustAppend(t, l, event(1, kms.PhaseRefused))
}
