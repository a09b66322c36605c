package audit

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// A Past is a log that has ended, verified and read only. It implements
// kms.AuditTail for a restore that follows it with a new log. Methods may be
// called concurrently.
type Past struct {
	dir    fs.FS
	last   uint64
	change uint64
	state  []byte
	open   map[uint64]kms.Event // intents without an outcome
}

var _ kms.AuditTail = (*Past)(nil)

// OpenPast verifies the log in dir as Verify does and reads it; nothing is
// changed. Records after the newest checkpoint count: they can only say more.
// Errors wrap dek.ErrNotFound (no signed log there), dek.ErrAuth (the newest
// checkpoint is signed by none of c.Keys), or are those of Verify.
func OpenPast(ctx context.Context, dir fs.FS, c Check) (*Past, error) {
	if err := newestSigned(dir, c.Keys); err != nil {
		return nil, err
	}
	report, err := Verify(ctx, dir, c)
	if err != nil {
		return nil, err
	}
	p := &Past{dir: dir, last: report.Last, open: make(map[uint64]kms.Event)}
	return p, p.each(ctx, func(r Record) error {
		switch e := r.Event; e.Phase {
		case kms.PhaseIntent:
			p.open[r.Seq] = e
		case kms.PhaseOutcome:
			delete(p.open, e.Intent)
		}
		if r.Event.Change > p.change {
			p.change, p.state = r.Event.Change, r.Event.State
		}
		return nil
	})
}

// newestSigned looks at the newest checkpoint alone.
func newestSigned(dir fs.FS, keys []crypto.PublicKey) error {
	files, err := listFiles(dir, checkpointSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: audit: there is no log", dek.ErrNotFound)
	}
	if err != nil {
		return err
	}
	for _, first := range slices.Backward(files) {
		b, err := fs.ReadFile(dir, fileName(first, checkpointSuffix))
		if err != nil {
			return fmt.Errorf("%w: audit: %w", dek.ErrUnavailable, err)
		}
		if notes, _ := splitNotes(b); len(notes) > 0 {
			_, err := ParseCheckpoint(notes[len(notes)-1], keys...)
			return err
		}
	}
	return fmt.Errorf("%w: audit: there is no checkpoint", dek.ErrNotFound)
}

// each reads the whole records; what a crash left behind the last one is not
// read.
func (p *Past) each(ctx context.Context, f func(Record) error) error {
	for r, err := range Read(ctx, p.dir, Filter{}) {
		if err != nil {
			return err
		}
		if err := f(r); err != nil || r.Seq == p.last {
			return err
		}
	}
	return nil
}

// StateTail implements kms.AuditTail.
func (p *Past) StateTail(context.Context) (uint64, []byte, error) {
	return p.change, slices.Clone(p.state), nil
}

// EventsAfter implements kms.AuditTail. Intents without an outcome come last,
// each as the outcome that a start of the log would have given it.
func (p *Past) EventsAfter(ctx context.Context, change uint64, f func(seq uint64, e kms.Event) error) error {
	err := p.each(ctx, func(r Record) error {
		if r.Event.Change > change || r.Event.Result == kms.ResultUnknown {
			return f(r.Seq, r.Event)
		}
		return nil
	})
	for _, seq := range slices.Sorted(maps.Keys(p.open)) {
		if err != nil {
			break
		}
		e := p.open[seq]
		e.Phase, e.Intent, e.Result = kms.PhaseOutcome, seq, kms.ResultUnknown
		err = f(p.last, e)
	}
	return err
}
