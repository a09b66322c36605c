package audit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A rawLine is one record as it stands in a file.
type rawLine struct {
	seq   uint64
	line  []byte // valid until the next one
	first uint64 // of its segment
	row   int    // line number in the segment, from 1
	end   int64  // offset behind it in the segment
}

// lines yields the records of segs from sequence from on. An error ends it:
// what is not a record, a gap, or a failure to read; the rawLine beside it
// names the place.
func lines(ctx context.Context, dir fs.FS, segs []uint64, from uint64) iter.Seq2[rawLine, error] {
	return func(yield func(rawLine, error) bool) {
		i, found := slices.BinarySearch(segs, from)
		if !found && i > 0 {
			i--
		}
		for ; i < len(segs); i++ {
			var next uint64
			if i+1 < len(segs) {
				next = segs[i+1]
			}
			if !segmentLines(ctx, dir, segs[i], next, from, yield) {
				return
			}
		}
	}
}

// A place is the beginning of a record in a segment.
type place struct {
	off int64
	seq uint64
}

// seekRecord finds a place at or a little before record from in a segment of
// size bytes that begins with first: sequences ascend, so halves can be ruled
// out. In a file that was tampered with it is some place that is not behind
// what it says.
func seekRecord(r io.ReaderAt, size int64, first, from uint64) place {
	const near = 64 << 10 // closer than this, reading on is cheaper
	buf := make([]byte, MaxRecord+64)
	low, high := place{0, first}, size
	for high-low.off > near {
		middle := low.off + (high-low.off)/2
		n, _ := r.ReadAt(buf, middle) // what can't be read is not the place
		nl := bytes.IndexByte(buf[:n], '\n')
		seq := uint64(0)
		if nl >= 0 && buf[0] != 0 {
			seq = sequenceOf(buf[nl+1 : n])
		}
		if seq <= low.seq || seq > from { // also the room made ahead, and its edge
			high = middle
			continue
		}
		low = place{middle + int64(nl) + 1, seq}
	}
	return low
}

// skipTo lets a reader of a segment begin at or before from.
func skipTo(f fs.File, first, from uint64) (*scanner, place) {
	at, isAt := f.(io.ReaderAt)
	st, err := f.Stat()
	if from <= first || !isAt || err != nil {
		return newScanner(f), place{0, first}
	}
	p := seekRecord(at, st.Size(), first, from)
	sc := newScanner(io.NewSectionReader(at, p.off, math.MaxInt64-p.off))
	sc.off, sc.number = p.off, int(p.seq-first) // a record is a line
	return sc, p
}

// segmentLines yields the records of one segment; next is where the following
// one begins, 0 if there is none. It reports whether to go on.
func segmentLines(ctx context.Context, dir fs.FS, first, next, from uint64, yield func(rawLine, error) bool) bool {
	at := rawLine{seq: first, first: first}
	f, err := dir.Open(fileName(first, segmentSuffix))
	if err != nil {
		yield(at, fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err))
		return false
	}
	defer f.Close()
	sc, begin := skipTo(f, first, from)
	at.seq = begin.seq
	for {
		ok, err := sc.next()
		if err == nil && at.row%1024 == 0 {
			err = ctx.Err()
		}
		if err != nil {
			at.row++
			yield(at, err)
			return false
		}
		if !ok {
			break
		}
		at.line, at.row, at.end = sc.line, sc.number, sc.off
		if got := sequenceOf(sc.line); got != at.seq {
			yield(at, gapError(at.seq, got))
			return false
		}
		if at.seq >= from && !yield(at, nil) {
			return false
		}
		at.seq++
	}
	if next != 0 && next != at.seq {
		at.row++
		yield(at, gapError(at.seq, next))
		return false
	}
	return true
}

// A gap is a record that is not where it must be.
type gap struct{ want, got uint64 }

func (g *gap) Error() string {
	switch {
	case g.got == 0:
		return fmt.Sprintf("record %d is not a record", g.want)
	case g.got > g.want:
		return fmt.Sprintf("records %d to %d are missing", g.want, g.got-1)
	}
	return fmt.Sprintf("record %d stands where %d must be", g.got, g.want)
}

func (*gap) Unwrap() error { return errRecord }

func gapError(want, got uint64) error { return &gap{want, got} }

// A Record is one event as it was written.
type Record struct {
	Seq   uint64
	Event kms.Event
	Bytes []byte // the exact leaf of the tree
}

// A Filter chooses records; zero fields choose all.
type Filter struct {
	From, To    uint64    // sequences, both included
	Since, Till time.Time // of the event; Till is excluded
	Principal   string
	Operation   kms.Operation
	Object      string // this object and what is below it
}

func (f *Filter) match(e *kms.Event) bool {
	return (f.Since.IsZero() || !e.Time.Before(f.Since)) &&
		(f.Till.IsZero() || e.Time.Before(f.Till)) &&
		(f.Principal == "" || f.Principal == e.Principal) &&
		(f.Operation == "" || f.Operation == e.Operation) &&
		(f.Object == "" || f.Object == e.Object || len(e.Object) > len(f.Object) &&
			e.Object[:len(f.Object)] == f.Object && e.Object[len(f.Object)] == '/')
}

// Read yields the records of a log's directory that f chooses, in order. An
// error ends it; it wraps dek.ErrCorrupt for what is not a record. Nothing is
// verified: that is Verify's part.
func Read(ctx context.Context, dir fs.FS, f Filter) iter.Seq2[Record, error] {
	return func(yield func(Record, error) bool) {
		segs, err := listFiles(dir, segmentSuffix)
		if err != nil {
			yield(Record{}, err)
			return
		}
		for raw, err := range lines(ctx, dir, segs, f.From) {
			if err != nil {
				yield(Record{}, fmt.Errorf("%w: audit: %s, line %d: %w", dek.ErrCorrupt, fileName(raw.first, segmentSuffix), raw.row, err))
				return
			}
			if f.To != 0 && raw.seq > f.To {
				return
			}
			_, e, err := parseRecord(raw.line)
			if err != nil {
				yield(Record{}, fmt.Errorf("%w: audit: %s, line %d: record %d: %w", dek.ErrCorrupt, fileName(raw.first, segmentSuffix), raw.row, raw.seq, err))
				return
			}
			if f.match(&e) && !yield(Record{raw.seq, e, bytes.Clone(raw.line)}, nil) {
				return
			}
		}
	}
}

// Records yields the records on disk that f chooses; it may run while others
// append.
func (l *Log) Records(ctx context.Context, f Filter) iter.Seq2[Record, error] {
	if n := l.Size(); f.To == 0 || f.To > n {
		f.To = n
	}
	return Read(ctx, os.DirFS(l.cfg.Dir), f)
}

// lastWindow is how many records Last reads at first, and lastMost at a time.
const (
	lastWindow = 256
	lastMost   = 1 << 14
)

// Last returns the newest n records on disk that f chooses, the oldest of them
// first. It reads backwards and no further than it must, so that the newest
// records cost the same whatever the length of the log. n must be positive.
// Errors are those of Read.
func (l *Log) Last(ctx context.Context, f Filter, n int) ([]Record, error) {
	if n <= 0 {
		return nil, fmt.Errorf("%w: audit: the newest %d records", dek.ErrInvalid, n)
	}
	segs, err := listFiles(os.DirFS(l.cfg.Dir), segmentSuffix)
	if err != nil || len(segs) == 0 {
		return nil, err
	}
	to := l.Size()
	if f.To != 0 {
		to = min(to, f.To)
	}
	from := max(f.From, segs[0], 1)
	var parts [][]Record // the newest first
	for window := uint64(lastWindow); n > 0 && to >= from; window = min(2*window, lastMost) {
		f.To = to
		f.From = max(from, to-min(to, window)+1)
		var part []Record
		for r, err := range l.Records(ctx, f) {
			if err != nil {
				return nil, err
			}
			part = append(part, r)
		}
		part = part[max(0, len(part)-n):]
		parts, n, to = append(parts, part), n-len(part), f.From-1
	}
	slices.Reverse(parts)
	return slices.Concat(parts...), nil
}

// EventsAfter implements kms.AuditTail. It reads the whole log.
func (l *Log) EventsAfter(ctx context.Context, change uint64, f func(seq uint64, e kms.Event) error) error {
	for r, err := range l.Records(ctx, Filter{}) {
		if err != nil {
			return err
		}
		if r.Event.Change > change || r.Event.Result == kms.ResultUnknown {
			if err := f(r.Seq, r.Event); err != nil {
				return err
			}
		}
	}
	return nil
}

// Extends implements kms.Auditor. A checkpoint of the log that this one is
// linked to is extended if the link covers it. dek.ErrAuth: old is not a
// checkpoint signed by a known key; dek.ErrCorrupt: the log is behind it, or
// forked.
func (l *Log) Extends(_ context.Context, old []byte) error {
	c, err := ParseCheckpoint(old, l.keys()...)
	if err != nil && l.link != nil {
		c, err = ParseCheckpoint(old, l.link.key)
	}
	if err != nil {
		return err
	}
	switch size := l.Size(); {
	case l.link != nil && c.Log == l.link.Log:
		if c.Size > l.link.Size || c.Size == l.link.Size && c.Root != l.link.Root {
			return fmt.Errorf("%w: audit: the log this one follows had %d records, %d were seen", dek.ErrCorrupt, l.link.Size, c.Size)
		}
		return nil
	case c.Log != l.id:
		return fmt.Errorf("%w: audit: checkpoint of another log (%s)", dek.ErrCorrupt, c.Log)
	case c.Size > size:
		return fmt.Errorf("%w: audit: the log has %d records, %d were seen: it was put back in time", dek.ErrCorrupt, size, c.Size)
	}
	root, err := tlog.TreeHash(int64(c.Size), l.tree)
	if err != nil {
		return err
	}
	if root != c.Root {
		return fmt.Errorf("%w: audit: the first %d records differ from those that were seen", dek.ErrCorrupt, c.Size)
	}
	return nil
}

// A Proof shows that a checkpoint covers a record, or extends another
// checkpoint; CheckInclusion and CheckConsistency check it.
type Proof []tlog.Hash

// ProveInclusion proves to the holder of checkpoint c that record seq is in the
// log. dek.ErrInvalid: c does not cover it.
func (l *Log) ProveInclusion(_ context.Context, c Checkpoint, seq uint64) (Proof, error) {
	if seq == 0 || seq > c.Size || c.Size > l.Size() || c.Log != l.id {
		return nil, fmt.Errorf("%w: audit: no proof of record %d at size %d", dek.ErrInvalid, seq, c.Size)
	}
	p, err := tlog.ProveRecord(int64(c.Size), int64(seq-1), l.tree)
	if err != nil {
		return nil, fmt.Errorf("audit: prove record %d: %w", seq, err)
	}
	return Proof(p), nil
}

// ProveConsistency proves that checkpoint c extends old.
func (l *Log) ProveConsistency(_ context.Context, c, old Checkpoint) (Proof, error) {
	if old.Size == 0 || old.Size > c.Size || c.Size > l.Size() || c.Log != l.id || old.Log != l.id {
		return nil, fmt.Errorf("%w: audit: no proof from size %d to %d", dek.ErrInvalid, old.Size, c.Size)
	}
	p, err := tlog.ProveTree(int64(c.Size), int64(old.Size), l.tree)
	if err != nil {
		return nil, fmt.Errorf("audit: prove size %d: %w", c.Size, err)
	}
	return Proof(p), nil
}

// CheckInclusion checks that the record with these exact bytes is number seq in
// the log of c. The error wraps dek.ErrAuth.
func CheckInclusion(p Proof, c Checkpoint, seq uint64, record []byte) error {
	if seq == 0 || seq > c.Size || tlog.CheckRecord(tlog.RecordProof(p), int64(c.Size), c.Root, int64(seq-1), tlog.RecordHash(record)) != nil {
		return fmt.Errorf("%w: audit: record %d is not proved", dek.ErrAuth, seq)
	}
	return nil
}

// CheckConsistency checks that c extends old. The error wraps dek.ErrAuth.
func CheckConsistency(p Proof, c, old Checkpoint) error {
	if old.Size == 0 || old.Size > c.Size || c.Log != old.Log || tlog.CheckTree(tlog.TreeProof(p), int64(c.Size), c.Root, int64(old.Size), old.Root) != nil {
		return fmt.Errorf("%w: audit: size %d is not proved to extend %d", dek.ErrAuth, c.Size, old.Size)
	}
	return nil
}
