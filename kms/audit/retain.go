package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// removedPrefix begins the note of an OpRemove record; the last removed
// sequence follows.
const removedPrefix = "through "

// Remove deletes the segments whose records the exported checkpoint covers. The
// caller vouches that it and these segments are kept elsewhere. The newest
// segment and those with intents still open stay. The hashes of removed records
// are kept, so that proofs go on to work. It returns the last removed sequence,
// 0 if no segment could be removed. Errors: those of Extends and Append.
func (l *Log) Remove(ctx context.Context, exported []byte) (through uint64, err error) {
	if err := l.Extends(ctx, exported); err != nil {
		return 0, err
	}
	c, err := ParseCheckpoint(exported, l.keys()...)
	if err != nil || c.Log != l.id {
		return 0, fmt.Errorf("%w: audit: remove needs a checkpoint of this log", dek.ErrInvalid)
	}
	segs, err := listFiles(os.DirFS(l.cfg.Dir), segmentSuffix)
	if err != nil {
		return 0, err
	}
	limit := min(c.Size, l.oldestOpen()-1)
	var gone []uint64
	for i := 0; i+1 < len(segs) && segs[i+1]-1 <= limit; i++ {
		gone, through = append(gone, segs[i]), segs[i+1]-1
	}
	if len(gone) == 0 {
		return 0, nil
	}
	// The record first, signed: a reader must be able to tell removal from loss.
	e := kms.Event{Phase: kms.PhaseSystem, Operation: OpRemove, Principal: principal, Note: removedPrefix + strconv.FormatUint(through, 10)}
	if _, err := l.Append(ctx, e); err != nil {
		return 0, err
	}
	if err := l.checkpoint(); err != nil {
		return 0, err
	}
	return through, l.unlink(gone)
}

// oldestOpen is the sequence of the oldest intent without outcome, or the next
// one.
func (l *Log) oldestOpen() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	seq := l.next
	for s := range l.open {
		seq = min(seq, s)
	}
	return seq
}

func (l *Log) unlink(segs []uint64) error {
	l.cpMu.Lock() // no checkpoint moves between files meanwhile
	defer l.cpMu.Unlock()
	for _, first := range segs {
		for _, suffix := range []string{checkpointSuffix, segmentSuffix} {
			err := os.Remove(filepath.Join(l.cfg.Dir, fileName(first, suffix)))
			if err != nil && !os.IsNotExist(err) {
				return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
			}
		}
	}
	return diskError(l.dir.Sync(), l.cfg.Dir)
}
