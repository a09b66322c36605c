package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// flusher writes groups until Close: while one is on its way to the disk the
// next fills.
func (l *Log) flusher() {
	for {
		select {
		case <-l.wake:
			l.drain()
		case <-l.quit:
			l.drain()
			return
		}
	}
}

func (l *Log) drain() {
	l.gather()
	for b := l.swap(); b != nil; b = l.swap() {
		l.flush(b)
		l.gather()
	}
}

// gatherTime bounds the wait for a group: little beside the wait for the disk
// and the token of any caller who is one of many.
const gatherTime = 2 * time.Millisecond

// gather waits, where many acts are under way, for a quarter of them to
// append: a flush costs CPU and wakes callers, and few large ones cost less
// than many small ones. Who is alone does not wait.
func (l *Log) gather() {
	l.mu.Lock()
	have, group := len(l.fill.ends), len(l.open)/4
	if have == 0 || have >= group || l.stopped != nil {
		l.mu.Unlock()
		return
	}
	enough := make(chan struct{})
	l.fill.group, l.fill.enough = group, enough
	l.mu.Unlock()
	timer := time.NewTimer(gatherTime)
	defer timer.Stop()
	select {
	case <-enough:
	case <-timer.C:
	case <-l.quit:
	}
}

// swap takes the group that fills, nil if it is empty.
func (l *Log) swap() *batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.fill
	if len(b.ends) == 0 {
		return nil
	}
	l.fill = newBatch()
	if s := l.spare; s != nil { // its waiters read done and err only
		l.fill.buf, l.fill.ends, l.fill.events = s.buf[:0], s.ends[:0], s.events[:0]
		l.spare = nil
	}
	return b
}

func (l *Log) flush(b *batch) {
	late := time.AfterFunc(l.cfg.Deadline, func() { l.hang(b) })
	err := l.write(b)
	late.Stop()
	if err != nil {
		l.mend(b, err)
		return
	}
	l.mu.Lock()
	l.apply(b)
	b.release(nil)
	l.spare = b
	if l.hung && len(l.fill.ends) == 0 { // else the rest goes to the disk first
		l.fill = newBatch()
		l.hung, l.stopped = false, nil
		l.cfg.Logger.Warn("audit: the disk answers again", "refused", l.refused)
		l.refused = 0
	}
	l.mu.Unlock()
	l.touch()
}

// touch asks for a checkpoint.
func (l *Log) touch() {
	select {
	case l.dirty <- struct{}{}:
	default:
	}
}

// hang lets the callers go when the disk does not answer. What they appended
// may still reach it; nothing more is taken until it does.
func (l *Log) hang(b *batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b.released { // it answered while the timer fired: nobody would undo what follows
		return
	}
	err := fmt.Errorf("%w: audit: the disk has not answered for %v", dek.ErrUnavailable, l.cfg.Deadline)
	b.release(err)
	l.fill.release(err)
	if l.stopped != nil { // closing, or hanging already
		return
	}
	l.stopped, l.hung = err, true
	l.cfg.Logger.Error("audit: key operations stop", "err", err)
}

// write brings b to the disk: hashes, then records, then fdatasync of these.
// (The hashes can be computed again; a checkpoint waits for them.)
func (l *Log) write(b *batch) error {
	if l.off > 0 && l.off+int64(len(b.buf)) > l.cfg.SegmentBytes {
		if err := l.rotate(); err != nil {
			return err
		}
	}
	if err := l.makeRoom(l.off + int64(len(b.buf))); err != nil {
		return err
	}
	l.ahead, l.hash = l.edge, l.hash[:0] // only this goroutine changes l.edge
	start := 0
	for _, end := range b.ends {
		l.hash = l.ahead.add(tlog.RecordHash(b.buf[start:end]), l.hash)
		start = end + 1
	}
	l.pack = pack(l.pack[:0], l.hash)
	if _, err := l.tree.f.WriteAt(l.pack, l.tree.offset(l.edge.n)); err != nil {
		return err
	}
	if _, err := l.seg.WriteAt(b.buf, l.off); err != nil {
		return err
	}
	if err := fdatasync(l.seg); err != nil {
		return err
	}
	l.off += int64(len(b.buf))
	return nil
}

func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("fdatasync "+filepath.Base(f.Name()), err)
		}
	}
}

var zeros [64 << 10]byte

// makeRoom writes zeros ahead of the records, so that most flushes change
// neither the size of the file nor its blocks (which costs a third of their
// time), and so that a full disk is met before a record is half written.
func (l *Log) makeRoom(until int64) error {
	for l.room < until {
		to := l.room + min(roomBytes, l.cfg.SegmentBytes)
		for at := l.room; at < to; at += int64(len(zeros)) {
			if _, err := l.seg.WriteAt(zeros[:min(int64(len(zeros)), to-at)], at); err != nil {
				return err
			}
		}
		l.room = to
	}
	return nil
}

// rotate ends the newest segment and begins the next one.
func (l *Log) rotate() error {
	if err := l.trim(); err != nil {
		return err
	}
	seg, err := l.createSegment(l.edge.n + 1)
	if err != nil {
		return err
	}
	l.seg.Close() // synced by trim
	l.seg, l.off, l.room = seg, 0, 0
	l.mu.Lock()
	l.first = l.edge.n + 1
	l.mu.Unlock()
	return nil
}

// trim gives back the room made ahead.
func (l *Log) trim() error {
	if err := l.seg.Truncate(l.off); err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
	}
	l.room = l.off
	return fdatasync(l.seg)
}

func (l *Log) createSegment(first uint64) (*os.File, error) {
	// A segment that a crash or a full disk left empty is used again.
	f, err := os.OpenFile(filepath.Join(l.cfg.Dir, fileName(first, segmentSuffix)), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := l.dir.Sync(); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// mend is where a failed write ends: the callers get the error, the log stands
// (fail closed), what was half written is undone, and writing is tried again
// until it works or the log is closed.
func (l *Log) mend(b *batch, cause error) {
	full := errors.Is(cause, unix.ENOSPC) || errors.Is(cause, unix.EDQUOT)
	err := fmt.Errorf("%w: audit: write: %w", dek.ErrUnavailable, cause)
	if full {
		err = fmt.Errorf("%w: audit: no space left in %s: key operations stop until there is: %w", dek.ErrExhausted, l.cfg.Dir, cause)
	}
	l.mu.Lock()
	closed := l.isClosed()
	l.stopped, l.hung = err, false
	b.release(err)
	l.fill.release(err)
	l.fill, l.next = newBatch(), l.edge.n+1
	l.mu.Unlock()
	l.cfg.Logger.Error("audit: key operations stop", "err", err)
	if closed {
		return
	}
	if full {
		l.sayFull()
	}
	retry := time.NewTicker(l.cfg.RetryEvery)
	defer retry.Stop()
	for {
		select {
		case <-l.quit:
			return
		case <-retry.C:
		}
		if err := l.resume(); err == nil {
			return
		}
	}
}

func (l *Log) isClosed() bool {
	select {
	case <-l.quit:
		return true
	default:
		return false
	}
}

// sayFull frees the reserve to record that the disk is full.
func (l *Log) sayFull() {
	err := os.Remove(l.reserve())
	if err == nil || errors.Is(err, os.ErrNotExist) {
		if err = l.undo(); err == nil {
			err = l.writeOwn(OpFull, "the disk is full; key operations are refused")
		}
	}
	if err != nil {
		l.cfg.Logger.Error("audit: could not record that the disk is full", "err", err)
	}
}

// undo clears what a failed write may have left behind the records. The pages
// are written again as a whole, so a lost earlier write shows here.
func (l *Log) undo() error {
	for at := l.off; at < l.room; at += int64(len(zeros)) {
		if _, err := l.seg.WriteAt(zeros[:min(int64(len(zeros)), l.room-at)], at); err != nil {
			return err
		}
	}
	return fdatasync(l.seg)
}

// resume tries to write again.
func (l *Log) resume() error {
	if err := l.undo(); err != nil {
		return err
	}
	if err := l.makeReserve(); err != nil {
		return err
	}
	l.mu.Lock()
	refused := l.refused
	l.mu.Unlock()
	if err := l.writeOwn(OpResumed, fmt.Sprintf("records are taken again; %d were refused", refused)); err != nil {
		return err
	}
	l.mu.Lock()
	if !l.isClosed() {
		l.stopped, l.refused = nil, 0
	}
	l.mu.Unlock()
	l.cfg.Logger.Warn("audit: key operations go on", "refused", refused)
	return nil
}

// writeOwn writes one record of the log itself, past those who wait. Only the
// flusher and Open call it.
func (l *Log) writeOwn(op kms.Operation, text string) error {
	return l.writeEvents(kms.Event{Time: l.cfg.Clock.Now(), Phase: kms.PhaseSystem, Operation: op, Principal: principal, Note: text})
}

func (l *Log) writeEvents(events ...kms.Event) error {
	b := newBatch()
	for i := range events {
		b.add(l.edge.n+uint64(i)+1, &events[i], appendBody(nil, &events[i]))
	}
	if err := l.write(b); err != nil {
		return err
	}
	l.mu.Lock()
	l.apply(b)
	l.next = l.edge.n + 1
	l.mu.Unlock()
	l.touch()
	return nil
}

func (l *Log) reserve() string { return filepath.Join(l.cfg.Dir, reserveName) }

// makeReserve makes sure that the reserve has its blocks on disk.
func (l *Log) makeReserve() error {
	f, err := os.OpenFile(l.reserve(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	for at := st.Size(); at < reserveBytes; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), reserveBytes-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}
