package audit

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// Check says how Verify judges.
type Check struct {
	// Keys are the audit keys that are trusted. At least one.
	Keys []crypto.PublicKey
	// Exported are checkpoints kept elsewhere: the log must extend each.
	Exported [][]byte
	// Progress is called about every 10,000 records; nil for none.
	Progress func(records uint64)
}

// A Report is what Verify found.
type Report struct {
	Log        string      // id
	First      uint64      // sequence of the first record here; above 1 after Remove
	Last       uint64      // sequence of the last whole record
	Newest     Checkpoint  // newest signed checkpoint
	Uncovered  uint64      // records after it, which nothing proves
	Torn       int64       // bytes of an unfinished record at the end
	Previous   *Checkpoint // head of the log this one follows, nil if none
	PreviousOK bool        // Previous is signed by one of Check.Keys
	Problem    *Problem    // nil: the log is whole
}

// A Problem is the first thing that is wrong with a log.
type Problem struct {
	Seq  uint64 // first bad or missing record; the first of the range if Last differs
	Last uint64 // last record of the range the problem lies in
	File string
	Line int // in File, from 1; 0 if the problem is not in a line
	Text string
}

// Error says what is wrong and where, in one line for people.
func (p *Problem) Error() string {
	where := p.File
	if p.Line > 0 {
		where += ", line " + strconv.Itoa(p.Line)
	}
	return fmt.Sprintf("%s: %s", where, p.Text)
}

// Verify checks a log's directory without the service: every record, the tree
// over them and the signed checkpoints. A log in use may be verified. The
// report holds what was found up to the first problem; err is nil only if there
// is none, wraps dek.ErrCorrupt and the *Problem if there is one,
// dek.ErrInvalid for a Check without keys, and dek.ErrUnavailable if the log
// could not be read.
//
// Checkpoints other than the newest one of each file are compared with the tree
// and not checked for their signature, which adds nothing to the newest one's.
func Verify(ctx context.Context, dir fs.FS, c Check) (Report, error) {
	v := &verifier{ctx: ctx, dir: dir, check: c}
	err := v.run()
	if v.tree != nil {
		v.tree.Close()
	}
	var p *Problem
	if errors.As(err, &p) {
		v.report.Problem = p
		return v.report, fmt.Errorf("%w: audit: %w", dek.ErrCorrupt, p)
	}
	return v.report, err
}

type verifier struct {
	ctx    context.Context
	dir    fs.FS
	check  Check
	report Report

	heads []head // to compare, ascending
	edge  frontier
	good  uint64   // the last size whose root was proved
	doubt *Problem // first record that differs from the stored hashes
	tree  fs.File
	leaf  *leafReader

	removed uint64 // as the records say, "through" of the newest OpRemove
	needs   uint64 // what must be accounted for by removed
}

// A head is a root that the tree must have at a size.
type head struct {
	size uint64
	root tlog.Hash
	file string
}

func (v *verifier) run() error {
	if len(v.check.Keys) == 0 {
		return fmt.Errorf("%w: audit: verify needs the public key of the log", dek.ErrInvalid)
	}
	if err := v.loadHeads(); err != nil {
		return err
	}
	segs, err := listFiles(v.dir, segmentSuffix)
	if err != nil {
		return err
	}
	if len(segs) == 0 {
		return &Problem{Seq: 1, Last: v.report.Newest.Size, File: ".", Text: "there are no records"}
	}
	if err := v.begin(segs[0]); err != nil {
		return err
	}
	for raw, err := range lines(v.ctx, v.dir, segs, segs[0]) {
		if err == nil {
			err = v.record(&raw)
		}
		if err != nil {
			return v.judge(&raw, err, segs[len(segs)-1])
		}
	}
	return v.end(segs[len(segs)-1])
}

// loadHeads reads every checkpoint and verifies the ones that matter.
func (v *verifier) loadHeads() error {
	files, err := listFiles(v.dir, checkpointSuffix)
	if err != nil {
		return err
	}
	for _, first := range files {
		if err := v.loadFile(fileName(first, checkpointSuffix)); err != nil {
			return err
		}
	}
	if len(v.heads) == 0 {
		return &Problem{Seq: 1, File: ".", Text: "there is no checkpoint"}
	}
	for i, text := range v.check.Exported {
		c, err := ParseCheckpoint(text, v.check.Keys...)
		if err != nil {
			return fmt.Errorf("exported checkpoint %d: %w", i+1, err)
		}
		if c.Log != v.report.Log {
			return fmt.Errorf("%w: audit: exported checkpoint %d is of another log (%s)", dek.ErrInvalid, i+1, c.Log)
		}
		v.heads = append(v.heads, head{c.Size, c.Root, "exported checkpoint " + strconv.Itoa(i+1)})
	}
	v.heads = slices.DeleteFunc(v.heads, func(h head) bool { return h.size == 0 })
	slices.SortStableFunc(v.heads, func(a, b head) int { return cmp.Compare(a.size, b.size) })
	return nil
}

func (v *verifier) loadFile(name string) error {
	b, err := fs.ReadFile(v.dir, name)
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
	}
	notes, rest := splitNotes(b)
	line := 1
	for i, text := range notes {
		body, _, _ := bytes.Cut(text, []byte("\n\n"))
		c, err := parseBody(string(body) + "\n")
		if err == nil && i == len(notes)-1 {
			c, err = ParseCheckpoint(text, v.check.Keys...)
		}
		if err == nil && (v.report.Log != "" && c.Log != v.report.Log || c.Size < v.report.Newest.Size) {
			err = errors.New("it belongs to another log or is out of order")
		}
		if err != nil {
			return &Problem{Seq: v.report.Newest.Size + 1, Last: v.report.Newest.Size + 1, File: name, Line: line,
				Text: fmt.Sprintf("a checkpoint after the one of %d records is not valid: %v", v.report.Newest.Size, err)}
		}
		v.report.Log = c.Log
		v.heads = append(v.heads, head{c.Size, c.Root, name})
		if i == len(notes)-1 {
			v.report.Newest = *c
		}
		line += bytes.Count(text, []byte("\n"))
	}
	if rest > 0 && len(notes) > 0 && !bytes.HasPrefix(b[len(b)-rest:], []byte(originPrefix)[:min(rest, len(originPrefix))]) {
		return &Problem{Seq: v.report.Newest.Size + 1, Last: v.report.Newest.Size + 1, File: name, Line: line, Text: "something that is no checkpoint follows"}
	}
	return nil
}

// begin takes the tree up to the first record from the stored hashes when older
// segments were removed; the next checkpoint proves them.
func (v *verifier) begin(first uint64) error {
	v.report.First, v.report.Last = first, first-1
	if f, err := v.dir.Open(treeName); err == nil {
		v.tree = f
		v.leaf = newLeafReader(f, first)
	}
	if first == 1 {
		return nil
	}
	v.needs = first - 1
	missing := &Problem{Seq: 1, Last: first - 1, File: fileName(first, segmentSuffix), Text: fmt.Sprintf("records 1 to %d are missing", first-1)}
	at, ok := v.tree.(io.ReaderAt)
	if !ok {
		return missing
	}
	edge, err := readFrontier(first-1, hashReaderAt{at})
	if err != nil {
		return missing
	}
	v.edge = *edge
	for len(v.heads) > 0 && v.heads[0].size < first-1 {
		v.heads = v.heads[1:]
	}
	return v.compare(&rawLine{seq: first - 1, first: first})
}

// record checks one record, in its place by lines already.
func (v *verifier) record(raw *rawLine) error {
	_, e, err := parseRecord(raw.line)
	if err != nil {
		return err
	}
	if e.Phase == kms.PhaseSystem {
		if err := v.own(raw, &e); err != nil {
			return err
		}
	}
	h := tlog.RecordHash(raw.line)
	if v.doubt == nil && v.leaf != nil {
		if stored, ok := v.leaf.next(); ok && stored != h {
			v.doubt = &Problem{Seq: raw.seq, Last: raw.seq, File: fileName(raw.first, segmentSuffix), Line: raw.row,
				Text: fmt.Sprintf("record %d was changed", raw.seq)}
		}
	}
	var completed [64]tlog.Hash
	v.edge.add(h, completed[:0])
	v.report.Last = raw.seq
	if v.check.Progress != nil && raw.seq%10000 == 0 {
		v.check.Progress(raw.seq)
	}
	return v.compare(raw)
}

// own looks at the log's records about itself.
func (v *verifier) own(raw *rawLine, e *kms.Event) error {
	switch {
	case raw.seq == 1:
		id, link, err := parseOpening(e)
		if err != nil || id != v.report.Log {
			return errRecord
		}
		if link != nil {
			v.report.Previous = &link.Checkpoint
			_, err := ParseCheckpoint(link.Text, v.check.Keys...)
			v.report.PreviousOK = err == nil
		}
	case e.Operation == OpRemove:
		n, err := strconv.ParseUint(strings.TrimPrefix(e.Note, removedPrefix), 10, 64)
		if err != nil {
			return errRecord
		}
		v.removed = max(v.removed, n)
	}
	return nil
}

// compare compares the root with every head of the present size.
func (v *verifier) compare(raw *rawLine) error {
	if len(v.heads) == 0 || v.heads[0].size != v.edge.n {
		return nil
	}
	root := v.edge.root()
	for len(v.heads) > 0 && v.heads[0].size == v.edge.n {
		if h := v.heads[0]; h.root != root {
			if v.doubt != nil {
				return v.doubt
			}
			return &Problem{Seq: max(v.good+1, v.report.First), Last: raw.seq, File: fileName(raw.first, segmentSuffix), Line: raw.row,
				Text: fmt.Sprintf("records %d to %d do not give the root in %s", max(v.good+1, v.report.First), raw.seq, h.file)}
		}
		v.heads = v.heads[1:]
	}
	v.good, v.doubt = v.edge.n, nil // if the stored hashes differed, they were wrong
	return nil
}

// judge turns an error at a record into the Problem it is, or into the end of a
// log that a crash left unfinished.
func (v *verifier) judge(raw *rawLine, err error, lastSegment uint64) error {
	var p *Problem
	var g *gap
	switch {
	case errors.As(err, &p):
		return err
	case !errors.Is(err, errRecord):
		return err
	case raw.first == lastSegment && raw.seq > v.newestHead():
		rest, terr := v.tail(raw.first, raw.row)
		if terr != nil {
			return terr
		}
		if rest {
			return v.end(lastSegment) // one unfinished line at the end
		}
	}
	p = &Problem{Seq: raw.seq, Last: raw.seq, File: fileName(raw.first, segmentSuffix), Line: raw.row, Text: fmt.Sprintf("record %d: %v", raw.seq, err)}
	if errors.As(err, &g) {
		p.Text = g.Error()
		if g.got > g.want {
			p.Last = g.got - 1
		}
	}
	if v.doubt != nil && v.doubt.Seq < p.Seq {
		return v.doubt
	}
	return p
}

// newestHead is the largest size that something signed vouches for.
func (v *verifier) newestHead() uint64 {
	n := v.report.Newest.Size
	if len(v.heads) > 0 {
		n = max(n, v.heads[len(v.heads)-1].size)
	}
	return n
}

// tail reports whether nothing whole follows the bad line of a segment.
func (v *verifier) tail(first uint64, row int) (bool, error) {
	f, err := v.dir.Open(fileName(first, segmentSuffix))
	if err != nil {
		return false, fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
	}
	defer f.Close()
	sc := newScanner(f)
	for {
		ok, err := sc.next()
		if err != nil && !errors.Is(err, errRecord) {
			return false, err
		}
		if err != nil || !ok {
			return true, nil
		}
		if sc.number > row {
			return false, nil
		}
	}
}

// end judges what is known once all records are read.
func (v *verifier) end(lastSegment uint64) error {
	name := fileName(lastSegment, segmentSuffix)
	if v.removed < v.needs {
		return &Problem{Seq: 1, Last: v.needs, File: fileName(v.report.First, segmentSuffix),
			Text: fmt.Sprintf("records 1 to %d are missing and no record says they were removed", v.needs)}
	}
	if n := v.newestHead(); v.report.Last < n {
		if v.doubt != nil {
			return v.doubt
		}
		return &Problem{Seq: v.report.Last + 1, Last: n, File: name,
			Text: fmt.Sprintf("the log ends after record %d; records to %d are missing", v.report.Last, n)}
	}
	if v.doubt != nil { // after the newest checkpoint: only the stored hashes speak
		return v.doubt
	}
	v.report.Uncovered = v.report.Last - v.report.Newest.Size
	return v.torn(lastSegment)
}

// torn measures what follows the last whole record.
func (v *verifier) torn(first uint64) error {
	f, err := v.dir.Open(fileName(first, segmentSuffix))
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
	}
	defer f.Close()
	sc := newScanner(f)
	for n := first; n <= v.report.Last; n++ {
		if ok, err := sc.next(); !ok || err != nil {
			return err
		}
	}
	torn, err := onlyNUL(sc.r)
	v.report.Torn = torn
	return err
}

// hashReaderAt reads stored hashes from any file.
type hashReaderAt struct{ r io.ReaderAt }

func (h hashReaderAt) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		if _, err := h.r.ReadAt(out[i][:], x*tlog.HashSize); err != nil {
			return nil, fmt.Errorf("%w: audit: read stored hash %d: %w", dek.ErrCorrupt, x, err)
		}
	}
	return out, nil
}

// A leafReader reads the stored hashes of records one after the other.
type leafReader struct {
	r *bufio.Reader
	n uint64 // records before the next one
}

// newLeafReader returns nil if f can't be read at an offset.
func newLeafReader(f fs.File, first uint64) *leafReader {
	at, ok := f.(io.ReaderAt)
	if !ok {
		return nil
	}
	off := tlog.StoredHashCount(int64(first-1)) * tlog.HashSize
	return &leafReader{bufio.NewReaderSize(io.NewSectionReader(at, off, 1<<62), 256<<10), first - 1}
}

// next returns the stored hash of the next record, false if there is none.
func (l *leafReader) next() (h tlog.Hash, ok bool) {
	if _, err := io.ReadFull(l.r, h[:]); err != nil {
		return h, false
	}
	// Behind it stand the subtrees it completes; at the end of a log in use they
	// may not be there yet, and then neither is the next leaf.
	_, _ = l.r.Discard(tlog.HashSize * bits.TrailingZeros64(^l.n))
	l.n++
	return h, true
}
