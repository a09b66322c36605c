package kms

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

// RestoreOptions says how a restore goes.
type RestoreOptions struct {
	// Private is the joined recovery key. nil: the token still holds the root
	// of the backup. With it everything moves to the token at hand: new root,
	// new signing keys, new master key versions, every DEK wrapped again.
	Private *recovery.Private
	// AcceptRollback goes on with a backup that is older than what the audit log
	// (or, later, an agent) has seen. The report lists what is missing. Numbers
	// and names that the log knows are never given out again.
	AcceptRollback bool
	// Recipient, only with Private, replaces the recovery recipient (its old
	// shares have been in one place now). Empty: the old one stays.
	Recipient string
	// NewLog begins a new audit log although the token is the old one: the old
	// log is lost. With Private the log is always new.
	NewLog bool
	// Before, if set, finds the log that a new one follows, so that the backup can
	// be compared with what it has seen; nil: it is gone (see
	// RestoreReport.Uncompared). It is called before anything is written.
	Before func(ctx context.Context, previous PreviousLog) (AuditTail, error)
	// OpenAudit, if set, is used in place of Config.OpenAudit and Config.Auditor
	// and learns which log a new one follows (nil: the log goes on).
	OpenAudit func(ctx context.Context, signer crypto.Signer, previous *PreviousLog) (Auditor, error)
}

// A PreviousLog is the audit log that a new one follows.
type PreviousLog struct {
	Checkpoint []byte           // the newest one in the backup
	Key        crypto.PublicKey // that signed it
}

// A RestoreReport says what a restore did.
type RestoreReport struct {
	Installation string
	Taken        time.Time // when the backup was made
	Change       uint64    // state change number of the backup
	Token        string    // that the backup was made with
	Checkpoint   []byte    // newest audit checkpoint in the backup, to compare with an exported log
	AuditKey     []byte    // that signed it, SubjectPublicKeyInfo: compare its SHA-256 too
	NewKeys      int       // master key versions made in the new token
	Rewrapped    int       // keyring versions wrapped again
	Lost         []string  // keyring versions without a recovery copy: gone
	Missing      []string  // acts after the backup, from the audit log
	KeptDisabled []string  // what stays switched off or revoked
	Uncompared   bool      // the log before is gone: nothing says what came after the backup
	Reserved     []string  // names and numbers given out after the backup: not given again
}

// restoreReserve is how many seals of a vault's new seal key are reserved for
// the restore itself.
const restoreReserve = 1 << 24

// Restore brings a backup back into an empty store (or one where a Restore was
// interrupted). Nothing is written before the whole file is verified. It wraps
//   - dek.ErrInvalid: not a backup, or wrong options;
//   - dek.ErrCorrupt: damaged or cut short; or older than the audit log has
//     seen (see AcceptRollback);
//   - dek.ErrAuth: the recovery key is not the one of this backup;
//   - dek.ErrPrecondition: the store is not empty; the token does not hold the
//     root and no recovery key is given;
//   - dek.ErrUnavailable: token, store or log: run it again.
//
// Nothing in the token is ever destroyed. Afterwards Open it.
func Restore(ctx context.Context, cfg Config, r io.Reader, opt RestoreOptions) (RestoreReport, error) {
	if opt.OpenAudit != nil {
		cfg.Auditor, cfg.OpenAudit = nil, func(context.Context, crypto.Signer) (Auditor, error) { return nil, dek.ErrInvalid }
	}
	cfg, err := cfg.complete()
	if opt.Recipient != "" {
		var perr error
		opt.Recipient, perr = canonicalRecipient(opt.Recipient)
		if opt.Private == nil {
			perr = fmt.Errorf("%w: a new recipient needs the recovery key, to seal every key to it", dek.ErrInvalid)
		}
		err = errors.Join(err, perr)
	}
	if err != nil {
		return RestoreReport{}, err
	}
	s := newService(cfg)
	defer s.release()
	st := &restorer{s: s, opt: opt}
	if err := st.run(ctx, r); err != nil {
		return RestoreReport{}, fmt.Errorf("restore: %w", err)
	}
	return st.report, nil
}

// A restorer is one Restore under way.
type restorer struct {
	s        *Service
	opt      RestoreOptions
	l        *loaded
	mark     restoreMarker
	markRev  int64
	previous *PreviousLog
	n        uint64 // the change that the restore makes
	report   RestoreReport

	events     []Event  // after the backup, from the log
	lostVaults []string // made after the backup
}

// A restoreMarker keeps the ids of the objects a Restore makes, so that one
// that is run again makes no second set.
type restoreMarker struct {
	Root    object            `json:"root"`
	Audit   object            `json:"audit"`
	CA      object            `json:"ca"`
	Masters map[string]object `json:"masters"` // by path of the key
}

func (st *restorer) run(ctx context.Context, r io.Reader) error {
	if err := st.read(ctx, r); err != nil {
		return err
	}
	if err := st.compareBefore(ctx); err != nil {
		return err
	}
	if err := st.prepareStore(ctx); err != nil {
		return err
	}
	if err := st.prepareToken(ctx); err != nil {
		return err
	}
	if err := st.openLog(ctx); err != nil {
		return err
	}
	if err := st.compareLog(ctx, st.s.tail); err != nil {
		return err
	}
	intent, err := st.s.append(ctx, Event{Time: st.s.cfg.Clock.Now(), Phase: PhaseIntent, Operation: OpRestore, Principal: systemPrincipal,
		Note: fmt.Sprintf("backup of change %d made %s; log before: %s", st.l.view.change, st.report.Taken.Format(time.RFC3339), firstLines(st.report.Checkpoint))})
	if err != nil {
		return err
	}
	if err := st.stage(ctx); err != nil {
		return err
	}
	ch, err := st.store(ctx)
	if err != nil {
		return err
	}
	if _, err := st.s.append(ctx, Event{Time: st.s.cfg.Clock.Now(), Phase: PhaseOutcome, Intent: intent, Operation: OpRestore,
		Principal: systemPrincipal, Result: resultOK, Change: ch.n, State: ch.state}); err != nil {
		// All is there: the first start records what is missing.
		st.s.cfg.Logger.Warn("the outcome of the restore is not recorded yet", "error", err)
	}
	return nil
}

// read verifies the whole file.
func (st *restorer) read(ctx context.Context, r io.Reader) error {
	br, err := readBackupHeader(r)
	if err != nil {
		return err
	}
	h := &br.header
	sv := sealVersion{Version: h.seal, Sealed: h.sealed, Recovery: h.recovery}
	st.s.private = st.opt.Private
	key, err := st.s.openSeal(ctx, h.root, "", sv)
	switch {
	case errors.Is(err, dek.ErrNotFound):
		return fmt.Errorf("%w: token %s does not hold the root of this backup (made with %s): give the recovery shares", dek.ErrPrecondition, st.s.cfg.Token.Describe(), h.token)
	case err != nil:
		return fmt.Errorf("open the system seal key: %w", err)
	}
	st.l = new(loaded)
	if st.l.records, st.report.Checkpoint, err = br.content(key); err != nil {
		return err
	}
	if err := st.s.verify(ctx, st.l, 0); err != nil {
		return err
	}
	st.report.AuditKey = st.l.view.boot.AuditKey
	st.report.Installation, st.report.Token = h.installation, h.token
	st.report.Taken, st.report.Change = time.Unix(h.created, 0).UTC(), st.l.view.change
	return nil
}

// prepareStore makes sure the store is empty, but for what an interrupted
// Restore left, which goes.
func (st *restorer) prepareStore(ctx context.Context) error {
	var left []Change
	marked := false
	_, err := st.s.cfg.Store.Load(ctx, func(r Record) error {
		if r.Path == pathRestore {
			marked, st.markRev = true, r.Revision
			return decodeStrict(r.Value, &st.mark)
		}
		left = append(left, Change{Path: r.Path, Expect: r.Revision})
		return nil
	})
	switch {
	case err != nil:
		return fmt.Errorf("store: %w", err)
	case !marked && len(left) > 0:
		return fmt.Errorf("%w: the store is not empty: move its directory away (keep it) and run restore again", dek.ErrPrecondition)
	}
	for part := range slices.Chunk(left, maxMuts) {
		if _, err := st.s.cfg.Store.Commit(ctx, part); err != nil {
			return fmt.Errorf("clear an interrupted restore: %w", err)
		}
	}
	if marked && st.fits() {
		return nil
	}
	st.newMark()
	st.markRev, err = st.s.cfg.Store.Commit(ctx, []Change{{Path: pathRestore, Value: encode(&st.mark), Expect: st.markRev}})
	return named(err, "store")
}

// fits reports whether the marker of an interrupted Restore is of this backup
// and these options; else new objects are made.
func (st *restorer) fits() bool {
	boot := &st.l.view.boot
	if (st.mark.Root == boot.Root) != (st.opt.Private == nil) || (st.mark.Audit == boot.Audit) == st.newLog() {
		return false
	}
	if st.opt.Private == nil {
		return true
	}
	for id, k := range st.l.view.keys.all() {
		if _, ok := st.mark.Masters[id]; !ok && !k.neverWas() {
			return false
		}
	}
	return true
}

// newMark chooses ids for what will be made in the token.
func (st *restorer) newMark() {
	boot := &st.l.view.boot
	st.mark = restoreMarker{Root: boot.Root, Audit: boot.Audit, CA: boot.CA, Masters: make(map[string]object)}
	fresh := func() (o object) {
		rand.Read(o[:])
		return o
	}
	if st.newLog() {
		st.mark.Audit = fresh()
	}
	if st.opt.Private == nil {
		return
	}
	st.mark.Root, st.mark.CA = fresh(), fresh()
	for _, e := range sorted(&st.l.view.keys, "") {
		if !e.value.neverWas() {
			st.mark.Masters[e.key] = fresh()
		}
	}
}

func (st *restorer) newLog() bool { return st.opt.Private != nil || st.opt.NewLog }

// prepareToken makes root and signing keys where they are new.
func (st *restorer) prepareToken(ctx context.Context) error {
	boot := &st.l.view.boot
	if st.opt.Private != nil {
		return st.s.makeObjects(ctx, &initMarker{Root: st.mark.Root, Audit: st.mark.Audit, CA: st.mark.CA})
	}
	if st.mark.Audit == boot.Audit {
		return nil
	}
	_, err := st.s.cfg.Token.GenerateSigner(ctx, dek.ObjectID(st.mark.Audit))
	if errors.Is(err, dek.ErrExists) {
		err = nil
	}
	return named(err, "make the audit key")
}

// openLog opens the old log, or a new one that names the old one's head.
func (st *restorer) openLog(ctx context.Context) error {
	if st.opt.OpenAudit == nil {
		return st.s.openAudit(ctx, dek.ObjectID(st.mark.Audit))
	}
	st.s.cfg.OpenAudit = func(ctx context.Context, signer crypto.Signer) (Auditor, error) {
		return st.opt.OpenAudit(ctx, signer, st.previous)
	}
	return st.s.openAudit(ctx, dek.ObjectID(st.mark.Audit))
}

// compareBefore compares the backup with the log that a new one follows.
func (st *restorer) compareBefore(ctx context.Context) error {
	if !st.newLog() {
		return nil
	}
	key, err := x509.ParsePKIXPublicKey(st.l.view.boot.AuditKey)
	if err != nil {
		return fmt.Errorf("%w: audit key of the backup: %w", dek.ErrCorrupt, err)
	}
	st.previous = &PreviousLog{Checkpoint: st.report.Checkpoint, Key: key}
	if st.opt.Before != nil {
		tail, err := st.opt.Before(ctx, *st.previous)
		if err != nil {
			return fmt.Errorf("the audit log before: %w", err)
		}
		if tail != nil {
			return st.compareLog(ctx, tail)
		}
	}
	st.report.Uncompared = true
	return nil
}

// compareLog refuses a backup that is older than a log, or lists what is
// missing, and keeps what the log says of the time after the backup.
func (st *restorer) compareLog(ctx context.Context, tail AuditTail) error {
	v := st.l.view
	n, state, err := tail.StateTail(ctx)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	behind := n > v.change || n == v.change && len(state) > 0 && string(state) != string(v.state)
	if behind && !st.opt.AcceptRollback {
		return fmt.Errorf("%w: the backup is of change %d, the audit log has seen change %d: take a newer backup, or accept the rollback with --accept-rollback",
			dek.ErrCorrupt, v.change, n)
	}
	st.n = max(st.n, n+1, v.change+1)
	err = tail.EventsAfter(ctx, v.change, func(seq uint64, e Event) error {
		if e.Change <= v.change && seq <= st.l.w.head.Log {
			return nil // open when the process before the backup ended
		}
		st.events = append(st.events, e)
		if behind && e.Result == resultOK {
			st.report.Missing = append(st.report.Missing,
				fmt.Sprintf("change %d (record %d): %s %s version %d by %s %s", e.Change, seq, e.Operation, e.Object, e.Version, e.Principal, e.Note))
		}
		return nil
	})
	return named(err, "audit log")
}

// restoreBatch bounds one transaction of a restore, in bytes; a store takes
// one MiB.
const restoreBatch = 512 << 10

// store writes the records, and last, in one transaction, boot and head: until
// then the store can't be opened.
func (st *restorer) store(ctx context.Context) (change, error) {
	s, w := st.s, st.l.w
	var batch []Change
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		rev, err := s.cfg.Store.Commit(ctx, batch)
		for _, c := range batch {
			e := w.index[c.Path]
			e.revision = rev
			w.index[c.Path] = e
		}
		batch, size = batch[:0], 0
		return named(err, "store")
	}
	for _, path := range sortedPaths(st.l.records) {
		if path == pathBoot || path == pathHead {
			continue
		}
		value := st.l.records[path].Value
		if len(batch) == maxMuts || size+len(value) > restoreBatch {
			if err := flush(); err != nil {
				return change{}, err
			}
		}
		batch, size = append(batch, Change{Path: path, Value: value}), size+len(value)+len(path)
	}
	if err := flush(); err != nil {
		return change{}, err
	}
	boot := st.l.view.boot
	w.head.Change, w.headRev = st.n-1, 0
	w.head.Epoch++
	w.index[pathRestore] = located{revision: st.markRev}
	return s.commit(ctx, []mut{{pathBoot, &boot}, {pathRestore, nil}}, true)
}

// put replaces or adds a record of the state being restored.
func (st *restorer) put(path string, rec any) error {
	w := st.l.w
	plain := encode(rec)
	value, err := w.sealer.seal(path, st.n, plain)
	if err != nil {
		return err
	}
	term := w.sealer.term(path, st.n, value)
	w.digest = w.digest.sub(w.index[path].term).add(term)
	w.index[path] = located{term: term, change: st.n}
	st.l.records[path] = Record{Path: path, Value: value}
	return st.l.view.apply(math.MaxUint64, path, plain)
}

// drop takes a record out of the state being restored.
func (st *restorer) drop(path string) error {
	w := st.l.w
	w.digest = w.digest.sub(w.index[path].term)
	delete(w.index, path)
	delete(st.l.records, path)
	return st.l.view.apply(math.MaxUint64, path, nil)
}
