package audit

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// checkpointer signs the head of the log at most CheckpointEvery after a record
// until Close, which signs the last one itself.
func (l *Log) checkpointer() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-l.dirty:
		case <-l.quit:
			return
		}
		timer.Reset(l.cfg.CheckpointEvery)
		select {
		case <-timer.C:
		case <-l.quit:
			return
		}
		if err := l.checkpoint(); err != nil {
			l.cfg.Logger.Error("audit: no checkpoint could be made; will be tried again", "err", err)
			l.touch()
		}
		l.sweep()
	}
}

// checkpoint signs the head and makes it durable, after the hashes below it.
func (l *Log) checkpoint() error {
	l.cpMu.Lock()
	defer l.cpMu.Unlock()
	c, first := l.unsigned()
	if c == nil {
		return nil
	}
	err := l.tree.f.Sync()
	if err == nil {
		err = c.sign(l.cfg.Signer)
	}
	if err == nil {
		err = l.keep(c, first)
	}
	if err != nil {
		err = fmt.Errorf("checkpoint of %d records: %w", c.Size, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.unsaid = err; err == nil {
		l.newest = c
	}
	return err
}

// unsigned describes the records on disk; nil if that is signed already.
func (l *Log) unsigned() (*Checkpoint, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.newest != nil && l.newest.Size == l.edge.n {
		return nil, 0
	}
	c := &Checkpoint{
		Log: l.id, Size: l.edge.n, Root: l.edge.root(), Time: l.cfg.Clock.Now(),
		Open: l.edge.n + 1, Change: l.change, State: l.state,
	}
	for seq := range l.open {
		c.Open = min(c.Open, seq)
	}
	return c, l.first
}

// keep appends c to the checkpoints of the segment that begins at first. A
// write that failed half way is cut off first: cpFile ends with a whole note.
func (l *Log) keep(c *Checkpoint, first uint64) error {
	if l.cpFile == nil || l.cpFirst != first {
		f, err := os.OpenFile(filepath.Join(l.cfg.Dir, fileName(first, checkpointSuffix)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
		}
		if l.cpFile != nil {
			l.cpFile.Close() // synced with every note
		}
		l.cpFile, l.cpFirst = f, first
		if err := l.dir.Sync(); err != nil {
			return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
		}
	}
	st, err := l.cpFile.Stat()
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
	}
	if _, err = l.cpFile.WriteAt(c.Text, st.Size()); err == nil {
		err = fdatasync(l.cpFile)
	}
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, errors.Join(err, l.cpFile.Truncate(st.Size())))
	}
	return nil
}

// sweep closes intents that have been open for too long, so that the oldest
// open one, where a start begins to read, moves on.
func (l *Log) sweep() {
	l.mu.Lock()
	var late []kms.Event
	for _, seq := range slices.Sorted(maps.Keys(l.open)) {
		if a := l.open[seq]; time.Since(a.since) > l.cfg.OrphanAfter {
			late = append(late, l.epitaph(seq, a.event))
		}
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), l.cfg.Deadline)
	defer cancel()
	for _, e := range late {
		if _, err := l.Append(ctx, e); err != nil {
			return // tried again after the next checkpoint
		}
	}
}

// epitaph is the outcome of an intent whose own was never recorded.
func (l *Log) epitaph(seq uint64, e kms.Event) kms.Event {
	return kms.Event{
		Time: l.cfg.Clock.Now(), Phase: kms.PhaseOutcome, Intent: seq, Operation: e.Operation,
		Principal: e.Principal, Correlation: e.Correlation, Object: e.Object, Version: e.Version,
		Result: kms.ResultUnknown, Note: "no outcome was recorded; the act may have happened",
	}
}
