package audit

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A Log is open for appending. All methods may be called concurrently.
type Log struct {
	cfg  Config
	id   string
	link *linked // of the first record; nil if none or removed
	dir  *os.File
	lock *os.File
	tree treeFile

	recovery Recovery

	mu      sync.Mutex
	fill    *batch         // takes records; never nil
	next    uint64         // sequence of the next record
	stopped error          // why nothing is taken, nil if all is well
	hung    bool           // stopped because the disk does not answer
	refused uint64         // appends since stopped
	edge    frontier       // of the records on disk
	open    map[uint64]act // intents on disk without outcome
	change  uint64         // largest Event.Change on disk
	state   []byte         // recorded with it
	newest  *Checkpoint    // signed and on disk
	unsaid  error          // why the last checkpoint could not be made
	bodies  sync.Pool      // of *[]byte
	spare   *batch         // buffers to use again
	first   uint64         // of the newest segment
	cpFile  *os.File       // checkpoints of the newest segment; guarded by cpMu
	cpFirst uint64         // its number; guarded by cpMu
	cpMu    sync.Mutex     // held while a checkpoint is made
	wake    chan struct{}  // capacity 1: fill is not empty
	dirty   chan struct{}  // capacity 1: records without checkpoint
	quit    chan struct{}  // closed by Close
	wg      sync.WaitGroup
	once    sync.Once
	closing error

	// The flusher's own:
	seg   *os.File
	off   int64    // end of the records in seg
	room  int64    // end of the zeros made ahead
	ahead frontier // edge, with the batch that write wrote
	hash  []tlog.Hash
	pack  []byte
}

// An act is an intent that waits for its outcome.
type act struct {
	event kms.Event
	since time.Time // by the monotonic clock of this process
}

// A batch is a group of records that reaches the disk together.
type batch struct {
	buf      []byte
	ends     []int // of each record in buf, before its newline
	events   []kms.Event
	done     chan struct{}
	released bool // guarded by Log.mu
	err      error
	group    int           // if not 0, the records that close enough; guarded by Log.mu
	enough   chan struct{} // what gather waits for
}

func newBatch() *batch { return &batch{done: make(chan struct{})} }

// A Recovery says what Open found and mended.
type Recovery struct {
	Torn    int64    // bytes of an unfinished, unacknowledged write cut off
	Orphans []uint64 // intents without outcome that got a closing record
	Rebuilt bool     // the file of stored hashes was made anew from the records
}

var (
	_ kms.Auditor   = (*Log)(nil)
	_ kms.AuditTail = (*Log)(nil)
)

// Append writes e and returns its sequence once it is on disk (fdatasync has
// returned), in a group with what others append meanwhile. On an error the act
// must not happen: dek.ErrExhausted (disk full), dek.ErrUnavailable (disk sick,
// log closed, ctx ended or Deadline passed: the record may or may not be
// written), dek.ErrInvalid (the event has no record). A log that failed refuses
// at once until it has recovered by itself.
func (l *Log) Append(ctx context.Context, e kms.Event) (uint64, error) {
	if e.Time.IsZero() {
		e.Time = l.cfg.Clock.Now()
	}
	if err := check(&e); err != nil {
		return 0, err
	}
	body, _ := l.bodies.Get().(*[]byte)
	if body == nil {
		body = new([]byte)
	}
	defer l.bodies.Put(body)
	*body = appendBody((*body)[:0], &e)
	if len(*body) > MaxRecord-len(`{"seq":`)-20 {
		return 0, fmt.Errorf("%w: audit: record of %d bytes is above %d", dek.ErrInvalid, len(*body), MaxRecord)
	}
	seq, b, err := l.take(&e, *body)
	if err != nil {
		return 0, err
	}
	select {
	case <-b.done:
		return seq, b.err
	case <-ctx.Done():
		return 0, fmt.Errorf("%w: audit: record %d: %w", dek.ErrUnavailable, seq, context.Cause(ctx))
	}
}

// take gives the event a sequence and a place in the group that fills.
func (l *Log) take(e *kms.Event, body []byte) (uint64, *batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped != nil {
		l.refused++
		return 0, nil, l.stopped
	}
	seq, b := l.next, l.fill
	if e.Intent >= seq {
		return 0, nil, fmt.Errorf("%w: audit: intent %d is not in the log", dek.ErrInvalid, e.Intent)
	}
	l.next++
	b.add(seq, e, body)
	if len(b.ends) == 1 {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	if len(b.ends) == b.group {
		close(b.enough)
	}
	return seq, b, nil
}

func (b *batch) add(seq uint64, e *kms.Event, body []byte) {
	b.buf = appendRecord(b.buf, seq, body)
	b.ends = append(b.ends, len(b.buf))
	b.buf = append(b.buf, '\n')
	b.events = append(b.events, *e)
}

// release lets the waiters of b go. l.mu is held.
func (b *batch) release(err error) {
	if !b.released {
		b.released, b.err = true, err
		close(b.done)
	}
}

// apply makes the records of b part of the log in memory. l.mu is held.
func (l *Log) apply(b *batch) {
	seq := l.edge.n
	l.edge = l.ahead
	for i := range b.events {
		seq++
		l.note(seq, &b.events[i])
	}
}

// note keeps what later calls need to know of a record on disk.
func (l *Log) note(seq uint64, e *kms.Event) {
	switch e.Phase {
	case kms.PhaseIntent:
		l.open[seq] = act{*e, time.Now()}
	case kms.PhaseOutcome:
		delete(l.open, e.Intent)
	}
	if e.Change > l.change {
		l.change, l.state = e.Change, e.State
	}
}

// Recovery says what Open found and mended.
func (l *Log) Recovery() Recovery { return l.recovery }

// Size returns how many records are on disk.
func (l *Log) Size() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.edge.n
}

// Head implements kms.Auditor: the newest checkpoint that is signed and on disk.
func (l *Log) Head(context.Context) ([]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]byte(nil), l.newest.Text...), nil
}

// Newest returns the checkpoint of Head in its parts.
func (l *Log) Newest() Checkpoint {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *l.newest
}

// StateTail implements kms.AuditTail.
func (l *Log) StateTail(context.Context) (uint64, []byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.change, append([]byte(nil), l.state...), nil
}

// Health reports why records or checkpoints can't be written, nil if they can.
func (l *Log) Health(context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.stopped, l.unsaid)
}

// keys are the audit keys whose checkpoints this log accepts.
func (l *Log) keys() []crypto.PublicKey {
	return append([]crypto.PublicKey{l.cfg.Signer.Public()}, l.cfg.Trusted...)
}

// Close writes what was taken, a last checkpoint, and closes the files. Appends
// that come later get dek.ErrUnavailable.
func (l *Log) Close() error {
	l.once.Do(func() {
		l.mu.Lock()
		if l.stopped == nil {
			l.stopped = fmt.Errorf("%w: audit: log is closed", dek.ErrUnavailable)
		}
		l.mu.Unlock()
		close(l.quit)
		l.wg.Wait()
		l.closing = errors.Join(l.checkpoint(), l.trim(), l.closeFiles())
	})
	return l.closing
}

func (l *Log) closeFiles() error {
	var errs []error
	for _, f := range []*os.File{l.seg, l.tree.f, l.cpFile, l.dir, l.lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
