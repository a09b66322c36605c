package kms

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/dek/recovery"
)

// A Service is the key service of one installation. All methods may be called
// concurrently. Unwraps read one immutable view and do not wait for the store.
type Service struct {
	cfg   Config
	audit Auditor
	tail  AuditTail
	owned io.Closer // the Auditor, if OpenAudit opened it
	ca    crypto.Signer

	private *recovery.Private // during a Restore: opens seal keys in place of the root

	view     atomic.Pointer[view]
	seals    sync.Map                    // sealed bytes (string) -> *dek.Key, opened once
	sealUses sync.Map                    // vault -> *sealUse
	halted   atomic.Pointer[haltedError] // why nothing is served any more
	logged   atomic.Uint64               // largest audit sequence seen

	gate sync.RWMutex // keys on their way out: gate.go

	mu sync.Mutex // one writer
	w  *writer    // guarded by mu

	work     keyedMutex // versions being made, by record path
	flights  flights
	lockouts lockouts
	attempts attempts
	hub      hub
	seen     sync.Map // instance name -> *sighting
	watchdog watchdog
	saver    saver

	stop context.CancelFunc
	done sync.WaitGroup
}

// haltedError says why a service stopped itself. It goes out as it is.
type haltedError struct{ err error }

// halt stops serving for good: what was found needs a person. The first cause
// stays.
func (s *Service) halt(err error) {
	if s.halted.CompareAndSwap(nil, &haltedError{err}) {
		s.cfg.Logger.Error("stopped serving", "error", err)
		s.hub.wakeAll()
	}
}

// Ready returns nil while the service serves, else why it stopped itself (a
// rollback was found, a newer process took over, it is closed). It does no
// input or output; health checks ask it.
func (s *Service) Ready() error { return s.ready() }

// ready returns the error that stopped the service.
func (s *Service) ready() error {
	if h := s.halted.Load(); h != nil {
		return h.err
	}
	return nil
}

// Open loads the state, verifies every record, compares it with the audit log,
// finishes what a crash left PENDING, and serves. It wraps
//   - dek.ErrInvalid: the configuration (all mistakes at once);
//   - dek.ErrPrecondition: nothing there to open: run init, or restore;
//   - dek.ErrCorrupt: a record was removed, moved, replaced or changed, or store
//     or log were put back in time; the text names it and the way on;
//   - dek.ErrUnavailable: token, store or log can't be reached now.
//
// Nothing but the epoch of the store is changed on the way to an error.
func Open(ctx context.Context, cfg Config) (*Service, error) {
	s, err := openState(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		s.release()
		return nil, err
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	s.done.Go(func() { s.reconcile(run) })
	s.done.Go(func() { s.fence(run) })
	return s, nil
}

// openState loads and verifies the records.
func openState(ctx context.Context, cfg Config) (*Service, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	s := newService(cfg)
	l, err := s.load(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the state: %w", err), s.release())
	}
	s.w = l.w
	s.view.Store(l.view)
	return s, nil
}

func newService(cfg Config) *Service {
	s := &Service{cfg: cfg}
	s.hub.init()
	s.flights.init()
	return s
}

// start compares state and log, takes the store over and finishes PENDING
// versions.
func (s *Service) start(ctx context.Context) error {
	var err error
	if s.ca, err = newSigner(ctx, s.cfg.Token, dek.ObjectID(s.view.Load().boot.CA)); err != nil {
		return fmt.Errorf("certificate authority key: %w", err)
	}
	if err := s.compareTail(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	ch, err := s.takeOver(ctx)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("take the store over: %w", err)
	}
	if err := s.recordSystem(ctx, Event{Operation: "system.start", Result: resultOK,
		Note: fmt.Sprintf("state of change %d, token %s", ch.n, s.cfg.Token.Describe())}); err != nil {
		return err
	}
	s.watchdog.init(s.cfg.Clock.Now())
	// One version that can't be finished now must not keep the others from being
	// served: it stays PENDING, Status shows it, and the rounds go on.
	if err := s.round(ctx, true); err != nil {
		s.cfg.Logger.Warn("upkeep at start", "error", err)
	}
	return nil
}

// takeOver writes a head with the next epoch: whoever held the store before is
// fenced by it.
func (s *Service) takeOver(ctx context.Context) (change, error) {
	s.w.head.Epoch++
	ch, err := s.commit(ctx, nil, false)
	if err != nil {
		return change{}, err
	}
	return ch, nil
}

// openAudit sets audit and tail, once.
func (s *Service) openAudit(ctx context.Context, object dek.ObjectID) error {
	if s.tail != nil {
		return nil
	}
	s.audit = s.cfg.Auditor
	if s.audit == nil {
		signer, err := newSigner(ctx, s.cfg.Token, object)
		if err != nil {
			return fmt.Errorf("audit key: %w", err)
		}
		if s.audit, err = s.cfg.OpenAudit(ctx, signer); err != nil {
			return fmt.Errorf("open the audit log: %w", err)
		}
		s.owned, _ = s.audit.(io.Closer)
	}
	var ok bool
	if s.tail, ok = s.audit.(AuditTail); !ok {
		return fmt.Errorf("%w: config: the Auditor is no AuditTail, a rolled back store could not be found", dek.ErrInvalid)
	}
	return nil
}

// compareTail refuses a store that is behind the log, and a log that is behind
// the store. A store may be ahead by changes whose outcome a crash kept out of
// the log.
func (s *Service) compareTail(ctx context.Context) error {
	n, state, err := s.tail.StateTail(ctx)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	v := s.view.Load()
	const way = "bring the newest store back, or restore a backup with --accept-rollback"
	switch {
	case n > s.w.head.Act:
		return fmt.Errorf("%w: rollback suspected: the store is at change %d, the audit log at %d; %s", dek.ErrCorrupt, s.w.head.Act, n, way)
	case n == v.change && len(state) > 0 && string(state) != string(v.state):
		return fmt.Errorf("%w: rollback suspected: store and audit log name different states for change %d; %s", dek.ErrCorrupt, n, way)
	}
	seq, err := s.audit.Append(ctx, Event{Time: s.cfg.Clock.Now(), Phase: PhaseSystem, Operation: "system.open",
		Principal: systemPrincipal, Note: fmt.Sprintf("store at change %d", v.change)})
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	if head := s.w.head.Log; seq <= head {
		return fmt.Errorf("%w: the audit log ends at record %d, but the store knows of record %d: the log was cut or replaced; bring it back, or restore a backup with --accept-rollback",
			dek.ErrCorrupt, seq, head)
	}
	s.sawSequence(seq)
	if n == s.w.head.Act {
		return nil
	}
	return s.recordFound(ctx, n)
}

// Close stops the reconciler, ends every Watch and wipes the keys. Calls under
// way fail. It returns the error of closing the log, if the service opened it.
func (s *Service) Close() error {
	s.halted.CompareAndSwap(nil, &haltedError{fmt.Errorf("%w: the service is shutting down", dek.ErrUnavailable)})
	s.stop()
	s.hub.wakeAll()
	s.done.Wait()
	return s.release()
}

// release gives back what a Service holds.
func (s *Service) release() (err error) {
	s.seals.Range(func(k, v any) bool {
		v.(*dek.Key).Destroy()
		s.seals.Delete(k)
		return true
	})
	if s.owned != nil {
		err = s.owned.Close()
	}
	return err
}

// loaded is the verified content of the store.
type loaded struct {
	w       *writer
	view    *view
	records map[string]Record
}

// load reads and verifies the whole store.
func (s *Service) load(ctx context.Context) (*loaded, error) {
	l := &loaded{records: make(map[string]Record)}
	rev, err := s.cfg.Store.Load(ctx, func(r Record) error {
		l.records[r.Path] = r
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	boot, err := parseBoot(l.records)
	if err != nil {
		return nil, err
	}
	// The log comes first: it can say which record is wrong.
	if err := s.openAudit(ctx, dek.ObjectID(boot.Audit)); err != nil {
		return nil, err
	}
	return l, s.verify(ctx, l, rev)
}

// verify opens the records of l and compares them with the head.
func (s *Service) verify(ctx context.Context, l *loaded, rev int64) error {
	boot, err := parseBoot(l.records)
	if err != nil {
		return err
	}
	keys, err := s.openSystemSeals(ctx, boot)
	if err != nil {
		return err
	}
	sealer, err := newSealer(boot.Installation, keys, 0)
	if err != nil {
		return err
	}
	l.w = &writer{sealer: sealer, index: make(map[string]located, len(l.records)), revision: rev}
	if err := l.openHead(); err != nil {
		return err
	}
	if string(stateHash(l.records[pathBoot].Value)) != string(l.w.head.Boot) {
		return fmt.Errorf("%w: record %q was changed", dek.ErrCorrupt, pathBoot)
	}
	l.view = &view{change: l.w.head.Change, epoch: l.w.head.Epoch, state: stateHash(l.records[pathHead].Value)}
	for path, r := range l.records {
		if path == pathHead {
			continue
		}
		if err := l.enter(path, r, boot); err != nil {
			return err
		}
	}
	if string(l.w.digest.bytes()) != string(l.w.head.Digest) {
		return fmt.Errorf("%w: %s; bring the newest store back, or restore a backup with --accept-rollback", dek.ErrCorrupt, s.suspects(ctx, l))
	}
	if err := l.view.check(); err != nil {
		return err
	}
	return s.openVaultSeals(ctx, l.view)
}

// openHead opens the head, which says where the counters stand.
func (l *loaded) openHead() error {
	r, ok := l.records[pathHead]
	if !ok {
		return fmt.Errorf("%w: record %q was removed; restore a backup", dek.ErrCorrupt, pathHead)
	}
	plain, n, err := l.w.sealer.open(pathHead, r.Value)
	if err != nil {
		return err
	}
	if err := decodeStrict(plain, &l.w.head); err != nil || l.w.head.Change != n || len(l.w.head.Digest) != 32 {
		return fmt.Errorf("%w: record %q: not of this release", dek.ErrCorrupt, pathHead)
	}
	l.w.headRev = r.Revision
	l.w.sealer.used = l.w.head.Reserved
	return nil
}

// enter verifies one record and adds it to view, index and digest.
func (l *loaded) enter(path string, r Record, boot *bootRecord) error {
	plain, n := r.Value, boot.Change
	if path != pathBoot {
		var err error
		if plain, n, err = l.w.sealer.open(path, r.Value); err != nil {
			return err
		}
	}
	if n > l.w.head.Change {
		return fmt.Errorf("%w: record %q is of change %d, the newest is %d", dek.ErrCorrupt, path, n, l.w.head.Change)
	}
	term := l.w.sealer.term(path, n, r.Value)
	l.w.digest = l.w.digest.add(term)
	l.w.index[path] = located{r.Revision, term, n}
	if err := l.view.apply(math.MaxUint64, path, plain); err != nil {
		return fmt.Errorf("record %q: %w: %w", path, dek.ErrCorrupt, err)
	}
	return nil
}

// parseBoot finds the boot record, or says what to do without one.
func parseBoot(records map[string]Record) (*bootRecord, error) {
	r, ok := records[pathBoot]
	if !ok {
		if _, half := records[pathRestore]; half {
			return nil, fmt.Errorf("%w: a restore was interrupted: run keyward-kms restore again", dek.ErrPrecondition)
		}
		if _, some := records[pathHead]; some {
			return nil, fmt.Errorf("%w: record %q was removed; restore a backup", dek.ErrCorrupt, pathBoot)
		}
		return nil, fmt.Errorf("%w: the store is empty: run keyward-kms init", dek.ErrPrecondition)
	}
	boot := new(bootRecord)
	if err := decodeStrict(r.Value, boot); err != nil || boot.Format != recordVersion || len(boot.Seals) == 0 {
		return nil, fmt.Errorf("%w: record %q was changed or is of another release", dek.ErrCorrupt, pathBoot)
	}
	return boot, nil
}

// openSystemSeals has the token open every version of the system seal key.
func (s *Service) openSystemSeals(ctx context.Context, boot *bootRecord) (map[dek.Version]*dek.Key, error) {
	keys := make(map[dek.Version]*dek.Key, len(boot.Seals))
	for _, sv := range boot.Seals {
		k, err := s.openSeal(ctx, dek.ObjectID(boot.Root), "", sv)
		switch {
		case errors.Is(err, dek.ErrAuth):
			return nil, fmt.Errorf("%w: record %q was changed, or its root is not the one in token %s", dek.ErrCorrupt, pathBoot, s.cfg.Token.Describe())
		case errors.Is(err, dek.ErrNotFound):
			return nil, fmt.Errorf("%w: token %s does not hold the root of this store: attach the right token, or restore a backup with the recovery shares",
				dek.ErrPrecondition, s.cfg.Token.Describe())
		case err != nil:
			return nil, fmt.Errorf("open the system seal key: %w", err)
		}
		keys[sv.Version] = k
	}
	return keys, nil
}

// openVaultSeals has the token open what the view's vaults need.
func (s *Service) openVaultSeals(ctx context.Context, v *view) error {
	for name, rec := range v.vaults.all() {
		for _, sv := range rec.Seals {
			if _, err := s.openSeal(ctx, dek.ObjectID(v.boot.Root), name, sv); err != nil {
				return fmt.Errorf("open seal key %d of vault %s: %w", sv.Version, name, err)
			}
		}
	}
	return nil
}

// openSeal opens a sealed seal key once; the Service owns the result.
func (s *Service) openSeal(ctx context.Context, root dek.ObjectID, vault string, sv sealVersion) (*dek.Key, error) {
	if k, ok := s.seals.Load(string(sv.Sealed)); ok {
		return k.(*dek.Key), nil
	}
	b := sealKeyBinding(vault, sv.Version)
	var k *dek.Key
	var err error
	if s.private != nil {
		if len(sv.Recovery) == 0 {
			return nil, fmt.Errorf("%w: there is no recovery copy: no recipient was set up when it was made", dek.ErrPrecondition)
		}
		k, err = s.private.Open(b, sv.Recovery)
	} else {
		k, err = s.cfg.Token.OpenKey(ctx, root, b, sv.Sealed)
	}
	if err != nil {
		return nil, err
	}
	return s.keepSeal(sv.Sealed, k), nil
}

// keepSeal hands k over to the Service.
func (s *Service) keepSeal(sealed []byte, k *dek.Key) *dek.Key {
	if old, there := s.seals.LoadOrStore(string(sealed), k); there {
		k.Destroy()
		return old.(*dek.Key)
	}
	return k
}

// suspects says which record does not match the digest, as far as the log
// knows the newest change of each object.
func (s *Service) suspects(ctx context.Context, l *loaded) string {
	const blind = "a record was removed or replaced by an older copy (the digest of the state does not match)"
	if s.tail == nil {
		return blind
	}
	last := make(map[string]uint64)
	err := s.tail.EventsAfter(ctx, 0, func(_ uint64, e Event) error {
		if path := recordPath(e); path != "" && e.Result == resultOK {
			last[path] = max(last[path], e.Change)
		}
		return nil
	})
	if err != nil {
		s.cfg.Logger.Warn("the audit log can't say which record is wrong", "error", err)
	}
	for path, want := range last {
		r, ok := l.records[path]
		if !ok {
			return fmt.Sprintf("record %q was removed", path)
		}
		if _, n, err := l.w.sealer.open(path, r.Value); err == nil && n < want {
			return fmt.Sprintf("record %q was replaced by its older copy of change %d; the audit log knows of change %d", path, n, want)
		}
	}
	return blind
}

// recordPath is the record that the act of e wrote, where that is one record.
func recordPath(e Event) string {
	part := strings.Split(e.Object, "/")
	switch {
	case e.Operation == OpVaultCreate && len(part) == 3, e.Operation == OpInstancePrepare && len(part) == 3:
		return e.Object[1:]
	case e.Version == 0 || len(part) != 5:
		return ""
	}
	switch e.Operation {
	case OpKeyCreate, OpKeyRoll, OpKeySetEnabled, OpKeyringCreate, OpKeyringRoll, OpKeyringSetState, opFinishPending:
		return versionPath(part[3]+"/"+part[2]+"/"+part[4], e.Version)
	}
	return ""
}

// The acts of the service itself that a restore reads.
const (
	opFinishPending Operation = "system.finish-pending"
	opFoundChange   Operation = "system.found-change"
)
