package audit

import (
	"io"

	"github.com/keyward/keyward/kms"
)

// What tests outside the package look at.
var (
	ParseRecord = parseRecord
	ParseBody   = parseBody
	SplitNotes  = splitNotes
)

// EncodeRecord is the record of e, which must be valid.
func EncodeRecord(seq uint64, e kms.Event) []byte {
	return appendRecord(nil, seq, appendBody(nil, &e))
}

// Body is the text of c that is signed.
func (c *Checkpoint) Body() string { return c.body() }

// HangLate is what a slow disk's timer does when it fires while the disk answers.
func (l *Log) HangLate() {
	b := newBatch()
	l.mu.Lock()
	b.release(nil)
	l.mu.Unlock()
	l.hang(b)
}

// SeekOffset is where reading record from begins in a segment.
func SeekOffset(r io.ReaderAt, size int64, first, from uint64) (off int64, seq uint64) {
	p := seekRecord(r, size, first, from)
	return p.off, p.seq
}

// Sign signs c with the clock it has.
func (c *Checkpoint) Sign(cfg Config) error { return c.sign(cfg.Signer) }
