package kms

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyward/keyward/dek"
)

const (
	defaultLifetime = time.Hour           // of an enrolment token
	maxLifetime     = 30 * 24 * time.Hour // of an enrolment token
	maxKeyrings     = 64                  // of one instance
	maxUsage        = 4096                // entries of one report
	usageStep       = time.Hour           // a newer "last used" is stored after so long
)

func instanceScope(name string) string { return "/instances/" + name }

func (r PrepareInstance) check() error {
	errs := []error{
		dek.CheckName("kind", r.Kind), dek.CheckName("instance", r.Name), dek.CheckName("vault", r.Vault),
		checkRequest(r.RequestID), checkLifetime(r.Lifetime),
	}
	if n := len(r.Keyrings); n == 0 || n > maxKeyrings {
		errs = append(errs, fmt.Errorf("%w: keyrings: an instance has 1 to %d", dek.ErrInvalid, maxKeyrings))
	}
	for i, k := range r.Keyrings {
		errs = append(errs, dek.CheckName("keyring", k))
		if slices.Contains(r.Keyrings[:i], k) {
			errs = append(errs, fmt.Errorf("%w: keyring %q is given twice", dek.ErrInvalid, k))
		}
	}
	return errors.Join(errs...)
}

func checkLifetime(d time.Duration) error {
	if d < 0 || d > maxLifetime {
		return fmt.Errorf("%w: lifetime %s: at most %s", dek.ErrInvalid, d, maxLifetime)
	}
	return nil
}

// PrepareInstance registers a database, grants its host principal the use of
// its keyrings, and returns the token with which the host enrols: all in one
// transaction. The same request id gives the same instance with a new token
// (the old one stops working) until it has enrolled. It wraps dek.ErrInvalid,
// dek.ErrDenied, dek.ErrNotFound (vault, keyring), dek.ErrExists,
// dek.ErrPrecondition (strict mode, server keys that clash, already enrolled).
func (s *Service) PrepareInstance(ctx context.Context, c Caller, req PrepareInstance) (Instance, *EnrolmentToken, error) {
	var inst Instance
	var token *EnrolmentToken
	err := s.do(ctx, c, OpInstancePrepare, vaultScope(req.Vault), req.check(), func(a *act) error {
		a.ev.Object, a.ev.Note = instanceScope(req.Name), "vault "+req.Vault
		text, id, rec, err := s.newToken(c, "host/"+req.Name, req.Lifetime)
		if err != nil {
			return err
		}
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			muts, err := s.prepareMuts(v, c, req)
			return append(muts, mut{prefixToken + id, rec}), err
		})
		if err != nil {
			return err
		}
		token = &EnrolmentToken{Principal: rec.Principal, Expires: rec.Expires, Text: text}
		inst = s.instanceModel(s.view.Load(), req.Name)
		return nil
	})
	if err != nil {
		return Instance{}, nil, err
	}
	return inst, token, nil
}

// prepareMuts decides on the instance and its grants, on the newest state.
func (s *Service) prepareMuts(v *view, c Caller, req PrepareInstance) ([]mut, error) {
	principal := "host/" + req.Name
	rec := &instanceRecord{Kind: req.Kind, Vault: req.Vault, Keyrings: req.Keyrings, Principal: principal, Prepared: s.now(), Request: req.RequestID}
	if err := v.checkPrepare(req, principal); err != nil {
		return nil, err
	}
	grants := slices.Clone(v.grantsOf(principal))
	for _, ring := range req.Keyrings {
		g := Grant{Principal: principal, Role: RoleServiceEncryptionUser, Scope: ringScope(req.Vault, ring), By: c.Principal, At: s.now()}
		if hasGrant(grants, g) {
			continue
		}
		if err := s.cfg.Authorizer.CheckGrant(g, grants, s.cfg.Strict); err != nil {
			return nil, err
		}
		grants = append(grants, g)
	}
	muts := []mut{{prefixInst + req.Name, rec}, {prefixGrants + principal, &grantsRecord{grants}}}
	for id, t := range v.tokens.all() { // a new token replaces the ones before
		if t.Principal == principal && t.Used.IsZero() {
			muts = append(muts, mut{prefixToken + id, nil})
		}
	}
	return muts, bounded(muts)
}

// checkPrepare finds what stands against an instance.
func (v *view) checkPrepare(req PrepareInstance, principal string) error {
	if _, ok := v.vaults.get(req.Vault); !ok {
		return fmt.Errorf("vault %s: %w", req.Vault, dek.ErrNotFound)
	}
	if _, denied := v.denied.get(principal); denied {
		return fmt.Errorf("%w: %s was revoked; choose another instance name", dek.ErrPrecondition, principal)
	}
	if old, ok := v.instances.get(req.Name); ok {
		switch {
		case req.RequestID == "" || old.Request != req.RequestID:
			return fmt.Errorf("instance %s: %w", req.Name, dek.ErrExists)
		case !old.Enrolled.IsZero():
			return fmt.Errorf("%w: instance %s has enrolled already", dek.ErrPrecondition, req.Name)
		}
	}
	servers := make(map[uint32]string)
	for _, name := range req.Keyrings {
		r := v.ring(req.Vault, name)
		if r == nil {
			return fmt.Errorf("keyring %s/%s: %w", req.Vault, name, dek.ErrNotFound)
		}
		if other, twice := servers[r.rec.ServerKey]; twice && r.rec.ServerKey != 0 {
			return fmt.Errorf("%w: keyrings %s and %s both have server key %d", dek.ErrPrecondition, other, name, r.rec.ServerKey)
		}
		servers[r.rec.ServerKey] = name
	}
	return nil
}

// Instances lists the instances whose vault the caller may read.
func (s *Service) Instances(ctx context.Context, c Caller) ([]Instance, error) {
	v := s.view.Load()
	var out []Instance
	scope := "/"
	for _, e := range sorted(&v.instances, "") {
		if s.allowed(c, OpInstanceRead, vaultScope(e.value.Vault)) {
			scope = vaultScope(e.value.Vault)
			out = append(out, s.instanceModel(v, e.key))
		}
	}
	err := s.do(ctx, c, OpInstanceRead, scope, nil, func(a *act) error {
		a.ev.Object, a.ev.Count = "/instances", len(out)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// RevokeInstance takes an instance out of service for good: its principal is
// denied everything from the return of this call on, and its Watch ends. It
// wraps dek.ErrInvalid, dek.ErrDenied, dek.ErrNotFound.
func (s *Service) RevokeInstance(ctx context.Context, c Caller, name string) error {
	scope := "/" // of the instance's vault, if there is one
	inst, ok := s.view.Load().instances.get(name)
	if ok {
		scope = vaultScope(inst.Vault)
	}
	return s.do(ctx, c, OpInstanceRevoke, scope, dek.CheckName("instance", name), func(a *act) error {
		a.ev.Object = instanceScope(name)
		var err error
		a.change, err = s.update(ctx, func(v *view) ([]mut, error) {
			rec, ok := v.instances.get(name)
			if !ok {
				return nil, fmt.Errorf("instance %s: %w", name, dek.ErrNotFound)
			}
			next := *rec
			next.Revoked = s.now()
			return append(v.denyMuts(rec.Principal, &deniedRecord{s.now(), c.Principal}), mut{prefixInst + name, &next}), nil
		})
		if err == nil {
			s.settle()
			s.hub.revoke(s.view.Load(), func(n string, _ *instanceRecord) bool { return n == name })
		}
		return err
	})
}

// denyMuts puts a principal on the deny list and burns its tokens.
func (v *view) denyMuts(principal string, rec *deniedRecord) []mut {
	muts := []mut{{prefixDenied + principal, rec}}
	for id, t := range v.tokens.all() {
		if t.Principal == principal && t.Used.IsZero() && len(muts) < maxMuts-1 {
			muts = append(muts, mut{prefixToken + id, nil})
		}
	}
	return muts
}

// own finds the instance that the caller is, or says no.
func (v *view) own(c Caller, name string) (*instanceRecord, error) {
	inst, ok := v.instances.get(name)
	if !ok || inst.Principal != c.Principal || !inst.Revoked.IsZero() {
		return nil, dek.ErrDenied
	}
	return inst, nil
}

// beginOwn is begin for what an instance does for itself: allowed if a grant
// allows it on at least one of its keyrings.
func (s *Service) beginOwn(ctx context.Context, c Caller, op Operation, name string) (*act, *instanceRecord, error) {
	if err := s.ready(); err != nil {
		return nil, nil, err
	}
	ev := s.event(c, op, "")
	if err := dek.CheckName("instance", name); err != nil {
		return nil, nil, s.refuse(ctx, ev, err)
	}
	ev.Object = instanceScope(name)
	inst, err := s.view.Load().own(c, name)
	if err != nil {
		ev.Rule = "not an instance of the caller"
		return nil, nil, s.refuse(ctx, ev, err)
	}
	for _, ring := range inst.Keyrings {
		if ev.Rule, err = s.decide(c, op, ringScope(inst.Vault, ring)); err == nil {
			break
		}
	}
	if err != nil {
		return nil, nil, s.refuse(ctx, ev, err)
	}
	a, err := s.intend(ctx, ev)
	return a, inst, err
}

// OpenInstance authorises a database start and returns what the instance may
// use. It wraps dek.ErrDenied (a stranger; revoked; cold and one of its
// keyrings can't be used now), dek.ErrCorrupt (the audit log is behind the
// checkpoint the agent saw: this service was put back in time and stops),
// dek.ErrAuth (a checkpoint that no audit key of ours signed).
func (s *Service) OpenInstance(ctx context.Context, c Caller, req OpenInstance) (InstanceView, error) {
	a, inst, err := s.beginOwn(ctx, c, OpInstanceOpen, req.Instance)
	if err != nil {
		return InstanceView{}, err
	}
	out, err := s.openInstance(ctx, a, c, inst, req)
	if err = a.end(ctx, err); err != nil {
		return InstanceView{}, err
	}
	return out, nil
}

func (s *Service) openInstance(ctx context.Context, a *act, c Caller, inst *instanceRecord, req OpenInstance) (InstanceView, error) {
	if req.Cold {
		a.ev.Note = "cold"
	}
	if err := s.checkSeen(ctx, a, req); err != nil {
		return InstanceView{}, err
	}
	v := s.view.Load()
	out := InstanceView{Instance: s.instanceModel(v, req.Instance), Generation: v.change}
	for _, name := range inst.Keyrings {
		k, usable := s.effective(v, c, inst.Vault, name)
		if req.Cold && !usable {
			return InstanceView{}, fmt.Errorf("keyring %s/%s can't be used now: %w", inst.Vault, name, dek.ErrDenied)
		}
		out.Keyrings = append(out.Keyrings, k)
	}
	s.sight(req.Instance)
	var err error
	out.Checkpoint, err = s.audit.Head(ctx)
	return out, err
}

// checkSeen compares the checkpoint that an agent kept with the log. A log that
// is behind it stops the service.
func (s *Service) checkSeen(ctx context.Context, a *act, req OpenInstance) error {
	if len(req.Checkpoint) == 0 {
		return nil
	}
	err := s.audit.Extends(ctx, req.Checkpoint)
	if err == nil {
		return nil
	}
	known, accepted := s.view.Load().fromOldLog(req.Checkpoint)
	switch {
	case accepted:
		a.ev.Note += " checkpoint of the log before the restore"
		return nil
	case !errors.Is(err, dek.ErrCorrupt):
		return fmt.Errorf("checkpoint: %w", err)
	}
	what := "the audit log is behind what instance %s has seen; bring the newest store and log back, or restore with --accept-rollback"
	if known {
		what = "instance %s has seen changes that the restored backup does not have; restore a newer backup, or this one with --accept-rollback"
	}
	err = fmt.Errorf("%w: rollback suspected: "+what, dek.ErrCorrupt, req.Instance)
	s.halt(err)
	return err
}

// effective is a keyring as an instance may use it now: a version is enabled if
// it and its master version are and the grant is there. usable: the newest
// version is.
func (s *Service) effective(v *view, c Caller, vault, name string) (k Keyring, usable bool) {
	r := v.ring(vault, name)
	k = r.model(vault, name, true)
	granted := s.allowed(c, OpKeyringUnwrap, ringScope(vault, name))
	out := k.Versions[:0]
	k.Current = 0
	for _, m := range k.Versions {
		if m.State != Enabled && m.State != Disabled {
			continue // never was, or is no more
		}
		master := v.key(vault, r.rec.MasterKey).version(m.Master)
		usable = m.State == Enabled && master != nil && master.State == Enabled && granted
		if usable {
			k.Current = m.Version
		} else {
			m.State, m.Wrapped = Disabled, nil
		}
		out = append(out, m)
	}
	k.Versions = out
	return k, usable
}

// A sighting is what memory knows of an instance.
type sighting struct {
	mu   sync.Mutex
	last time.Time
}

func (s *Service) sight(instance string) *sighting {
	e, _ := s.seen.LoadOrStore(instance, &sighting{})
	si := e.(*sighting)
	si.mu.Lock()
	si.last = s.now()
	si.mu.Unlock()
	return si
}

// ReportUsage says when the instance's database last asked for which version.
// It wraps dek.ErrDenied, dek.ErrInvalid.
func (s *Service) ReportUsage(ctx context.Context, c Caller, instance string, u []Usage) error {
	a, inst, err := s.beginOwn(ctx, c, OpInstanceReport, instance)
	if err != nil {
		return err
	}
	a.ev.Count = len(u)
	return a.end(ctx, s.reportUsage(ctx, instance, inst, u))
}

func (s *Service) reportUsage(ctx context.Context, instance string, inst *instanceRecord, u []Usage) error {
	if len(u) > maxUsage {
		return fmt.Errorf("%w: a report has at most %d entries", dek.ErrInvalid, maxUsage)
	}
	for _, e := range u {
		if !slices.Contains(inst.Keyrings, e.Keyring) || e.Version == 0 {
			return fmt.Errorf("%w: report: keyring %.80q version %d is not of this instance", dek.ErrInvalid, e.Keyring, e.Version)
		}
	}
	s.sight(instance)
	// Bookkeeping: it is no rollback if a report is lost.
	_, err := s.keepBooks(ctx, func(v *view) ([]mut, error) {
		old, _ := v.usage.get(instance)
		next, worth := mergeUsage(old, u)
		if !worth {
			return nil, nil
		}
		next.LastSeen = s.now()
		return []mut{{prefixUsage + instance, next}}, nil
	})
	return err
}

// mergeUsage adds u to old; worth: enough has changed to store it.
func mergeUsage(old *usageRecord, u []Usage) (next *usageRecord, worth bool) {
	next = &usageRecord{}
	if old != nil {
		next.Usage = slices.Clone(old.Usage)
	}
	for _, e := range u {
		i := slices.IndexFunc(next.Usage, func(o Usage) bool { return o.Keyring == e.Keyring && o.Version == e.Version })
		switch {
		case i < 0:
			next.Usage, worth = append(next.Usage, e), true
		case e.Last.Sub(next.Usage[i].Last) >= usageStep:
			next.Usage[i].Last, worth = e.Last, true
		}
	}
	slices.SortFunc(next.Usage, func(a, b Usage) int {
		if c := strings.Compare(a.Keyring, b.Keyring); c != 0 {
			return c
		}
		return int(a.Version) - int(b.Version)
	})
	return next, worth
}

// instanceModel joins what the store and what memory know.
func (s *Service) instanceModel(v *view, name string) Instance {
	rec, ok := v.instances.get(name)
	if !ok {
		return Instance{}
	}
	out := Instance{
		Name: name, Kind: rec.Kind, Vault: rec.Vault, Keyrings: slices.Clone(rec.Keyrings), Principal: rec.Principal,
		Prepared: rec.Prepared, Enrolled: rec.Enrolled, Connected: s.hub.connected(name),
	}
	if u, ok := v.usage.get(name); ok {
		out.LastSeen, out.Usage = u.LastSeen, slices.Clone(u.Usage)
	}
	if e, ok := s.seen.Load(name); ok {
		si := e.(*sighting)
		si.mu.Lock()
		if si.last.After(out.LastSeen) {
			out.LastSeen = si.last
		}
		si.mu.Unlock()
	}
	return out
}
