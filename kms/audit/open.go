package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/kms"
)

// Open opens or begins the log in cfg.Dir. It reads from the newest checkpoint
// on, cuts off a write that a crash left unfinished, and closes the intents of
// the last process. Errors wrap dek.ErrInvalid (configuration, mode of the
// directory), dek.ErrPrecondition (another process has the log), dek.ErrCorrupt
// (the records do not fit the newest checkpoint: the text says what and the way
// on), dek.ErrExhausted (disk full) or dek.ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Log, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	l := &Log{
		cfg: cfg, fill: newBatch(), open: map[uint64]act{},
		wake: make(chan struct{}, 1), dirty: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	if err := l.start(ctx); err != nil {
		l.closeFiles()
		return nil, err
	}
	l.wg.Go(l.flusher)
	l.wg.Go(l.checkpointer)
	return l, nil
}

func (l *Log) start(ctx context.Context) error {
	if err := l.enter(); err != nil {
		return err
	}
	if err := diskError(l.makeReserve(), l.cfg.Dir); err != nil {
		return err
	}
	fresh, err := l.recover(ctx)
	if err != nil {
		return err
	}
	if fresh {
		err = l.begin()
	} else {
		err = l.closeOrphans()
	}
	if err != nil {
		return diskError(err, l.cfg.Dir)
	}
	return diskError(l.checkpoint(), l.cfg.Dir)
}

// diskError gives a class to errors of the file system that have none.
func diskError(err error, dir string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: audit: no space left in %s: free some, then start again: %w", dek.ErrExhausted, dir, err)
	case errors.Is(err, dek.ErrUnavailable), errors.Is(err, dek.ErrCorrupt), errors.Is(err, dek.ErrInvalid):
		return err
	}
	return fmt.Errorf("%w: audit: %s: %w", dek.ErrUnavailable, dir, err)
}

// enter makes or checks the directory and takes its lock.
func (l *Log) enter() error {
	dir := l.cfg.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrInvalid, err)
	}
	// The name of the directory must be as durable as what is synced inside.
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return diskError(err, dir)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrInvalid, err)
	}
	l.dir = d
	st, err := d.Stat()
	if err != nil {
		return fmt.Errorf("%w: audit: %w", dek.ErrInvalid, err)
	}
	if p := st.Mode().Perm(); !st.IsDir() || p&0o077 != 0 {
		return fmt.Errorf("%w: audit: %s has mode %04o: it must be a directory with 0700", dek.ErrInvalid, dir, p)
	}
	if l.lock, err = os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return diskError(err, dir)
	}
	if err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w: audit: %s is in use by another process", dek.ErrPrecondition, dir)
	}
	if l.tree.f, err = os.OpenFile(filepath.Join(dir, treeName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return diskError(err, dir)
	}
	return nil
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// begin writes the first record and makes the first checkpoint.
func (l *Log) begin() error {
	var id [16]byte
	rand.Read(id[:])
	l.id = hex.EncodeToString(id[:])
	text := "log " + l.id
	if l.cfg.Link != nil {
		prev, err := ParseCheckpoint(l.cfg.Link.Checkpoint, l.cfg.Link.Key)
		if err != nil {
			return fmt.Errorf("%w: audit: link: %w", dek.ErrInvalid, err)
		}
		der, err := x509.MarshalPKIXPublicKey(l.cfg.Link.Key)
		if err != nil {
			return fmt.Errorf("%w: audit: link: %w", dek.ErrInvalid, err)
		}
		text += "\nkey " + base64.StdEncoding.EncodeToString(der) + "\n" + string(prev.Text)
		l.link = &linked{*prev, l.cfg.Link.Key}
	}
	var err error
	if l.seg == nil {
		if l.seg, err = l.createSegment(1); err != nil {
			return err
		}
	}
	l.first, l.next = 1, 1
	return l.writeOwn(OpOpen, text)
}

// A linked is the head of the log that this one follows.
type linked struct {
	Checkpoint
	key crypto.PublicKey
}

// parseOpening reads the first record of a log.
func parseOpening(e *kms.Event) (id string, link *linked, err error) {
	bad := fmt.Errorf("%w: audit: the first record does not begin a log", dek.ErrCorrupt)
	if e.Operation != OpOpen || e.Phase != kms.PhaseSystem {
		return "", nil, bad
	}
	head, rest, more := strings.Cut(e.Note, "\n")
	id = strings.TrimPrefix(head, "log ")
	if !validLogID(id) || head != "log "+id {
		return "", nil, bad
	}
	if !more {
		return id, nil, nil
	}
	head, rest, _ = strings.Cut(rest, "\n")
	der, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(head, "key "))
	if err != nil || !strings.HasPrefix(head, "key ") {
		return "", nil, bad
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return "", nil, bad
	}
	c, err := ParseCheckpoint([]byte(rest), key)
	if err != nil {
		return "", nil, bad
	}
	return id, &linked{*c, key}, nil
}

// wrong tells the operator that the log does not fit its checkpoint.
func (l *Log) wrong(format string, a ...any) error {
	return fmt.Errorf("%w: audit log in %s: %s. Nothing was changed. The way on: keep the directory as evidence, "+
		"run keyward audit verify on it, and begin a new log linked to the newest exported checkpoint",
		dek.ErrCorrupt, l.cfg.Dir, fmt.Sprintf(format, a...))
}

// recover brings the log in memory to where the files are; fresh if there are
// no records.
func (l *Log) recover(ctx context.Context) (fresh bool, err error) {
	segs, err := listFiles(os.DirFS(l.cfg.Dir), segmentSuffix)
	if err != nil {
		return false, err
	}
	if l.newest, err = l.lastCheckpoint(); err != nil {
		return false, err
	}
	if l.newest == nil {
		return l.recoverUnsigned(segs)
	}
	if len(segs) == 0 {
		return false, l.wrong("the checkpoint covers %d records, but there is no segment", l.newest.Size)
	}
	l.id = l.newest.Log
	l.change, l.state = l.newest.Change, l.newest.State
	if err := l.loadEdge(ctx, segs); err != nil {
		return false, err
	}
	if err := l.readOpening(segs[0]); err != nil {
		return false, err
	}
	return false, l.replay(ctx, segs)
}

// recoverUnsigned handles a log without any checkpoint: one that a crash kept
// from ever being used.
func (l *Log) recoverUnsigned(segs []uint64) (fresh bool, err error) {
	if len(segs) == 0 {
		return true, nil
	}
	f, err := os.OpenFile(filepath.Join(l.cfg.Dir, fileName(segs[0], segmentSuffix)), os.O_RDWR, 0)
	if err != nil {
		return false, diskError(err, l.cfg.Dir)
	}
	sc, n := newScanner(f), 0
	ok, err := sc.next()
	for ; ok && err == nil; ok, err = sc.next() {
		n++
	}
	if err != nil || n > 1 || len(segs) > 1 || segs[0] != 1 {
		f.Close()
		return false, l.wrong("there are records but no checkpoint")
	}
	if err := f.Truncate(0); err != nil {
		f.Close()
		return false, diskError(err, l.cfg.Dir)
	}
	l.seg = f
	return true, nil
}

// lastCheckpoint reads the newest checkpoint and cuts off a torn one after it.
func (l *Log) lastCheckpoint() (*Checkpoint, error) {
	files, err := listFiles(os.DirFS(l.cfg.Dir), checkpointSuffix)
	if err != nil {
		return nil, err
	}
	for _, first := range slices.Backward(files) {
		name := filepath.Join(l.cfg.Dir, fileName(first, checkpointSuffix))
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, diskError(err, l.cfg.Dir)
		}
		notes, rest := splitNotes(b)
		if rest > 0 {
			if err := os.Truncate(name, int64(len(b)-rest)); err != nil {
				return nil, diskError(err, l.cfg.Dir)
			}
		}
		if len(notes) == 0 {
			continue
		}
		c, err := ParseCheckpoint(notes[len(notes)-1], l.keys()...)
		if err != nil {
			return nil, l.wrong("the newest checkpoint in %s is not signed by this audit key", filepath.Base(name))
		}
		return c, nil
	}
	return nil, nil
}

// loadEdge takes the edge at the newest checkpoint from the stored hashes, or
// from the records if these are damaged.
func (l *Log) loadEdge(ctx context.Context, segs []uint64) error {
	edge, err := readFrontier(l.newest.Size, l.tree)
	if err == nil && edge.root() == l.newest.Root {
		l.edge = *edge
		return nil
	}
	l.recovery.Rebuilt = true
	l.cfg.Logger.Warn("audit: the stored hashes do not fit the checkpoint; reading all records")
	edge = &frontier{}
	if segs[0] > 1 {
		if edge, err = readFrontier(segs[0]-1, l.tree); err != nil {
			return l.wrong("records 1 to %d are removed and their hashes are gone", segs[0]-1)
		}
	}
	var packed []byte
	at := l.tree.offset(edge.n)
	flush := func() error {
		_, err := l.tree.f.WriteAt(packed, at)
		at, packed = at+int64(len(packed)), packed[:0]
		return diskError(err, l.cfg.Dir)
	}
	for rec, err := range lines(ctx, os.DirFS(l.cfg.Dir), segs, segs[0]) {
		if err != nil && !errors.Is(err, errRecord) {
			return diskError(err, l.cfg.Dir)
		} else if err != nil {
			return l.wrong("%v", err)
		}
		packed = pack(packed, edge.add(tlog.RecordHash(rec.line), nil))
		if len(packed) > 1<<20 {
			if err := flush(); err != nil {
				return err
			}
		}
		if rec.seq == l.newest.Size {
			break
		}
	}
	if edge.n != l.newest.Size || edge.root() != l.newest.Root {
		return l.wrong("records 1 to %d do not give the root of the newest checkpoint", l.newest.Size)
	}
	l.edge = *edge
	return flush()
}

// readOpening finds the link to an older log, if its record is still here.
func (l *Log) readOpening(first uint64) error {
	if first != 1 {
		return nil
	}
	for rec, err := range lines(context.Background(), os.DirFS(l.cfg.Dir), []uint64{1}, 1) {
		if err != nil {
			return l.wrong("%v", err)
		}
		_, e, err := parseRecord(rec.line)
		if err != nil {
			return l.wrong("record 1: %v", err)
		}
		id, link, err := parseOpening(&e)
		if err != nil || id != l.id {
			return l.wrong("the first record belongs to another log")
		}
		l.link = link
		return nil
	}
	return l.wrong("the first record is missing")
}

// replay reads from the oldest open intent on and adds what the checkpoint does
// not cover. The tail is written again, so that pages the last process failed
// to write fail here and not silently.
func (l *Log) replay(ctx context.Context, segs []uint64) error {
	from := min(l.newest.Open, l.newest.Size+1)
	i, found := slices.BinarySearch(segs, from)
	if !found {
		i--
	}
	if i < 0 {
		i = 0
	}
	last := segs[len(segs)-1]
	var hashes []tlog.Hash
	var end, tail int64 // of the last whole record, and of what is covered, in the last segment
	want := segs[i]
	treeAt := l.tree.offset(l.edge.n)
	for rec, err := range lines(ctx, os.DirFS(l.cfg.Dir), segs[i:], segs[i]) {
		if err != nil {
			if !errors.Is(err, errRecord) {
				return diskError(err, l.cfg.Dir)
			}
			if want <= l.newest.Size || rec.first != last {
				return l.wrong("%v", err)
			}
			break // the torn end of the last segment
		}
		if rec.seq >= from {
			_, e, err := parseRecord(rec.line)
			if err != nil && (rec.seq <= l.newest.Size || rec.first != last) {
				return l.wrong("record %d: %v", rec.seq, err)
			} else if err != nil {
				break
			}
			l.note(rec.seq, &e)
		}
		if rec.seq > l.newest.Size {
			hashes = l.edge.add(tlog.RecordHash(rec.line), hashes)
		} else if rec.first == last {
			tail = rec.end
		}
		if want++; rec.first == last {
			end = rec.end
		}
	}
	if want <= l.newest.Size {
		return l.wrong("it ends after record %d, the newest checkpoint covers %d", want-1, l.newest.Size)
	}
	if err := l.mendTree(treeAt, pack(nil, hashes)); err != nil {
		return diskError(err, l.cfg.Dir)
	}
	return diskError(l.mendTail(last, tail, end), l.cfg.Dir)
}

func (l *Log) mendTree(at int64, packed []byte) error {
	if _, err := l.tree.f.WriteAt(packed, at); err != nil {
		return err
	}
	if err := l.tree.f.Truncate(at + int64(len(packed))); err != nil {
		return err
	}
	return l.tree.f.Sync()
}

// mendTail opens the last segment, keeps aside and cuts off what comes after
// end, and writes the records after tail again.
func (l *Log) mendTail(first uint64, tail, end int64) error {
	f, err := os.OpenFile(filepath.Join(l.cfg.Dir, fileName(first, segmentSuffix)), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	l.seg, l.first, l.off, l.room = f, first, end, end
	l.next = l.edge.n + 1
	after, err := io.ReadAll(io.NewSectionReader(f, end, 1<<30))
	if err != nil {
		return err
	}
	if torn := bytes.TrimRight(after, "\x00"); len(torn) > 0 {
		l.recovery.Torn = int64(len(torn))
		aside := filepath.Join(l.cfg.Dir, fileName(l.next, ".torn"))
		if err := os.WriteFile(aside, torn, 0o600); err != nil {
			return err
		}
		l.cfg.Logger.Warn("audit: an unfinished write was cut off", "bytes", len(torn), "kept", aside, "record", l.next)
	}
	again := make([]byte, end-tail)
	if _, err := f.ReadAt(again, tail); err != nil {
		return err
	}
	if _, err := f.WriteAt(again, tail); err != nil {
		return err
	}
	return l.trim()
}

// closeOrphans gives the intents of the last process an outcome.
func (l *Log) closeOrphans() error {
	var events []kms.Event
	if l.recovery.Torn > 0 {
		events = append(events, kms.Event{Time: l.cfg.Clock.Now(), Phase: kms.PhaseSystem, Operation: OpTorn, Principal: principal,
			Note: fmt.Sprintf("%d bytes of an unfinished write were cut off", l.recovery.Torn)})
	}
	for _, seq := range slices.Sorted(maps.Keys(l.open)) {
		l.recovery.Orphans = append(l.recovery.Orphans, seq)
		events = append(events, l.epitaph(seq, l.open[seq].event))
	}
	if len(events) == 0 {
		return nil
	}
	return l.writeEvents(events...)
}
