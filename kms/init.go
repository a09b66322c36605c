package kms

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// maxFirstToken is how long the first administrator has.
const maxFirstToken = 24 * time.Hour

// An InitRequest sets a new installation up.
type InitRequest struct {
	Installation       string // random id, 16 to 64 hex digits; empty: made here
	Recipient          string // recovery recipient as text; empty: none, and Status is red
	FirstAdministrator string // "person/admin"
}

func (r *InitRequest) check() error {
	var errs []error
	if r.Installation == "" {
		b := make([]byte, 16)
		rand.Read(b)
		r.Installation = hex.EncodeToString(b)
	}
	if _, err := hex.DecodeString(r.Installation); err != nil || len(r.Installation) < 16 || len(r.Installation) > 64 {
		errs = append(errs, fmt.Errorf("%w: installation id: use 16 to 64 hex digits", dek.ErrInvalid))
	}
	if r.Recipient != "" {
		text, err := canonicalRecipient(r.Recipient)
		if err != nil {
			errs = append(errs, err)
		}
		r.Recipient = text
	}
	if err := checkPrincipal(r.FirstAdministrator); err != nil {
		errs = append(errs, fmt.Errorf("first administrator: %w", err))
	}
	return errors.Join(errs...)
}

// An initMarker keeps the ids of the objects an Init makes, so that one that
// is run again after a crash makes no second set.
type initMarker struct {
	Root  object `json:"root"`
	Audit object `json:"audit"`
	CA    object `json:"ca"`
}

// Init makes root, audit and CA objects in the token, the first records, and
// the one-time token of the first administrator, which is not kept. It may be
// run again after an error. It wraps dek.ErrInvalid, dek.ErrPrecondition (the
// store holds an installation already) or dek.ErrUnavailable.
func Init(ctx context.Context, cfg Config, req InitRequest) (*EnrolmentToken, error) {
	cfg, err := cfg.complete()
	if err = errors.Join(err, req.check()); err != nil {
		return nil, err
	}
	s := newService(cfg)
	defer s.release()
	mark, rev, err := s.mark(ctx)
	if err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	if err := s.makeObjects(ctx, mark); err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	if err := s.openAudit(ctx, dek.ObjectID(mark.Audit)); err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	token, err := s.firstRecords(ctx, req, mark, rev)
	if err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	return token, nil
}

// mark records the object ids before the objects are made, or finds those of
// an earlier try.
func (s *Service) mark(ctx context.Context) (*initMarker, int64, error) {
	mark := new(initMarker)
	rev := int64(0)
	_, err := s.cfg.Store.Load(ctx, func(r Record) error {
		if r.Path != pathInit {
			return fmt.Errorf("%w: the store holds an installation already", dek.ErrPrecondition)
		}
		rev = r.Revision
		return decodeStrict(r.Value, mark)
	})
	if err != nil || rev != 0 {
		return mark, rev, err
	}
	for _, o := range []*object{&mark.Root, &mark.Audit, &mark.CA} {
		rand.Read(o[:])
	}
	rev, err = s.cfg.Store.Commit(ctx, []Change{{Path: pathInit, Value: encode(mark)}})
	return mark, rev, err
}

// encode is for records that can't fail to encode.
func encode(rec any) []byte {
	b, err := json.Marshal(rec)
	if err != nil {
		panic("kms: internal error: encode a record: " + err.Error())
	}
	return b
}

// makeObjects makes what is not there yet.
func (s *Service) makeObjects(ctx context.Context, m *initMarker) error {
	if err := s.cfg.Token.GenerateRoot(ctx, dek.ObjectID(m.Root)); err != nil && !errors.Is(err, dek.ErrExists) {
		return fmt.Errorf("make the root: %w", err)
	}
	for _, o := range []object{m.Audit, m.CA} {
		if _, err := s.cfg.Token.GenerateSigner(ctx, dek.ObjectID(o)); err != nil && !errors.Is(err, dek.ErrExists) {
			return fmt.Errorf("make a signing key: %w", err)
		}
	}
	return nil
}

// firstRecords makes the first state and stores it in one transaction.
func (s *Service) firstRecords(ctx context.Context, req InitRequest, mark *initMarker, rev int64) (*EnrolmentToken, error) {
	intent, err := s.append(ctx, Event{Time: s.cfg.Clock.Now(), Phase: PhaseIntent, Operation: "system.init", Principal: systemPrincipal,
		Note: "installation " + req.Installation + ", token " + s.cfg.Token.Describe()})
	if err != nil {
		return nil, err
	}
	boot := &bootRecord{Format: recordVersion, Installation: req.Installation, Root: mark.Root, Audit: mark.Audit, CA: mark.CA}
	if boot.AuditKey, err = s.auditKey(ctx, mark.Audit); err != nil {
		return nil, err
	}
	s.view.Store(&view{boot: *boot, system: systemRecord{Recipient: req.Recipient}})
	sv, err := s.makeSeal(ctx, "", 1)
	if err != nil {
		return nil, err
	}
	boot.Seals = []sealVersion{sv}
	if err := s.firstWriter(req.Installation, sv); err != nil {
		return nil, err
	}
	muts, token, err := s.firstMuts(req)
	if err != nil {
		return nil, err
	}
	// The marker leaves in the same transaction.
	s.w.index[pathInit] = located{revision: rev}
	ch, err := s.commit(ctx, append(muts, mut{pathBoot, boot}, mut{pathInit, nil}), true)
	if err != nil {
		return nil, err
	}
	if _, err := s.append(ctx, Event{Time: s.cfg.Clock.Now(), Phase: PhaseOutcome, Intent: intent, Operation: "system.init",
		Principal: systemPrincipal, Result: resultOK, Change: ch.n, State: ch.state}); err != nil {
		// The installation is there and its token exists here only: the first
		// start records what is missing.
		s.cfg.Logger.Warn("the outcome of init is not recorded yet", "error", err)
	}
	return token, nil
}

// auditKey returns the public half of the audit key.
func (s *Service) auditKey(ctx context.Context, o object) ([]byte, error) {
	pub, err := s.cfg.Token.SignerPublic(ctx, dek.ObjectID(o))
	if err != nil {
		return nil, fmt.Errorf("audit key: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("%w: audit key: %w", dek.ErrPrecondition, err)
	}
	return spki, nil
}

// firstWriter sets the writer of an empty state up.
func (s *Service) firstWriter(installation string, sv sealVersion) error {
	key, _ := s.seals.Load(string(sv.Sealed))
	sealer, err := newSealer(installation, map[dek.Version]*dek.Key{sv.Version: key.(*dek.Key)}, 0)
	if err != nil {
		return err
	}
	s.w = &writer{sealer: sealer, index: make(map[string]located)}
	return nil
}

// firstMuts are the records of the first administrator.
func (s *Service) firstMuts(req InitRequest) ([]mut, *EnrolmentToken, error) {
	text, id, rec, err := s.newToken(Caller{Principal: systemPrincipal}, req.FirstAdministrator, maxFirstToken)
	if err != nil {
		return nil, nil, err
	}
	grant := Grant{Principal: req.FirstAdministrator, Role: RoleAdministrator, Scope: "/", By: systemPrincipal, At: s.now()}
	if err := s.cfg.Authorizer.CheckGrant(grant, nil, s.cfg.Strict); err != nil {
		return nil, nil, err
	}
	muts := []mut{
		{pathSystem, &systemRecord{Created: s.now(), Recipient: req.Recipient}},
		{prefixGrants + req.FirstAdministrator, &grantsRecord{[]Grant{grant}}},
		{prefixToken + id, rec},
	}
	return muts, &EnrolmentToken{Principal: rec.Principal, Expires: rec.Expires, Text: text}, nil
}
