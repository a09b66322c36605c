package kms

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// systemPrincipal is the service itself in records.
const systemPrincipal = "system/kms"

// Anonymous is a caller without an identity in records: a record always names
// somebody. Nobody can hold a grant or a certificate by this name.
const Anonymous = "anonymous"

// resultOK is Event.Result of what succeeded.
const resultOK = "ok"

// outcomeTimeout bounds writing an outcome: the caller may have gone, the
// record must still be made.
const outcomeTimeout = 10 * time.Second

// classes names the error classes in records, in the order of matching.
func classes() []struct {
	err  error
	name string
} {
	return []struct {
		err  error
		name string
	}{
		{dek.ErrDenied, "denied"},
		{dek.ErrAuth, "auth"},
		{dek.ErrInvalid, "invalid"},
		{dek.ErrNotFound, "not-found"},
		{dek.ErrExists, "exists"},
		{dek.ErrConflict, "conflict"},
		{dek.ErrPrecondition, "precondition"},
		{dek.ErrExhausted, "exhausted"},
		{dek.ErrCorrupt, "corrupt"},
		{dek.ErrUnavailable, "unavailable"},
		{dek.ErrDestroyed, "destroyed"},
	}
}

// classOf names the class of err; empty: none.
func classOf(err error) string {
	for _, c := range classes() {
		if errors.Is(err, c.err) {
			return c.name
		}
	}
	return ""
}

// result is Event.Result of err.
func result(err error) string {
	switch {
	case err == nil:
		return resultOK
	case classOf(err) != "":
		return classOf(err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "cancelled"
	}
	return "internal"
}

// An act is one authorised, recorded operation under way.
type act struct {
	s      *Service
	ev     Event
	intent uint64
	change change
}

// do authorises op of c on scope, records the intent, calls f and records the
// outcome; only then it returns. A request that is wrong in itself (input) is
// refused and recorded without an intent.
func (s *Service) do(ctx context.Context, c Caller, op Operation, scope string, input error, f func(a *act) error) error {
	a, err := s.begin(ctx, c, op, scope, input)
	if err != nil {
		return err
	}
	return a.end(ctx, f(a))
}

// begin does the first half of do.
func (s *Service) begin(ctx context.Context, c Caller, op Operation, scope string, input error) (*act, error) {
	if err := s.ready(); err != nil {
		return nil, err
	}
	ev := s.event(c, op, scope)
	if input != nil {
		ev.Object = "" // as the caller wrote it, it is no place
		return nil, s.refuse(ctx, ev, input)
	}
	rule, err := s.decide(c, op, scope)
	ev.Rule = rule
	if err != nil {
		return nil, s.refuse(ctx, ev, err)
	}
	return s.intend(ctx, ev)
}

// intend records the intent of an allowed act.
func (s *Service) intend(ctx context.Context, ev Event) (*act, error) {
	ev.Phase = PhaseIntent
	seq, err := s.append(ctx, ev)
	if err != nil {
		return nil, err
	}
	return &act{s: s, ev: ev, intent: seq}, nil
}

// event fills in what every record of a call has.
func (s *Service) event(c Caller, op Operation, scope string) Event {
	return Event{
		Time: s.cfg.Clock.Now(), Operation: op, Principal: or(c.Principal, Anonymous), Serial: c.Serial,
		Remote: c.Remote, Correlation: c.Correlation, Object: scope,
	}
}

// decide asks the rules. The deny list comes first.
func (s *Service) decide(c Caller, op Operation, scope string) (rule string, err error) {
	v := s.view.Load()
	if _, denied := v.denied.get(c.Principal); denied {
		return "identity is revoked", dek.ErrDenied
	}
	d := s.cfg.Authorizer.Decide(c, op, scope, v.grantsOf(c.Principal))
	if !d.Allowed {
		return d.Rule, dek.ErrDenied
	}
	return d.Rule, nil
}

// allowed is decide for filtering lists.
func (s *Service) allowed(c Caller, op Operation, scope string) bool {
	_, err := s.decide(c, op, scope)
	return err == nil
}

// refuse records a refusal and returns err, or why it could not be recorded.
func (s *Service) refuse(ctx context.Context, ev Event, err error) error {
	ev.Phase, ev.Result = PhaseRefused, result(err)
	if _, aerr := s.append(ctx, ev); aerr != nil {
		return aerr
	}
	return err
}

// end records the outcome. If it can't be recorded, the caller learns that
// instead of a success: with the same request id it gets the same answer later.
func (a *act) end(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), outcomeTimeout)
	defer cancel()
	ev := a.ev
	ev.Time, ev.Phase, ev.Intent, ev.Result = a.s.cfg.Clock.Now(), PhaseOutcome, a.intent, result(err)
	ev.Change, ev.State = a.change.n, a.change.state
	_, aerr := a.s.append(ctx, ev)
	switch {
	case err != nil:
		return err
	case aerr != nil && a.change.n != 0:
		return fmt.Errorf("change %d is made, but its outcome could not be recorded: %w", a.change.n, aerr)
	}
	return aerr
}

// append records ev.
func (s *Service) append(ctx context.Context, ev Event) (uint64, error) {
	seq, err := s.audit.Append(ctx, ev)
	if err != nil {
		return 0, fmt.Errorf("audit record: %w", classed(err))
	}
	s.sawSequence(seq)
	return seq, nil
}

// recordSystem records an act of the service itself.
func (s *Service) recordSystem(ctx context.Context, ev Event) error {
	ev.Time, ev.Phase, ev.Principal = s.cfg.Clock.Now(), PhaseSystem, systemPrincipal
	_, err := s.append(ctx, ev)
	return err
}

func (s *Service) sawSequence(seq uint64) {
	for {
		old := s.logged.Load()
		if seq <= old || s.logged.CompareAndSwap(old, seq) {
			return
		}
	}
}

// AuthorizeAudit authorises and records reading the audit log (op OpAuditRead)
// or another act of a front door that has no method here. It wraps
// dek.ErrDenied, or the reason why it could not be recorded.
func (s *Service) AuthorizeAudit(ctx context.Context, c Caller, op Operation, scope string) error {
	return s.do(ctx, c, op, scope, nil, func(*act) error { return nil })
}
